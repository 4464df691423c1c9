"""Find what fine-tuning changed inside a language model. Importing this imports no torch."""

__version__ = "0.1.0"
