"""What a transformer computes: `recorder` listens, `intervention` changes, `writer` and `reader` have the file."""
