"""Timings on the user's machine, side by side: ``acdc bench``.

=============  ===============================================================
``race``       turns, rounds, medians and their spread
``peers``      one layer computed by PyTorch, by its CSR, by other libraries
``layers``     single layers, forward and backward
``table``      rows as lines, and as the file that ``--json`` names
=============  ===============================================================
"""
