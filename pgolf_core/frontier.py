"""Pareto front, comparability, noise; the plots and the report.

Everything here reads the table of `runs.load`. Figures of runs that were not scored on the same text in the same
way are never set against each other: `comparable` splits the table into panels, and the rest refuses a mixture.
"""

import os
import tempfile
import time
from collections import namedtuple
from pathlib import Path
from urllib.parse import quote

import nbformat
import numpy as np
import pandas as pd
from pandas.io.formats.style import Styler

from pgolf_core import runs
from pgolf_core.config import ROOT, RunConfig
from pgolf_core.files import write_whole
from pgolf_core.slot import run_alone

REPORTS = ROOT / "reports"
NOTEBOOK = ROOT / "notebooks" / "report_frontier.ipynb"


class ReportError(RuntimeError):
    """A report that could not be drawn; the message says why."""


Panel = namedtuple("Panel", runs.COMPARABLE)  # what two scores must share to be set against each other


def scored(table: pd.DataFrame) -> pd.DataFrame:
    """Complete runs that have a round-trip score and a size, as numbers."""
    numbers = {name: pd.to_numeric(table[name], errors="coerce").astype(float) for name in ("bpb", "total_bytes")}
    table = table.assign(**numbers, over_cap=table.over_cap.eq(True))
    return table[(table.status == "complete") & table.bpb.notna() & table.total_bytes.notna()]


def comparable(table: pd.DataFrame) -> list[tuple[Panel, pd.DataFrame]]:
    """Scored runs by what makes their scores comparable, the panel of most runs first."""
    groups = scored(table).groupby(list(Panel._fields), dropna=False, sort=True)
    panels = [(Panel(*key), group) for key, group in groups]
    return sorted(panels, key=lambda panel: -len(panel[1]))


def panel_title(key: Panel) -> str:
    return (
        f"{key.roundtrip_tokens:,.0f} tokens = {key.roundtrip_bytes:,.0f} bytes of val text, {key.protocol}, "
        f"data {str(key.data_fingerprint)[:8]}"
    )


def pareto(table: pd.DataFrame) -> np.ndarray:
    """Bool a row: fits its cap, and no fitting run has as few bytes and as low a bpb, one of them strictly.

    Runs over their cap neither stand on the front nor push others off it. Runs equal in both stand together.
    """
    size, bpb = table.total_bytes.to_numpy(float), table.bpb.to_numpy(float)
    rows = np.flatnonzero(~table.over_cap.eq(True).to_numpy() & ~np.isnan(size) & ~np.isnan(bpb))
    rows = rows[np.lexsort((bpb[rows], size[rows]))]
    # Sorted by bytes: a run is on the front when no smaller one has its bpb, and it is the best of its own size.
    first = np.searchsorted(size[rows], size[rows])  # of this size; the best of them by the second key
    lowest = np.minimum.accumulate(np.concatenate([[np.inf], bpb[rows]]))  # before each place
    front = np.zeros(len(table), bool)
    front[rows] = (bpb[rows] < lowest[first]) & (bpb[rows] == bpb[rows][first])
    return front


def noise(table: pd.DataFrame) -> pd.DataFrame:
    """Runs that differ in nothing but their seed, a row a set: run (one of them), n, lowest, highest, spread of bpb."""
    knobs = [name for name in RunConfig.model_fields if name != "seed"]
    same = [*Panel._fields, "kind", *knobs]
    rows = []
    for _, group in table.groupby(pd.util.hash_pandas_object(table[same].astype(str), index=False)):
        if (n := group.seed.nunique()) > 1:
            rows.append((group.run.iloc[0], n, group.bpb.min(), group.bpb.max(), group.bpb.max() - group.bpb.min()))
    table = pd.DataFrame(rows, columns=["run", "n", "lowest", "highest", "spread"])
    return table.astype({"spread": float})


