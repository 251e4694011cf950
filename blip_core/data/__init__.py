"""URL tables, shards, images and training streams."""
