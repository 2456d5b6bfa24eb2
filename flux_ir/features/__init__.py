"""What the features of a trained autoencoder mean. Read `folder` first, then `scoring` and `scores`, which fill it."""
