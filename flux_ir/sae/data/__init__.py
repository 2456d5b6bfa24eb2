"""Tokens to train on: which of them, in which order, and mixed.

Read in this order: `filters` and `splits`, which tokens; `feed`, blocks of them in an order the seed sets; `batches`,
what training iterates over; `buffer`, how threads fill the shuffle buffer behind it. `measure` and `whitening` read the
data before training, `held_out` after it.
"""
