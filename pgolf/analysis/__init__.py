"""Runs compared: statistics, the frontier, config diffs, the logs of others."""
