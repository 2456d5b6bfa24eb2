"""The networks: transformer, autoencoder, text encoders; which checkpoints exist, and where each part of one runs."""
