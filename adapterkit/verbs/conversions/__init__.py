"""Conversions: one file for each format that `convert` writes, and a row for each in the table of formats."""
