"""Language models opened again after extraction: cut in halves at a layer, and patched there."""
