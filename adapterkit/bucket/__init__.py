"""Versions of the registry in a bucket of an object store: push and pull."""
