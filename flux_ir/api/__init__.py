"""The public functions: one file for each piece of work, with plain arguments, and nothing printed."""
