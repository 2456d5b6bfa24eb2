"""Tokens to train on: which of them, in which order, and mixed.

Read in this order: `filters` and `splits`, which tokens; `feed`, blocks of them in an order the seed
sets; `batches`, the shuffle buffer and its state; `measure` and `held_out`, who else reads them.
"""
