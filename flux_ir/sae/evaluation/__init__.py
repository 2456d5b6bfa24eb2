"""How good an autoencoder is: numbers on unseen tokens, baselines, and the model run with its reconstructions."""
