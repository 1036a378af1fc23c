"""Parts of the model, one idea per file."""
