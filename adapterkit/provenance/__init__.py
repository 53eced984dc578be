"""Where an output came from: its record, its provenance statement, its signature, its registration."""
