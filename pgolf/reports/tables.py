"""Tables for readers: a list of columns turns rows into text, a notebook's table.

A column is (head, source, form). source: a column of the rows; two, a value and half of its 95 % interval; or a
function of the rows that gives the values. form: a format specification, (specification, factor), a function of one
value, or "" for words, which stand left.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict

import numpy as np
import pandas as pd
from pandas.io.formats.style import Styler

from pgolf.analysis import statistics
from pgolf.reports.labels import printable
from pgolf.runs.result import Result

Column = tuple[str, str | tuple[str, str] | Callable[[pd.DataFrame], Iterable], str | tuple[str, float] | Callable]
MISSING = "–"
WIDE = 24  # characters; a column of longer words is wrapped
MILLI = (".2f", 1e3)  # bpb shown as milli-bpb


def format_table(rows: pd.DataFrame, columns: Sequence[Column]) -> pd.DataFrame:
    """The rows as text, one column per specification."""
    return pd.DataFrame({head: _format_column(rows, source, form) for head, source, form in columns})


def _format_column(rows: pd.DataFrame, source, form) -> list[str]:
    spec, factor = form if isinstance(form, tuple) else (form, 1.0)
    if isinstance(source, tuple):
        value, half = source
        return [format_interval(*pair, spec, factor) for pair in zip(rows[value], rows[half], strict=True)]
    values = source(rows) if callable(source) else rows[source]
    write = spec if callable(spec) else str if not spec else lambda value: format_number(value, spec, factor)
    return [MISSING if np.ndim(value) == 0 and pd.isna(value) else printable(write(value)) for value in values]


def format_number(value: float | None, form: str, factor: float = 1.0) -> str:
    """A number with a typographic minus; – if it is missing."""
    return MISSING if pd.isna(value) else format(factor * value, form).replace("-", "−")


def format_interval(value: float, half: float, form: str, factor: float = 1.0) -> str:
    """'+0.0031 ± 0.0012': a difference and half of its 95 % interval; ± ? if that is not known."""
    text = format_number(value, "+z" + form, factor)
    if pd.isna(value) or half == 0 or (value == 0 and pd.isna(half)):
        return text
    return f"{text} ± {'?' if pd.isna(half) else format(factor * half, form)}"


def format_range(low: float, high: float) -> str:
    """'−0.006 to −0.003'; one figure if they are equal."""
    texts = [format_number(value, "+.4g" if value else ".0f") for value in (low, high)]
    return " to ".join(dict.fromkeys(texts))


def format_verdict(row) -> str:
    """'better (paired, 5 seeds)', 'better (64 blocks)'. row: verdict and method of a statistics.Comparison."""
    if row.verdict in ("better", "worse"):
        is_text = row.method.endswith(" blocks of text")
        method = row.method.removeprefix("paired, ").removesuffix(" of text") if is_text else row.method
        return f"{row.verdict} ({method})"
    return {"not known": row.method, "equal": "equal to the last bit"}.get(row.verdict, row.verdict)


def format_seeds(seeds: list[int]) -> str:
    """'1337, 1338'; '1337 × 3' for repeats."""
    counts = pd.Series(seeds).value_counts(sort=False)
    return ", ".join(f"{seed} × {count}" if count > 1 else f"{seed}" for seed, count in counts.items())


def format_seeds_needed(seeds: float) -> str:
    """'7 seeds'; 'more than 1,000 seeds' above statistics.MAX_SEEDS."""
    return f"{seeds:.0f} seeds" if seeds <= statistics.MAX_SEEDS else f"more than {statistics.MAX_SEEDS:,} seeds"


def names_of(rows: pd.DataFrame) -> list[str]:
    """Run names; with the sweep if there are several."""
    if rows.sweep.nunique() < 2:
        return list(rows.run)
    return [f"{sweep}/{run}" if sweep else run for sweep, run in zip(rows.sweep, rows.run, strict=True)]


def notes_of(rows: pd.DataFrame) -> list[str]:
    """What a row is (baseline run, on the front, over cap), and the test's verdict on it."""
    flags = {"is_baseline": "baseline run", "on_front": "on the front", "over_cap": "over cap"}
    return [
        ", ".join([*(words for name, words in flags.items() if getattr(row, name, False)), format_verdict(row)])
        .removesuffix(", ")
        for row in rows.itertuples()
    ]  # fmt: skip


def _file(name: str, size: float) -> str:
    return MISSING if pd.isna(size) else f"{name}, {size:,.0f} B"


