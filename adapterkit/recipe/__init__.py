"""`build`: the whole road from a base and adapters to what is served, as one file."""
