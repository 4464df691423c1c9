"""The crosscoder: model, losses, trainer, checkpoint, metrics."""