def _words(*heads: str) -> list[Column]:
    """Columns of text whose heads are the names of their sources."""
    return [(head, head, "") for head in heads]


NOTE, BPB4, BPB5 = ("note", notes_of, ""), ("bpb", "bpb", ".4f"), ("bpb", "bpb", ".5f")
SIZE, STEPS = ("total bytes", "total_bytes", ",.0f"), ("steps", "steps", ",.0f")
SECONDS = ("train s", "train_seconds", ",.0f")
NOT_COUNTED: list[Column] = _words("sweep", "run", "why")
FRONTIER: list[Column] = [  # rows: analysis.frontier.frontier_table
    ("run", names_of, ""), *_words("kind"), BPB4,
    ("Δ baseline", ("delta_bpb", "delta_half"), ".4f"),
    ("quantization cost", ("quantisation_bpb", "quantisation_half"), ".4f"),
    SIZE, ("left to cap", "headroom", ",.0f"), ("parameters", "parameters", ",.0f"), STEPS, SECONDS, NOTE,
]  # fmt: skip
FRONTS = ["on the front", "behind the solver's"]  # notes on files
EXPORTS: list[Column] = [  # rows: analysis.frontier.exports
    ("file", "variant", ""), ("kind", "family", ""), BPB5,
    ("Δ pre-quant", ("delta_prequant", "half_prequant"), MILLI), ("Δ int8 zlib", ("delta_int8", "half_int8"), MILLI),
    SIZE, ("of int8 zlib", "share", ".1%"),
    ("note", lambda rows: np.select([rows.on_front, rows.fixed_front], FRONTS, ""), ""),
]  # fmt: skip
WITHIN: list[Column] = [  # rows: analysis.frontier.within
    ("at most", lambda rows: [f"{row.share:.0%} = {row.limit:,} B" for row in rows.itertuples()], ""),
    ("the solver", lambda rows: map(_file, rows.solver, rows.solver_bytes), ""), ("solver: bpb", "solver_bpb", ".5f"),
    ("best of the others", lambda rows: map(_file, rows.fixed, rows.fixed_bytes), ""),
    ("fixed: bpb", "fixed_bpb", ".5f"),
    ("solver − others (milli-bpb)", ("delta_bpb", "half"), MILLI),
    ("note", lambda rows: rows.verdict.fillna(""), ""),
]  # fmt: skip
RECORDS: list[Column] = [  # rows: analysis.record_exports.beside_records
    ("stored as", "record", ""), BPB5, ("total bytes", "bytes", ",.0f"),
    ("the solver in no more bytes: bpb", "equal_bpb", ".5f"),
    ("the solver at no more loss: bytes", "equal_bytes", ",.0f"), ("of the record's", "share", ".1%"),
]  # fmt: skip
SENSITIVITY: list[Column] = [  # rows: a sensitivity stage's table
    *_words("tensor"), ("rise (milli-bpb)", ("delta_bpb", "delta_half"), (".3f", 1e3)),
    ("estimated", "estimated_delta_bpb", ("+z.3f", 1e3)), ("coded bytes", "tensor_bytes", ",.0f"),
    ("change of the file (B)", "delta_bytes", "+,.0f"), ("milli-bpb per kB", "bpb_per_kb", ("+z.4f", 1e3)),
]  # fmt: skip
SWEEP_EXPORTS: list[Column] = [  # exports among the rows of analysis.seed_groups
    ("file", "arm", ""), BPB5, ("Δ its run (milli-bpb)", ("delta", "half"), MILLI), SIZE, NOTE,
]  # fmt: skip
REFERENCE: list[Column] = [  # rows: analysis.reference_results
    *_words("sweep", "run", "track"),
    ("bpb", lambda rows: rows.bpb_text.replace("", MISSING), ""),
    ("score", lambda rows: rows.score.where(rows.bpb.notna(), MISSING), ""),
    ("total bytes", "bytes", ",.0f"), *_words("status", "verdict"),
]  # fmt: skip
PUBLISHED_DELTA: Column = (
    "published Δ (other data)", lambda rows: map(format_range, rows.published_low, rows.published_high), "",
)  # fmt: skip
PUBLISHED: list[Column] = [  # rows: analysis.published_deltas.ablations
    ("technique", "title", ""), *_words("ours", "sweep"), ("Δ of having it", ("delta", "half"), ".4f"),
    ("note", lambda rows: rows.verdict.replace("not significant", "no difference found"), ""),
    PUBLISHED_DELTA,
    *_words("reliability", "source"),
]  # fmt: skip
SCALE_EFFECTS: list[Column] = [  # rows: analysis.transfer.load_known
    *_words("knobs", "what", "scale"), ("Δ", "delta", "+.4f"), ("other scale", "other_scale", ""),
    ("its Δ", "other_delta", "+.4f"), ("sign", lambda rows: np.where(rows.flips, "flips", "same"), ""),
    *_words("source"),
]  # fmt: skip
CORRELATIONS: list[Column] = [  # rows: analysis.transfer.correlations
    *_words("scale", "other"), ("arms", "arms", ",.0f"), ("rank correlation", "rho", ".2f"),
    ("95 % from", "low", ".2f"), ("to", "high", ".2f"),
    ("at most, by seed noise", "ceiling", ".2f"),
]  # fmt: skip
FORECASTS: list[Column] = [  # rows: analysis.scaling.held_out, extrapolated and unfinished
    ("run", "run", ""), ("parameters", "parameters", ",.0f"), ("tokens", "tokens", ",.0f"),
    ("forecast", "predicted", ".4f"),
    ("95 %", lambda rows: [f"{r.low:.4f} to {r.high:.4f}" for r in rows.itertuples()], ""),
    BPB4, ("error", "error", "+.2%"),
]  # fmt: skip
RESEARCH: list[Column] = [  # rows: analysis.research.arms
    *_words("arm"), ("seeds", "n", ".0f"), BPB4, ("Δ control", ("delta", "half"), ".4f"), SIZE,
    ("× training", "times_train_seconds", ".2f"), ("× scoring", "times_eval_seconds", ".2f"),
    ("parameters", "parameters", ",.0f"), ("passes", "mean_passes", ".2f"), NOTE,
]  # fmt: skip
HISTORY: list[Column] = [  # rows: analysis.seed_groups.history, with the leaders' names
    ("finished (UTC)", lambda rows: rows.finished.str.replace("T", " "), ""), ("cap", "cap_bytes", ",.0f"),
    ("run", "name", ""), ("mean bpb by then", "bpb", ".4f"), SIZE,
]  # fmt: skip
REPEATS: list[Column] = [  # rows: analysis.seed_groups.repeats
    ("run", lambda rows: [", ".join(p[:6]) + (" …" if len(p) > 6 else "") for p in rows.places], ""),
    ("track", lambda rows: rows.track + np.where(rows.time_limited, ", time-limited", ""), ""),
    ("seed", "seed", ".0f"), ("runs", "n", ",.0f"),
    ("spread (bpb)", "spread", lambda spread: f"{spread:.4f}" if spread else "0"),
    ("same file", lambda rows: np.where(rows.same_file, "yes", "no"), ""),
]  # fmt: skip
IMPORTS: list[Column] = [  # imported logs among all runs
    *_words("sweep", "run", "status", "seed"), BPB5, ("scored as", "protocol", ""),
    ("pre-quant bpb", "prequant_val_bpb", ".5f"), SIZE, STEPS, SECONDS,
    ("note", lambda rows: np.where(rows.over_cap.eq(True), "over cap", ""), ""),
]  # fmt: skip


