"""What a choice does to a model that was trained for it."""
