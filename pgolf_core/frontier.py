"""Pareto front, comparability, noise; the plots and the report.

Everything here reads the table of `runs.load`. Figures of runs that were not scored on the same text in the same
way are never set against each other: `comparable` splits the table into panels, and the rest refuses a mixture.
"""

import os
import tempfile
import time
from collections import namedtuple
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote

import nbformat
import numpy as np
import pandas as pd
from pandas.io.formats.style import Styler

from pgolf_core import runs
from pgolf_core.config import ROOT, ExportConfig, RunConfig
from pgolf_core.files import write_whole
from pgolf_core.lab import PLAIN
from pgolf_core.slot import run_alone

REPORTS = ROOT / "reports"
PAGES = {"frontier": "The frontier", "export": "Exports of each checkpoint"}  # notebooks/report_<page>.ipynb


WORDS = ("run", "kind", "note", "file", "at most", "the solver", "best of the others", "tensor")  # left-aligned


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

    return pd.DataFrame(
        {
            "run": names_of(rows),
            "kind": rows.kind.to_numpy(),
            "bpb": _figures(rows.bpb, ".4f"),
            "Δ control": _figures(rows.delta_bpb, "+z.4f"),
            "quantised": _figures(rows.quantisation_bpb, "+z.4f"),
            "total bytes": _figures(rows.total_bytes, ",.0f"),
            "left to cap": _figures(rows.headroom, ",.0f"),
            "parameters": _figures(rows.parameters, ",.0f"),
            "steps": _figures(rows.steps, ",.0f"),
            "train s": _figures(rows.train_seconds, ",.0f"),
            "note": notes,
        }
    )


def styled(text: pd.DataFrame) -> Styler:
    """A table in words for a notebook or page: words to the left, what is on the front in bold."""
    left = [i for i, name in enumerate(text) if name in WORDS]
    notes = text.get("note", pd.Series("", index=text.index))
    bold = notes.str.contains("on the front").map({True: "font-weight: 600", False: ""})
    return (
        text.reset_index(drop=True)
        .style.hide(axis="index")
        .apply(lambda column: bold.to_list())
        .set_properties(subset=text.columns[left], **{"text-align": "left"})
        .set_properties(
            subset=[name for name in text if name == "run"], **{"white-space": "normal", "overflow-wrap": "anywhere"}
        )
        .set_table_styles([{"selector": f"th.col{i}", "props": "text-align: left"} for i in left])
    )


def href(path: str | Path, out: str | Path) -> str:
    """Link to a file from a page in out; relative, unless they lie on two drives."""
    path, out = Path(path).resolve(), Path(out).resolve()
    return quote(Path(os.path.relpath(path, out)).as_posix()) if path.drive == out.drive else path.as_uri()


def fold(rows: pd.DataFrame, best: int) -> pd.DataFrame:
    """Of many rows of a frontier_table the front, the controls, the best that fit and three over cap.

    Of a checkpoint's exports, which may be dozens, only a few of the front: the export report has them all.
    """
    if len(rows) <= 2 * best:
        return rows
    trained = rows[rows.kind != "export"]
    place = trained.bpb.groupby(trained.over_cap).rank(method="first")
    keep = trained[trained.on_front | trained.is_control | (place <= np.where(trained.over_cap, 3, best))].index
    front = rows[(rows.kind == "export") & rows.on_front].drop_duplicates(["total_bytes", "bpb"])
    for _, exports in front.sort_values("total_bytes").groupby("source", dropna=False):
        keep = keep.append(exports.index[np.unique(np.linspace(0, len(exports) - 1, 5).round().astype(int))])
    return rows[rows.index.isin(keep)]


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


def checkpoints(table: pd.DataFrame) -> list[tuple[str, str, pd.DataFrame]]:
    """This panel's checkpoints that were exported in other ways: 'sweep/run', sha256, exports(); most files first.

    A checkpoint is a run and the weights it had: trained again, it is another.
    """
    knobs = {name: RunConfig.model_fields[name].default for name in ExportConfig.model_fields}
    known = table[[*knobs]].astype(object).fillna(knobs)  # of runs older than a knob: what it does at its default
    variants = pd.DataFrame(
        {
            "variant": table.run.str.split("/").str[-1].where(table.kind == "export", "as trained"),
            "bpb": table.bpb,
            "total_bytes": table.total_bytes.astype("int64"),
            "raw_bpb": table.prequant_val_bpb.astype(float),
            "bytes": table.bytes,
            "knobs": known.to_dict("records"),
            "path": table.path,
        },
        index=table.index,
    )
    source = table.source.where(table.kind == "export", places_of(table))
    groups = variants.groupby([source, table.checkpoint_sha256], dropna=False)
    found = [(*key, exports(rows)) for key, rows in groups if (table.kind[rows.index] == "export").any()]
    return sorted(found, key=lambda checkpoint: -len(checkpoint[2]))


