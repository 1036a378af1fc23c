"""Menus of the explore notebook: a run, a cap and a quantizer, without editing a cell.

Without ipywidgets (the extra `lab`), and in a sweep, nothing is displayed and the first choices stand.
"""

from importlib.util import find_spec

import pandas as pd
from IPython.display import HTML, clear_output, display

from pgolf.analysis import frontier
from pgolf.analysis.statistics import compare_blocks
from pgolf.processes import interactive
from pgolf.reports import figures, hover, text
from pgolf.reports.labels import printable
from pgolf.runs import directory
from pgolf.runs.table import load_runs
from pgolf.studies.finished_run import open_run

ANS = dict(codec="ans")
QUANTIZERS = {  # text in the menu: export knobs
    "absmax, 6 bits": dict(weight_quantization_bits=6),
    "absmax, 8 bits, zlib (the reference's format)": frontier.INT8_ZLIB_BASELINE,
    "steps of 0.4 σ, ANS": dict(quantizer="step:0.4", allocation="fixed", **ANS),
    "steps of 0.4 σ, GPTQ, ANS": dict(quantizer="step:0.4", allocation="fixed", gptq=True, **ANS),
    "ternary, ANS": dict(quantizer="ternary", allocation="fixed", **ANS),
    "solver, as many bytes as the cap, ANS": dict(allocation="solve", **ANS),
}


class Menu:
    """The run, cap and quantizer that were picked; displays menus and a button that stores the run so."""

    def __init__(self, runs: pd.DataFrame, chosen: pd.Series):
        """runs: of load_runs. chosen: one of its rows, the first choice."""
        trained = runs[(runs.status == "complete") & (runs.kind == "train") & runs.bpb.notna()]
        self.runs = {f"{printable(f'{row.sweep}/{row.run}')}, {row.bpb:.4f} bpb": row for _, row in trained.iterrows()}
        self.chosen, self.cap, self.quantizer = chosen, int(chosen.cap_bytes), next(iter(QUANTIZERS))
        if find_spec("ipywidgets") and interactive():
            self._display()

    @property
    def knobs(self) -> dict:
        """Export knobs of the quantizer and the cap; the run's own cap is left out."""
        cap = {} if self.cap == self.chosen.cap_bytes else {"cap_bytes": self.cap}
        return QUANTIZERS[self.quantizer] | cap

    def store(self) -> None:
        """Store the chosen run's weights by the knobs, say what became of them, and draw all its files."""
        try:
            run = open_run(self.chosen.path)
            result, own = run.export(**self.knobs), run.result
        except Exception as error:
            if not type(error).__module__.startswith(("pgolf.", "pgolf_core.")):  # those are for users
                raise
            print(error)
            return
        print(f"its own file: {text.answer(own)}\nstored so:    {text.answer(result)}")
        if own.scored_text == result.scored_text and own.protocol == result.protocol:
            found = compare_blocks(result.roundtrip_block_nats, own.roundtrip_block_nats, result.roundtrip_bytes)
            print(f"against it:   {found.delta:+.4f} ± {found.half:.4f} bpb, {found.verdict}")
        groups = [
            group
            for _, group in frontier.comparison_groups(load_runs(directory.RUNS))
            if (group.path == self.chosen.path).any()
        ]
        for _, sha256, rows in frontier.checkpoints(groups[0]) if groups else ():
            if sha256 == self.chosen.checkpoint_sha256:
                display(HTML(hover.drawn(figures.plot_exports(rows), hover.of_exports(rows))))

    def _display(self) -> None:
        import ipywidgets

        look = dict(style={"description_width": "90px"}, layout={"width": "620px"})
        first = next(name for name, row in self.runs.items() if row.path == self.chosen.path)
        run = ipywidgets.Dropdown(options=list(self.runs), value=first, description="run", **look)
        cap = ipywidgets.BoundedIntText(self.cap, min=1, max=10**9, step=10_000, description="cap (bytes)", **look)
        quantizer = ipywidgets.Dropdown(options=list(QUANTIZERS), description="quantizer", **look)
        button, output = ipywidgets.Button(description="Store it so", icon="save"), ipywidgets.Output()

        def picked(change) -> None:
            self.chosen = self.runs[run.value]
            if change.owner is run:
                cap.value = int(self.chosen.cap_bytes)
            self.cap, self.quantizer = cap.value, quantizer.value

        def pressed(_) -> None:
            button.disabled = True
            with output:
                clear_output(wait=True)
                print("storing and scoring …")
                clear_output(wait=True)
                self.store()
            button.disabled = False

        for menu in (run, cap, quantizer):
            menu.observe(picked, "value")
        button.on_click(pressed)
        display(ipywidgets.VBox([run, cap, quantizer, button, output]))
