"""The offline demonstration: a corpus and tiny models with planted differences."""
