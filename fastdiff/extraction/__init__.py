"""Text through two or more language models, into an activation store."""
