"""A small synthetic web with known truth: the embedded default."""
