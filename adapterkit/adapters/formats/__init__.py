"""Adapter files other than PEFT's, read into the same `Adapter` and written from it."""
