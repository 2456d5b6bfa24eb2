"""Sparse autoencoders: six architectures, their data, training, files and measures. Start at `architectures`."""
