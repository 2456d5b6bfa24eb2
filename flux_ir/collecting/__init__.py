"""Activations by the million: thousands of prompts, any number of processes, nothing computed twice."""
