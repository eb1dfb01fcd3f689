"""Timings on the user's machine, side by side: ``acdc bench``.

=============  ===============================================================
``race``       interleaved timing, medians and their spread
``peers``      one layer computed by PyTorch, by its CSR, by other libraries
``layers``     single layers, forward and backward
``networks``   networks by name, for the next three
``step``       a training step, and its memory
``breakdown``  the time of a training step by its parts
``run``        a whole run
``table``      rows as lines, and as the file that ``--json`` names
=============  ===============================================================
"""
