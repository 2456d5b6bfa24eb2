"""Autoencoders on disk: ours, which are those of sae-lens, other programs' by their names, and the hub."""
