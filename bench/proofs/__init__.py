"""Whether it holds, over everything that the installed libraries have."""
