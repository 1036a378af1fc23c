"""A run from its knobs to result.json."""
