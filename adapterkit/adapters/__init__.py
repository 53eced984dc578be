"""An adapter: formats, methods, and the targets that its modules land on."""
