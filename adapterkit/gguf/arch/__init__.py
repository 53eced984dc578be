"""Architectures as rows of tables: names, index maps, metadata, both ways between Hugging Face folders and GGUF."""
