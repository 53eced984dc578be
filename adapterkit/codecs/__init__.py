"""Stored weight formats: one file each, how it is detected, and how rows are decoded and encoded."""
