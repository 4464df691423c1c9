"""What each latent is: latent scaling, classes, examples."""
