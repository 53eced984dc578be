"""The registry: what an adapter is, where it came from, and everything made from it.

Truth is in files under one home folder; the index beside them can be thrown away. Nothing here imports torch, numpy or
huggingface_hub. ``verbs`` holds one function per command; the other modules hold one idea each.
"""
