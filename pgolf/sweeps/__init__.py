"""Sweep files, and the notebooks that execute them."""
