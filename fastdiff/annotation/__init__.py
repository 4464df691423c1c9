"""What each latent means: a label and a category from a taxonomy."""
