"""All runs as one DataFrame, and the choice of one of them."""

import os
import time
from dataclasses import fields
from pathlib import Path

import pandas as pd

from pgolf.disk import read_json
from pgolf.runs import integrity
from pgolf.runs.directory import (
    INTERRUPTED,
    PRUNED,
    REFUSED,
    RUNS,
    metric_rows,
    read_failure,
    run_directories,
    with_defaults,
)
from pgolf.runs.result import TIME, Result, RunError, read_result, whole_protocol
from pgolf.runs.schema import About, knobs_that_fit, read_about
from pgolf_core.config import HASH_EXCLUDED, RunConfig, digest, hash_of

KNOBS = [name for name in RunConfig.model_fields if name not in HASH_EXCLUDED]  # knobs that change a run's result
SHORT = ("sweep", "run", "status", "bpb", "total_bytes", "cap_bytes", "train_seconds", "problem")
COMPARABLE = ("scored_text", "roundtrip_bytes", "protocol")  # columns that two comparable scores share


def load_metrics(run_dir: str | Path) -> pd.DataFrame:
    """metrics.jsonl as a table: step, train_loss (nats per token), val_bpb, train_seconds, …"""
    return pd.DataFrame(metric_rows(run_dir))


def load_runs(root: str | Path = RUNS, thorough: bool = False, short: bool = False) -> pd.DataFrame:
    """All runs under root, a folder of sweeps or of one, one row each: place, status, result, then every knob.

    short: the columns SHORT alone.

    status: complete; failed (error.json says why); interrupted (lost machine or killed process); refused (its forecast
    is over its cap); pruned (a search stopped it); damaged (a file is not what the run wrote, see integrity; thorough
    checks every checksum); incomplete. Only complete rows carry figures. bpb: roundtrip_val_bpb. over_cap: total_bytes
    exceeds cap_bytes. arm: name in the sweep file without seed and repeat. control: the sweep's baseline run, of the
    same seed where there are several. flags: sentences about odd facts in an imported log or in a run's timing.
    """
    root = Path(root)
    directories = run_directories(root)
    root = root.parent if (root / "sweep.json").exists() else root
    rows = [_row(root, run_dir, thorough) for run_dir in directories]
    columns = ["sweep", "run", "status", "problem", "bpb", "over_cap", "flags", *(f.name for f in fields(Result))]
    knobs = [name for name in RunConfig.model_fields if name not in columns]
    table = pd.DataFrame(rows, columns=[*columns, *knobs, "path"])
    table["scored_text"] = _scored_texts(table)
    about = {sweep: read_about(root / sweep) or About() for sweep in set(table.sweep)}
    present = set(zip(table.sweep, table.run, strict=True))
    arms, controls = [], []
    for sweep, run in zip(table.sweep, table.run, strict=True):
        arm = about[sweep].arms.get(run, run)
        control = about[sweep].control or "control"
        own = control + run.removeprefix(arm)  # the name's ending tells seed and repeat
        arms.append(arm)
        controls.append(own if (sweep, own) in present else control)
    table["arm"], table["control"] = arms, controls
    return table[[*SHORT]] if short else table


def sentences_in(imported: dict, kind: str) -> list[str]:
    """The flags or disagreements in an import.json."""
    found = imported.get(kind)
    return [text for text in found if isinstance(text, str)] if isinstance(found, list) else []


def _scored_texts(table: pd.DataFrame) -> pd.Series:
    """The column scored_text, filled in for imported logs and for results of versions that did not write it."""
    facts = zip(table.data_fingerprint, table.roundtrip_tokens, table.roundtrip_bytes, strict=True)
    same = [f"{data}, {tokens} tokens, {size} bytes" for data, tokens, size in facts]
    named = table.scored_text.notna()
    known = dict(zip(pd.Series(same)[named], table.scored_text[named], strict=True))  # these three equal: equal text
    return table.scored_text.where(named, [known.get(key, key) for key in same])


