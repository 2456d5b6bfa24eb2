"""The arithmetic of sparse autoencoders.

Of those whose codes have k entries a token: `reference`, as the papers write it; `cpu` and `gpu`, the same numbers
without dense codes; `choose`, which takes one of the three. Where codes are dense: `products`.
"""
