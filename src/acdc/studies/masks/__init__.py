"""How the support of a run changes from one compression to the next."""
