"""The networks: transformer, autoencoder, text encoders; which checkpoints exist, and where each part of one runs.

Start at `suite`, a whole model: `registry` has its facts, `checkpoints` finds and loads its files, `placement` and
`compute_dtype` say where and in which precision it runs.
"""
