"""Figures as PNG files. `figure`: the one look of all, and axes; `charts` and `grids`: what several rooms draw."""
