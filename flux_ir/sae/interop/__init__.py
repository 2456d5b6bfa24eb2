"""Autoencoders of other programs: their files to ours, ours to theirs. sae-lens needs nothing: its files are ours."""
