"""Activations that are stored or made as they are read, as rows of tokens: what a dictionary trains on."""
