"""One run = one directory."""
