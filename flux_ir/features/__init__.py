"""What the features of a trained autoencoder mean. Read `folder` first, then `scores`, which fills it."""
