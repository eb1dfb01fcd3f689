"""A comparison: methods x sparsities x seeds on one task, every cell a run of its own.

``grid`` says what is compared, ``cells`` what that comes to, ``work`` trains it, ``results`` reads
what came out, ``page`` shows it.
"""
