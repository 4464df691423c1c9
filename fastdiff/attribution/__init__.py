"""How much of what each model gained or lost on a text runs through which latent: signed nats."""
