"""A run, checked and packed for others."""
