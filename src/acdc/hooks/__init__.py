"""What the sparsifier does to a model and an optimizer, a part in each file.

=============  ===================================================================
``binding``    one model, its weights and one optimizer belong to one sparsifier
``steps``      hooks before and after every optimizer step
``masking``    weights and gradients outside the support are zero
``store``      the dense weights behind a sparse view
``reset``      optimizer state is cleared where weights come back
``kept_steps`` the optimizer steps only the kept elements of large weights
``twin``       the dense network at the end of the last dense phase
=============  ===================================================================
"""