def exports(variants: pd.DataFrame) -> pd.DataFrame:
    """Files of one checkpoint, smallest first, equal ones once. variants: columns as the rows of lab.export_lab.

    delta_raw: bpb lost against the raw weights; delta_plain, share: against the seed's int8 under zlib, NaN where
    that is not among them; on_front: no file here is as small and as good; fixed_front: of all but the solver's.
    """
    rows = variants.assign(family=variants.knobs.map(family), delta_raw=variants.bpb - variants.raw_bpb)
    plain = rows[rows.knobs.map(lambda knobs: PLAIN.items() <= knobs.items())]
    bpb, size = plain.nlargest(1, "total_bytes")[["bpb", "total_bytes"]].iloc[0] if len(plain) else (np.nan, np.nan)
    rows = rows.assign(delta_plain=rows.bpb - bpb, share=rows.total_bytes / size)
    rows = rows.sort_values(["total_bytes", "bpb"], kind="stable").drop_duplicates(["total_bytes", "bpb"])
    on_front = pareto(rows.assign(over_cap=False))
    fixed_front = pareto(rows.assign(over_cap=rows.family == "solver"))
    return rows.assign(on_front=on_front, fixed_front=fixed_front).reset_index(drop=True)


def family(knobs: dict) -> str:
    """How an export was made, in a word or two."""
    kind, *rest = knobs["quantizer"].split(":")
    if knobs["allocation"] == "solve":
        return "solver"
    if knobs["int8_residual_rank"] and knobs["int8_residual_budget_bytes"]:
        rank_one = knobs["int8_residual_rank"] == 1 and knobs.get("int8_residual_bits", 16) == 16
        return "rank-1 residual" if rank_one else "LQER"
    if kind in ("step", "absmax") and knobs["gptq"]:
        return "GPTQ, Fisher steps" if "fisher" in rest else "GPTQ"
    return {"step": "Fisher steps" if "fisher" in rest else "σ-tied steps", "absmax": "absmax"}.get(kind, kind)


def within(rows: pd.DataFrame, shares: Iterable[float] = (1.0, 0.8, 0.6, 0.4)) -> pd.DataFrame:
    """The solver against all others: a row a share of the seed's bytes, the best of both of no more bytes.

    rows: of exports(). Columns share, limit (bytes); solver, solver_bpb, solver_bytes, the same of fixed; delta_bpb
    (solver − fixed). No rows where the seed's file is not among them.
    """
    plain = (rows.total_bytes / rows.share).dropna().round()
    table = []
    for share in shares if len(plain) else ():
        row = {"share": share, "limit": int(share * plain.iloc[0])}
        fitting = rows[rows.total_bytes <= row["limit"]]
        for who, some in fitting.groupby(fitting.family.eq("solver").map({True: "solver", False: "fixed"})):
            best = some.loc[some.bpb.idxmin()]
            row |= {who: best.variant, f"{who}_bpb": best.bpb, f"{who}_bytes": best.total_bytes}
        table.append(row)
    columns = [f"{who}{figure}" for who in ("solver", "fixed") for figure in ("", "_bpb", "_bytes")]
    table = pd.DataFrame(table, columns=["share", "limit", *columns])
    return table.assign(delta_bpb=table.solver_bpb - table.fixed_bpb)


def exports_in_words(rows: pd.DataFrame) -> pd.DataFrame:
    """exports() for the reader, as in_words."""
    return pd.DataFrame(
        {
            "file": rows.variant,
            "kind": rows.family,
            "bpb": [f"{bpb:.5f}" for bpb in rows.bpb],
            "Δ raw": _figures(1e3 * rows.delta_raw, "+z.2f"),
            "Δ plain": _figures(1e3 * rows.delta_plain, "+z.2f"),
            "total bytes": _figures(rows.total_bytes, ",.0f"),
            "of plain": _figures(rows.share, ".1%"),
            "note": np.select([rows.on_front, rows.fixed_front], ["on the front", "behind the solver's alone"], ""),
        }
    )


