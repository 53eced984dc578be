"""Towers for images and sounds beside a language model, as llama.cpp stores them (mmproj)."""
