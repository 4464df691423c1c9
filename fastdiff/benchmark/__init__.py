"""How fast a training step is on this machine, and what the machine would allow."""