def sweep_columns(rows: pd.DataFrame, reference: pd.DataFrame) -> list[Column]:
    """Columns for a sweep's configs. reference: arm, bpb, bytes of the reference's own runs; may be empty."""
    columns: list[Column] = [
        ("run", "arm", ""), ("seeds", "seeds", format_seeds), BPB4, ("Δ baseline", ("delta", "half"), ".4f"),
        ("p", "p", ".2g"), NOTE, ("would be found", "detectable", ".4f"), SIZE,
    ]  # fmt: skip
    if (rows.time_limit > 0).any():  # the steps that a time limit leaves explain most of a score
        columns.append(("steps", "steps", lambda ends: " to ".join(f"{end:,.0f}" for end in dict.fromkeys(ends))))
    if len(reference):
        means = reference.groupby("arm")[["bpb", "bytes"]].mean().astype(float)
        columns.append(("reference bpb", lambda rows: rows.arm.map(means.bpb), ".4f"))
        columns.append(("reference bytes", lambda rows: rows.arm.map(means.bytes), ",.0f"))
    return columns


def search_columns(knobs: list[str]) -> list[Column]:
    """Columns for a search's trials, of search.trials.trial_table."""
    columns: list[Column] = [("trial", "run", ""), *_words("state"), BPB4, ("bytes", "bytes", ",.0f")]
    columns += [
        (knob, knob, lambda value: f"{value:.3g}" if isinstance(value, float) else str(value)) for knob in knobs
    ]
    return [*columns, ("note", "why", "")]


