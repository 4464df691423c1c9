"""Sparse crosscoder ops, each with a plain-torch reference. Imported as fastdiff.kernels."""
