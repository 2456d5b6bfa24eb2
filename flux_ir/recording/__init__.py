"""Recording what a transformer computes: `recorder` listens, `store` writes and reads the file."""
