"""The transformer of FLUX.1: attention, blocks, and the for-loop over them."""
