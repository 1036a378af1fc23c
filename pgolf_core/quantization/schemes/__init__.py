"""One scheme per file, named by its word; pgolf_core/scheme.py says what a file holds."""