def frontier_table(table: pd.DataFrame) -> pd.DataFrame:
    """One panel's runs, controls first, then by bpb. Raises ValueError on runs that are not comparable.

    headroom is cap − total bytes; delta_bpb is against the run's control (column `control` of runs.load);
    quantisation_bpb is what the round trip lost against the raw weights on the same tokens.
    """
    panels = comparable(table)
    if len(panels) > 1:
        raise ValueError(f"these runs are not comparable: {'; '.join(panel_title(key) for key, _ in panels)}")
    table = scored(table)
    is_control = table.run == table.control
    controls = table[is_control].set_index(["sweep", "run"]).bpb
    of_control = controls.reindex(pd.MultiIndex.from_frame(table[["sweep", "control"]])).to_numpy(float)
    columns = {
        "sweep": table.sweep,
        "run": table.run,
        "kind": table.kind,
        "bpb": table.bpb,
        "total_bytes": table.total_bytes.astype("int64"),
        "headroom": (table.cap_bytes.astype(float) - table.total_bytes).astype("int64"),
        "delta_bpb": table.bpb - of_control,
        "quantisation_bpb": table.bpb - table.prequant_val_bpb.astype(float),
        "parameters": table.parameters,
        "steps": table.steps,
        "train_seconds": table.train_seconds.astype(float),
        "on_front": pareto(table),
        "over_cap": table.over_cap,
        "source": table.source,
        "is_control": is_control,
    }
    order = np.lexsort((table.bpb, ~is_control))
    return pd.DataFrame(columns).iloc[order]


def not_counted(table: pd.DataFrame) -> pd.DataFrame:
    """Every run that no frontier counts: sweep, run, and why in words. Stages have tables, not scores: left out."""
    rows = []
    for run in table[~table.index.isin(scored(table).index)].itertuples():
        match run.status:
            case "incomplete":
                steps = runs.metrics(run.path).get("step", pd.Series(dtype=float)).max()
                where = "no step logged" if pd.isna(steps) else f"last step {steps:.0f} of {run.iterations:.0f}"
                why = f"incomplete, {where}"
            case "failed":
                why = f"failed: {run.problem}"
            case "damaged":
                why = f"damaged: {run.problem} cannot be read"
            case _ if run.table:
                continue
            case _:
                why = "complete, but without a round-trip score (final_roundtrip_eval=0)"
        rows.append((run.sweep, run.run, why))
    return pd.DataFrame(rows, columns=["sweep", "run", "why"])


def in_words(rows: pd.DataFrame, spread: float = 0.0) -> pd.DataFrame:
    """frontier_table for the reader: every figure as text with its unit in the heading, and a note.

    spread: bpb that seeds alone move; trained runs that differ less from the control are noted.
    """
    notes = []
    for row in rows.itertuples():
        words = ["control"] if row.is_control else []
        words += ["on the front"] if row.on_front else []
        words += ["over cap"] if row.over_cap else []
        # An export shares its source's training, so the seed is no part of how they differ.
        chance = row.kind == "train" and not row.is_control and abs(row.delta_bpb) <= spread
        words += ["within noise"] if chance else []
        notes.append(", ".join(words))

    def figures(name: str, form: str) -> list[str]:
        return ["–" if pd.isna(value) else format(round(value, 4) + 0.0, form) for value in rows[name]]  # no −0.0000

    return pd.DataFrame(
        {
            "run": names_of(rows),
            "kind": rows.kind.to_numpy(),
            "bpb": figures("bpb", ".4f"),
            "Δ control": figures("delta_bpb", "+.4f"),
            "quantised": figures("quantisation_bpb", "+.4f"),
            "total bytes": figures("total_bytes", ",.0f"),
            "left to cap": figures("headroom", ",.0f"),
            "parameters": figures("parameters", ",.0f"),
            "steps": figures("steps", ",.0f"),
            "train s": figures("train_seconds", ",.0f"),
            "note": notes,
        }
    )


def styled(text: pd.DataFrame) -> Styler:
    """The table of in_words for a notebook or page: words to the left, the front in bold."""
    left = [i for i, name in enumerate(text) if name in ("run", "kind", "note")]
    bold = text.note.str.contains("on the front").map({True: "font-weight: 600", False: ""})
    return (
        text.reset_index(drop=True)
        .style.hide(axis="index")
        .apply(lambda column: bold.to_list())
        .set_properties(subset=text.columns[left], **{"text-align": "left"})
        .set_properties(subset=["run"], **{"white-space": "normal", "overflow-wrap": "anywhere"})
        .set_table_styles([{"selector": f"th.col{i}", "props": "text-align: left"} for i in left])
    )


def href(path: str | Path, out: str | Path) -> str:
    """Link to a file from a page in out; relative, unless they lie on two drives."""
    path, out = Path(path).resolve(), Path(out).resolve()
    return quote(Path(os.path.relpath(path, out)).as_posix()) if path.drive == out.drive else path.as_uri()


def fold(rows: pd.DataFrame, best: int) -> pd.DataFrame:
    """Of many rows of a frontier_table the front, the controls, the best that fit and three over cap."""
    place = rows.bpb.groupby(rows.over_cap).rank(method="first")
    keep = rows.on_front | rows.is_control | (place <= np.where(rows.over_cap, 3, best))
    return rows[keep] if len(rows) > 2 * best else rows