def transfer_columns(scales: Sequence[str]) -> list[Column]:
    """Columns for analysis.transfer.verdicts: one per scale, the verdict, and the published change."""

    def verdict(row) -> str:
        return row.verdict if pd.isna(row.needed) else f"{row.verdict}: {format_seeds_needed(row.needed)}"

    deltas = [(f"Δ {scale}", (f"delta_{scale}", f"half_{scale}"), ".4f") for scale in scales]
    verdicts = ("verdict", lambda rows: map(verdict, rows.itertuples()), "")
    return [*_words("arm"), *deltas, *_words("signs"), verdicts, PUBLISHED_DELTA]


def seed_noise(noises: dict) -> pd.DataFrame:
    """Rows for SEED_NOISE. noises: analysis.seed_groups.noise_by_track."""
    rows = [{"track": key[0], "limit": key[1], **asdict(noise)} for key, noise in noises.items() if noise]
    return pd.DataFrame(rows)


SEED_NOISE: list[Column] = [
    ("track", lambda rows: rows.track.replace("", MISSING) + [f", limit {s:g} s" * (s > 0) for s in rows.limit], ""),
    ("standard deviation (milli-bpb)", "std", MILLI),
    ("samples", lambda rows: rows.dof + rows.configs, ",.0f"), ("configs", "configs", ",.0f"),
    ("sampled", lambda rows: np.where(rows.repeats, "repeats of one seed", "seeds"), ""),
    ("two runs differ significantly by (milli-bpb)",
     lambda rows: statistics.t_limit(rows.dof) * rows["std"] * 2**0.5, (".1f", 1e3)),
    *((f"found with {seeds} seeds each (milli-bpb)", lambda rows, seeds=seeds:
       [statistics.detectable(seeds, std) for std in rows["std"]], MILLI) for seeds in (3, 5, 10)),
]  # fmt: skip


def by_worth(rows: pd.DataFrame) -> pd.DataFrame:
    """A sensitivity stage's tensors, the one where a byte is worth most first."""
    return rows[rows.tensor != ""].sort_values("bpb_per_kb", ascending=False)


def by_record(logs: pd.DataFrame) -> pd.DataFrame:
    """Imported logs, a record's together, the best record first."""
    best = logs.groupby("sweep").bpb.transform("min").astype(float)
    return logs.assign(best=best).sort_values(["best", "sweep", "run"])


def score_table(result: Result) -> pd.DataFrame:
    """Bits per byte before and after quantisation; scores that the run does not have are left out."""
    scores = {
        "before quantisation, validation text": result.val_bpb,
        "before quantisation, round-trip text": result.prequant_val_bpb,
        "after quantisation, the file read back": result.roundtrip_val_bpb,
        "raw weights before averaging, validation text": result.raw_val_bpb,
    }
    table = pd.DataFrame({"bits per byte": scores}, dtype=float)
    table.loc["cost of quantisation"] = table.iloc[2] - table.iloc[1]
    return table.dropna()


def size_table(result: Result) -> pd.DataFrame:
    """Bytes of each part of the artifact, and their share of the cap; no rows if the run wrote no file."""
    table = pd.DataFrame({"bytes": pd.Series(result.bytes, dtype=int)})
    return table.assign(**{"share of the cap": table.bytes / result.cap_bytes if result.cap_bytes else 0.0})


def show(rows: pd.DataFrame, columns: Sequence[Column]) -> Styler:
    """The table that a notebook or page shows, its text escaped."""
    return styled(format_table(rows, columns), [head for head, _, form in columns if form == ""])


def styled(text: pd.DataFrame, left: Sequence[str]) -> Styler:
    """Text as a table without index; the columns `left` are aligned left, rows on the front are bold."""
    text = text.reset_index(drop=True)
    places = [i for i, head in enumerate(text) if head in left]
    wide = [head for head in text if text[head].map(len).max() > WIDE]
    notes = text.get("note", pd.Series("", index=text.index))
    bold = ["font-weight: 600" if "on the front" in note else "" for note in notes]
    return (
        text.style.hide(axis="index")
        .format(escape="html")
        .apply(lambda column: bold)
        .set_properties(subset=[head for head in text if head in left], **{"text-align": "left"})
        .set_properties(subset=wide, **{"white-space": "normal", "overflow-wrap": "anywhere", "min-width": "14em"})
        .set_table_styles([{"selector": f"th.col{i}", "props": "text-align: left"} for i in places])
    )
