"""Recording what a transformer computes: `recorder` listens, `store` writes the file and reads it again."""