def summary(table: pd.DataFrame, best: int = 20) -> str:
    """All runs for a terminal, a block a panel: control first, then by bpb, * on the front."""
    blocks = []
    for key, panel in comparable(table):
        rows = frontier_table(panel)
        shown = fold(rows, best)
        twins = shown.groupby(["kind", "bpb", "total_bytes"]).run  # exports that chose the same residuals
        shown = shown.assign(run=shown.run + twins.transform("size").map(lambda n: f" +{n - 1} alike" if n > 1 else ""))
        hidden = len(rows) - len(shown)
        shown = shown[twins.cumcount() == 0]
        text = in_words(shown, noise(panel).spread.max()).drop(columns=["parameters", "steps", "train s"])
        text["run"] = np.where(shown.on_front, "* ", "  ") + text.run.to_numpy(object)
        for name in ("run", "kind", "note"):
            text[name] = text[name].str.ljust(text[name].str.len().max())
        text.columns = [name.ljust(len(text[name].iloc[0])) if name in ("run", "kind") else name for name in text]
        block = f"{panel_title(key)}\n{text.to_string(index=False)}"
        if hidden:
            block += f"\n  and {hidden:,} more off the front"
        blocks.append(block)
    left_out = not_counted(table)
    if len(left_out):
        lines = [f"  {name}  {why}" for name, why in zip(names_of(left_out)[:best], left_out.why, strict=False)]
        lines += [f"  and {len(left_out) - best:,} more"] if len(left_out) > best else []
        blocks.append("not complete: counted nowhere\n" + "\n".join(lines))
    return "\n\n".join(blocks) or "no runs yet"


def export_sources(table: pd.DataFrame) -> list[str]:
    """Runs of this panel ('sweep/run' of their directory) that have two or more exports in it, most first."""
    counts = table[table.kind == "export"].source.value_counts()
    return [source for source in counts[counts > 1].index if (places_of(table) == source).any()]


def places_of(table: pd.DataFrame) -> pd.Series:
    return table.path.map(lambda path: f"{Path(path).parent.name}/{Path(path).name}")


def names_of(rows: pd.DataFrame) -> list[str]:
    """Run names; with the sweep where there are several."""
    if rows.sweep.nunique() < 2:
        return list(rows.run)
    return [f"{sweep}/{run}" if sweep else run for sweep, run in zip(rows.sweep, rows.run, strict=True)]


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Frontier report</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1180px; margin: 2em auto; padding: 0 1.5em; }}
h1 {{ font-size: 1.7em; }} h2 {{ font-size: 1.25em; margin-top: 2.2em; }} h3 {{ font-size: 1em; margin-top: 1.8em; }}
img {{ max-width: 100%; height: auto; }} a.anchor-link {{ display: none; }} a {{ color: #0072B2; }}
.output_subarea {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 12.5px; font-variant-numeric: tabular-nums; margin: 1em 0; }}
th, td {{ padding: 3px 9px; text-align: right; border: 0; white-space: nowrap; }}
thead th {{ border-bottom: 1px solid #888; }} tbody tr:nth-child(even) {{ background: #f5f5f5; }}
.text {{ text-align: left; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def write_report(root: str | Path = runs.RUNS, out: str | Path = REPORTS) -> Path:
    """Execute notebooks/report_frontier.ipynb over the runs below root; out/frontier.html, figures/, tables/.

    The page needs no network. Every file takes its place whole; figures of a former frontier report that this
    one does not have are removed. Raises ReportError naming what failed.
    """
    from nbconvert import HTMLExporter  # loads slowly, and only the report needs it

    root, out = Path(root).resolve(), Path(out).resolve()
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        executed = Path(folder) / "report.ipynb"
        if reason := run_alone(NOTEBOOK, executed, {"root": str(root), "out": str(out)}):
            raise ReportError(f"{NOTEBOOK.name}: {reason}")
        notebook = nbformat.read(executed, as_version=4)
    exporter = HTMLExporter(template_name="basic", exclude_input=True, exclude_output_prompt=True)
    body, _ = exporter.from_notebook_node(notebook)
    for figure in (out / "figures").glob("frontier_*.png"):
        if figure.stat().st_mtime < start - 2:  # file systems round times
            figure.unlink()
    return write_whole(out / "frontier.html", PAGE.format(body=body))
