"""How good an autoencoder is: numbers on unseen tokens, baselines, and the model with it in the stream's place."""
