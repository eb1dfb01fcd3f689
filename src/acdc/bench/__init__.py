"""Timings on the user's machine, side by side: ``acdc bench``.

=============  ===============================================================
``race``       interleaved timing, medians and their spread
``peers``      one layer computed by PyTorch, by its CSR, by other libraries
``layers``     single layers, forward and backward
``networks``   networks by name, for steps and runs
``step``       a training step, and its memory
``zoo``        networks of other libraries, by name
``zoo_step``   their training steps
``breakdown``  the time of a training step by its parts
``run``        a whole run
``table``      rows as lines, and as the file that ``--json`` names
=============  ===============================================================
"""
