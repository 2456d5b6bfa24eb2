"""The six kinds of sparse autoencoders: what each computes and what it minimises.

Read `config`, what one is, and `sparse_autoencoder`, what all share; then a file per kind; `losses` has the terms and
`make` the beginning.
"""
