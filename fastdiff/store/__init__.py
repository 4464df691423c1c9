"""The activation store: an HDF5 format, its writer, its reader and the shuffled batches."""