def within_in_words(rows: pd.DataFrame) -> pd.DataFrame:
    """within() for the reader; a missing file is –."""
    words = {"at most": [f"{row.share:.0%} = {row.limit:,} B" for row in rows.itertuples()]}
    for who, heading in (("solver", "the solver"), ("fixed", "best of the others")):
        sizes = _figures(rows[f"{who}_bytes"], ",.0f")
        names = rows[who].fillna("–")
        words[heading] = [f"{name}, {size} B" if size != "–" else "–" for name, size in zip(names, sizes, strict=True)]
        words[f"{who}: bpb"] = _figures(rows[f"{who}_bpb"], ".5f")
    return pd.DataFrame(words | {"solver − others (milli-bpb)": _figures(1e3 * rows.delta_bpb, "+z.2f")})


def sensitivity_in_words(rows: pd.DataFrame) -> pd.DataFrame:
    """map_sensitivity's rows for the reader, tensors where a byte is worth most first."""
    rows = rows[rows.tensor != ""].sort_values("bpb_per_kb", ascending=False)
    return pd.DataFrame(
        {
            "tensor": rows.tensor,
            "rise (milli-bpb)": _figures(1e3 * rows.delta_bpb, "+z.3f"),
            "estimated": _figures(1e3 * rows.estimated_delta_bpb, "+z.3f"),
            "its bytes, coded": _figures(rows.tensor_bytes, ",.0f"),
            "change of the file (B)": _figures(rows.delta_bytes, "+,.0f"),
            "worth (milli-bpb a 1,000 B)": _figures(1e3 * rows.bpb_per_kb, "+z.4f"),
        }
    )


def _figures(values: Iterable[float], form: str) -> list[str]:
    """Numbers as text, – where there is none."""
    return ["–" if pd.isna(value) else format(value, form) for value in values]


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
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1180px; margin: 2em auto; padding: 0 1.5em; }}
h1 {{ font-size: 1.7em; }} h2 {{ font-size: 1.25em; margin-top: 2.2em; }} h3 {{ font-size: 1em; margin-top: 1.8em; }}
nav {{ font-size: 13px; color: #666; }}
img {{ max-width: 100%; height: auto; }} a.anchor-link {{ display: none; }} a {{ color: #0072B2; }}
.output_subarea {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 12.5px; font-variant-numeric: tabular-nums; margin: 1em 0; }}
th, td {{ padding: 3px 9px; text-align: right; border: 0; white-space: nowrap; }}
thead th {{ border-bottom: 1px solid #888; }} tbody tr:nth-child(even) {{ background: #f5f5f5; }}
.text {{ text-align: left; }}
</style>
</head>
<body>
<nav>{nav}</nav>
{body}
</body>
</html>
"""


def write_reports(root: str | Path = runs.RUNS, out: str | Path = REPORTS) -> list[Path]:
    """Every page of PAGES, as write_report."""
    return [write_report(root, out, page) for page in PAGES]


def write_report(root: str | Path = runs.RUNS, out: str | Path = REPORTS, page: str = "frontier") -> Path:
    """Execute notebooks/report_<page>.ipynb over the runs below root; out/<page>.html, figures/, tables/.

    The page needs no network. Every file takes its place whole; figures of a former report of this name that this
    one does not have are removed. Raises ReportError naming what failed.
    """
    from nbconvert import HTMLExporter  # loads slowly, and only the reports need it

    root, out = Path(root).resolve(), Path(out).resolve()
    notebook = ROOT / "notebooks" / f"report_{page}.ipynb"
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        executed = Path(folder) / "report.ipynb"
        if reason := run_alone(notebook, executed, {"root": str(root), "out": str(out)}):
            raise ReportError(f"{notebook.name}: {reason}")
        cells = nbformat.read(executed, as_version=4)
    exporter = HTMLExporter(template_name="basic", exclude_input=True, exclude_output_prompt=True)
    body, _ = exporter.from_notebook_node(cells)
    for figure in (out / "figures").glob(f"{page}_*.png"):
        if figure.stat().st_mtime < start - 2:  # file systems round times
            figure.unlink()
    links = [title if name == page else f'<a href="{name}.html">{title}</a>' for name, title in PAGES.items()]
    return write_whole(out / f"{page}.html", PAGE.format(title=PAGES[page], nav=" · ".join(links), body=body))
