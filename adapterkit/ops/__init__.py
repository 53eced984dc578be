"""Pure tensor maths: no names, no files, no transformers."""
