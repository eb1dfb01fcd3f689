"""Timings on the user's machine, side by side: ``acdc bench``.

=============  ===============================================================
``race``       turns, rounds, medians and their spread
``peers``      one layer computed by PyTorch, by its CSR, by other libraries
``layers``     single layers, forward and backward
``networks``   the networks of the next two, by name
``step``       a training step, and its memory
``run``        a whole run
``table``      rows as lines, and as the file that ``--json`` names
=============  ===============================================================
"""