def best_training_run(runs_table: pd.DataFrame) -> pd.Series:
    """The trained run of lowest bpb that fits its cap.

    Raises RunError when no complete run does, or when their scores or caps are not comparable.
    """
    table = runs_table[(runs_table.status == "complete") & (runs_table.kind == "train") & runs_table.bpb.notna()]
    if table.empty:
        raise RunError(
            "no complete training run with a round-trip score here; run the training first, "
            "with final_roundtrip_eval=1 and save_raw_checkpoint=1"
        )
    if table.groupby([*COMPARABLE, "cap_bytes"], dropna=False).ngroups > 1:
        raise RunError(
            f"the runs {', '.join(table.run[:5])} … were scored on different text, in different windows, precision or "
            "kinds of device, or under different caps, so none of them is the best; name the run you mean"
        )
    legal = table[~table.over_cap.astype(bool)]
    if legal.empty:
        sizes = ", ".join(f"{r.run} {r.total_bytes:.0f} of {r.cap_bytes:.0f}" for r in table.itertuples())
        raise RunError(
            f"every complete run is over its cap (bytes): {sizes}; make the model smaller or raise cap_bytes"
        )
    return legal.loc[legal.bpb.astype(float).idxmin()]


def training_run_named(runs_table: pd.DataFrame, run: str) -> pd.Series:
    """The trained run of that name, the last of several. RunError saying what is there, or why it has no score."""
    trained = runs_table[runs_table.kind == "train"]
    found = trained[trained.run == run]
    if found.empty:
        raise RunError(f"no complete training run {run!r} here; there are {', '.join(trained.run) or 'none'}")
    if pd.isna(found.iloc[-1].bpb):
        raise RunError(f"{found.iloc[-1].path}: has no round-trip score, it was run with final_roundtrip_eval=0")
    return found.iloc[-1]


def of_all_knobs(config: dict) -> str:
    """config_hash of older versions."""
    return digest({name: value for name, value in config.items() if name not in HASH_EXCLUDED})


def _row(root: Path, run_dir: Path, thorough: bool) -> dict:
    place = run_dir.relative_to(root).parts
    row = {"sweep": place[0] if len(place) > 1 else "", "run": "/".join(place[1:] or place), "path": run_dir}
    row |= {"status": "incomplete", "problem": "", "flags": []}
    config = read_json(run_dir / "config.json")
    if config is None:
        return row | {"status": "damaged", "problem": "config.json"}
    knobs, wrong = knobs_that_fit(config)
    row |= knobs
    if (imported := read_json(run_dir / "import.json")) is not None:  # logged values that fit are knobs
        row |= {"kind": "import", "flags": sentences_in(imported, "flags")}
    elif wrong:
        return row | {"status": "damaged", "problem": f"config.json, {next(iter(wrong))}: {next(iter(wrong.values()))}"}
    else:
        row = with_defaults(row)
    try:
        result = read_result(run_dir)
    except RunError as error:
        why = str(error).removeprefix(f"{run_dir}{os.sep}").partition("; delete")[0]
        return row | {"status": "damaged", "problem": why}
    if result is None:
        error, message = read_failure(run_dir) or ("", "")
        if error in (INTERRUPTED, REFUSED, PRUNED):
            row |= {"status": error.lower(), "problem": message}
        elif error:
            row |= {"status": "failed", "problem": f"{error}: {message}"}
        return row
    same = (
        result.kind == "import" or result.config_hash == hash_of(config) or result.config_hash == of_all_knobs(config)
    )
    if problem := integrity.damage(run_dir, vars(result), thorough) if same else "config.json":
        return row | {"status": "damaged", "problem": problem}
    protocol = whole_protocol(result, row.get("precision", "auto"))
    row |= vars(result) | {"status": "complete", "bpb": result.roundtrip_val_bpb, "protocol": protocol}
    if not result.finished:  # written by a version without this field
        row["finished"] = time.strftime(TIME, time.gmtime((run_dir / "result.json").stat().st_mtime))
    if result.fits is not None:
        row["over_cap"] = not result.fits
    if result.overtime:
        row["flags"] = [f"over its wallclock limit by {result.overtime:.1f} s"]
    return row
