"""What the features of a trained autoencoder mean."""
