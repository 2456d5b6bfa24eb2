"""Recording what a transformer computes: `recorder` listens, `store` writes the file, `tokens` reads many of them."""
