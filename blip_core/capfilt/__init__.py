"""Captioner, Filter, and both over one shard."""
