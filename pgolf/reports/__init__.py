"""Tables, figures and pages over all runs."""
