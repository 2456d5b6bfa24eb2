"""How flux-tiny was made: the scenes it was shown, its training, its evaluation. Start with `scenes`."""
