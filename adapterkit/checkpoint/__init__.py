"""Checkpoints: lazy mappings of tensor handles, views over them, and the sink that writes them."""
