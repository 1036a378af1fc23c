"""One scheme per file, named by its word; pgolf_core/scheme.py says what a file holds.

The files here import torch when they fit, not when they are loaded: every config is parsed by them.
"""

from pgolf_core.scheme import QuantScheme


class GridScheme(QuantScheme):
    """A scheme that is a grid; only `grid(w, context) -> Grid` is left to define."""

    stored = "int"
    uses_gptq = True

    def fit(self, w, context):
        return self.grid(w, context).round(w, context.factor, context.gptq_block)
