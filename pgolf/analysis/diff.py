"""The config diff of two runs: every resolved knob, then data, code, machine and versions.

A gain may be attributed to a claimed change only if that change, and nothing else, is in the diff.
"""

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import pandas as pd

from pgolf.analysis import statistics
from pgolf.analysis.statistics import Comparison
from pgolf.disk import read_json
from pgolf.runs.result import RunError
from pgolf.runs.table import COMPARABLE
from pgolf_core.config import HASH_EXCLUDED, RunConfig

# Settings that name a run or the place it wrote to, and change nothing that it computes.
IDENTITY = re.compile(
    r"run_id|run_name|logfile|log_path|artifact_dir|model_path|quantized_model_path|.*_(log|out)_?(dir|path|file)"
)
CHANCE = re.compile(r"seed")
OUTSIDE = (
    "scored_text",
    "data_fingerprint",
    "git_commit",
    "git_dirty",
    "device_name",
    "platform",
    "python",
    "torch",
    "numpy",
)
SHARDING = ("data_path", "tokenizer", "tokenizer_path", "vocab_size")  # knobs that change data_fingerprint
MACHINE = ("device_name", "platform", "python", "numpy")  # in OUTSIDE, but rarely the cause of a difference


def settings(run_dir: str | Path) -> dict:
    """Every knob of a run (of an imported log, as logged) and its OUTSIDE facts. Raises RunError without a config."""
    run_dir = Path(run_dir)
    config = read_json(run_dir / "config.json")
    if config is None:
        raise RunError(f"{run_dir / 'config.json'}: missing or damaged, so this run cannot be compared")
    result = read_json(run_dir / "result.json") or {}
    if result.get("kind") != "import" and not (run_dir / "import.json").exists():
        # Knobs that are newer than the run take their defaults.
        config = {name: field.default for name, field in RunConfig.model_fields.items()} | config
    environment = result.get("environment") or {}
    outside = {name: environment.get(name, result.get(name)) for name in OUTSIDE}
    return {k: v for k, v in config.items() if k not in HASH_EXCLUDED} | {
        k: v for k, v in outside.items() if v is not None
    }


def between(ours: str | Path, theirs: str | Path) -> pd.DataFrame:
    """One row per setting that differs: setting, ours, theirs (None if that side has no such knob), kind.

    kind: knob; chance (the seed); identity (names and paths); outside (data, code, machine, versions); follows (other
    shards of the same scored text, a consequence of another tokenizer).
    """
    a, b = settings(ours), settings(theirs)
    one_text = a.get("scored_text") is not None and a.get("scored_text") == b.get("scored_text")
    resharded = one_text and any(a.get(name) != b.get(name) for name in SHARDING)
    rows = [
        {"setting": name, "ours": a.get(name), "theirs": b.get(name), "kind": kind_of(name, a.get(name), b.get(name))}
        for name in [*a, *(name for name in b if name not in a)]
        if a.get(name) != b.get(name) and not (name in OUTSIDE and None in (a.get(name), b.get(name)))
    ]
    table = pd.DataFrame(rows, columns=["setting", "ours", "theirs", "kind"])
    return table.assign(kind=table.kind.mask((table.setting == "data_fingerprint") & resharded, "follows"))


def kind_of(setting: str, ours: object, theirs: object) -> str:
    """The kind of a differing setting, see between. Paths of equal last part name the same thing in another folder."""
    if CHANCE.fullmatch(setting):
        return "chance"
    moved = all(isinstance(value, str) and "/" in value for value in (ours, theirs))
    if IDENTITY.fullmatch(setting) or (moved and PurePosixPath(ours).name == PurePosixPath(theirs).name):
        return "identity"
    return "outside" if setting in OUTSIDE else "knob"


def judge(rows: pd.DataFrame, claimed: Iterable[str]) -> str:
    """'' if the claimed knobs differ and nothing else does, otherwise the problems in words. rows: between()."""
    claimed = set(claimed)
    knobs = set(rows.setting[rows.kind == "knob"])
    outside = [name for name in rows.setting[rows.kind == "outside"] if name not in MACHINE]
    problems = []
    if not knobs and claimed:
        others = ", ".join(rows.setting[rows.kind.isin(["chance", "identity"])])
        problems.append("no knob differs" + (f", only {others}" if others else ""))
    elif missing := claimed - knobs:
        problems.append(f"claimed and not changed: {', '.join(sorted(missing))}")
    if more := knobs - claimed:
        problems.append(f"changed and not claimed: {', '.join(sorted(more))}")
    if outside:
        problems.append(f"outside of the knobs: {', '.join(outside)}")
    return "; ".join(problems)


def _compared(ours: pd.DataFrame, theirs: pd.DataFrame) -> Comparison | None:
    """All complete logs of two records compared; None if a record has none, or if their scores are not comparable."""
    ours, theirs = ours[ours.status == "complete"], theirs[theirs.status == "complete"]
    both = pd.concat([ours, theirs])
    if ours.empty or theirs.empty or both.groupby(list(COMPARABLE), dropna=False).ngroups > 1:
        return None
    sides = (statistics.samples(side.seed, side.bpb.astype(float)) for side in (ours, theirs))
    return statistics.compare(*sides)


def nearest(logs: pd.DataFrame) -> pd.DataFrame:
    """Pair each imported record with the record of the nearest configuration.

    logs: the rows of load_runs with kind "import". Returns one row per pair: ours, theirs (sweep/run), differs
    (between() of the two logs), found (Comparison of all logs of both records; None if not comparable). Among equally
    near logs one of the same seed is preferred, then the first by name.
    """
    if logs.sweep.nunique() < 2:
        return pd.DataFrame(columns=["ours", "theirs", "differs", "found"])
    known = [(run, settings(run.path)) for run in logs.sort_values(["sweep", "run"]).itertuples()]
    pairs, seen = [], set()
    for sweep in sorted(set(logs.sweep)):
        distances = []
        for ours, a in known:
            for theirs, b in known:
                if ours.sweep == sweep != theirs.sweep:
                    differing = [name for name in {*a, *b} if a.get(name) != b.get(name)]
                    knobs = sum(kind_of(name, a.get(name), b.get(name)) == "knob" for name in differing)
                    other_seed = a.get("seed") != b.get("seed")
                    distances.append((knobs, other_seed, ours.run, theirs.sweep, theirs.run, ours, theirs))
        *_, ours, theirs = min(distances, key=lambda pair: pair[:5])
        if (key := frozenset((sweep, theirs.sweep))) not in seen:
            seen.add(key)
            first, last = sorted((ours, theirs), key=lambda run: run.sweep, reverse=True)
            pairs.append(
                {
                    "ours": f"{first.sweep}/{first.run}",
                    "theirs": f"{last.sweep}/{last.run}",
                    "differs": between(first.path, last.path),
                    "found": _compared(logs[logs.sweep == first.sweep], logs[logs.sweep == last.sweep]),
                }
            )
    return pd.DataFrame(pairs)
