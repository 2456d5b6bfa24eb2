"""flux_ir: an instrument for looking inside FLUX.1."""

__version__ = "0.1.0"
