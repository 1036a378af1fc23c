"""Searches over knobs under a byte cap: search files, the Optuna study they share, and the trainings that answer it."""
