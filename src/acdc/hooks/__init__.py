"""What the sparsifier does to a model and an optimizer, a part in each file.

=============== ===================================================================
``attach``      models and optimizers that cannot be trained sparsely are refused
``optimizers``  one or several optimizers as one, seen through wrappers
``binding``     one model, its weights and its optimizers belong to one sparsifier
``watch``       an optimizer whose steps are not seen is noticed
``steps``       hooks before and after every optimizer step
``masking``     weights and gradients outside the support are zero
``flat``        zeros in all weights of a GPU by one launch; ``flat_kernel`` is its kernel
``store``       the dense weights behind a sparse view
``fresh``       what the state of a fresh optimizer is, found out by a trial
``reset``       optimizer state is made fresh where weights come back
``kept_steps``  only the kept elements of large weights are stepped
``kept_weight`` a large weight, and its state, as vectors of kept elements
``kept_rules``  SGD, Adam and AdamW on kept elements, in one pass over memory
``mean``        the mean of the network over some steps, which takes its place later
``rescale``     outputs of layers under BatchNorm are multiplied by factors
``mirror``      weights are multiplied by a factor after each step (HAM)
``rows``        gradients of the rows of sparse layers are scaled (SparseOpt)
``twin``        the dense network at the end of the last dense phase
=============== ===================================================================
"""
