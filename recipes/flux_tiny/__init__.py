"""How flux-tiny, the model in the package, was made. `train` is where to begin. It needs a checkout, and time."""
