"""The arithmetic of a sparse autoencoder whose codes have k entries: one reference, a CPU path and a GPU path."""
