"""The transformer of FLUX.2: its blocks, and the for-loop over them."""
