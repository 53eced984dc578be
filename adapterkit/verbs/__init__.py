"""The verbs as Python functions: what is asked for, planned, carried out and reported."""
