"""The config diff of two runs: every resolved knob, then data, code, machine and versions.

A gain may be attributed to a claimed change only if that change, and nothing else, is in the diff.
"""

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import pandas as pd

from pgolf.disk import read_json
from pgolf.runs.code import code_of
from pgolf.runs.directory import read_config, with_defaults
from pgolf.runs.result import RunError, read_result
from pgolf_core.config import HASH_EXCLUDED
from pgolf_core.knobs import ModelConfig

# Settings that name a run or the place it wrote to, and change nothing that it computes.
IDENTITY = re.compile(
    r"run_id|run_name|logfile|log_path|artifact_dir|model_path|quantized_model_path|.*_(log|out)_?(dir|path|file)"
)
OUTSIDE = (
    "scored_text", "data_fingerprint", "parameters", "code", "device_name", "platform", "python", "torch", "numpy",
)  # fmt: skip
SHARDING = ("data_path", "tokenizer", "tokenizer_path", "vocab_size")  # knobs that change data_fingerprint
SHAPE = tuple(ModelConfig.model_fields)  # knobs that change the number of parameters
MACHINE = ("device_name", "platform", "python", "numpy")  # in OUTSIDE, but rarely the cause of a difference


def settings(run_dir: str | Path) -> dict:
    """Every knob of a run (of an imported log, as logged) and its OUTSIDE facts. Raises RunError without a config."""
    run_dir = Path(run_dir)
    config = read_json(run_dir / "config.json")
    if config is None:
        raise RunError(f"{run_dir / 'config.json'}: missing or damaged, so this run cannot be compared")
    if not (run_dir / "import.json").exists():
        config = with_defaults(read_config(run_dir))
    result = read_result(run_dir)
    environment = result.environment if result else {}
    outside = (vars(result) if result else {}) | environment | {"code": code_of(environment) or None}
    knobs = {name: value for name, value in config.items() if name not in HASH_EXCLUDED}
    return knobs | {name: outside[name] for name in OUTSIDE if outside.get(name) is not None}


def between(ours: str | Path, theirs: str | Path) -> pd.DataFrame:
    """One row per setting that differs: setting, ours, theirs (None if that side has no such knob), kind.

    kind: knob; chance (the seed); identity (names and paths); outside (data, code, machine, versions, parameters);
    follows (other shards of the same scored text, a consequence of another tokenizer; parameters, of another shape).
    Two runs of code with uncommitted changes of which no digest is known differ in `code`.
    """
    a, b = settings(ours), settings(theirs)
    one_text = a.get("scored_text") is not None and a.get("scored_text") == b.get("scored_text")
    resharded = one_text and any(a.get(name) != b.get(name) for name in SHARDING)
    reshaped = any(a.get(name) != b.get(name) for name in SHAPE)
    follows = {"data_fingerprint": resharded, "parameters": reshaped}
    rows = []
    for name in {**a, **b}:
        x, y = a.get(name), b.get(name)
        unknown = name == "code" and str(x).endswith(" with changes")  # equal words, and perhaps other code
        if (x != y or unknown) and not (name in OUTSIDE and None in (x, y)):
            kind = "follows" if follows.get(name) else _kind(name, x, y)
            rows.append((name, x, y, kind))
    return pd.DataFrame(rows, columns=["setting", "ours", "theirs", "kind"])


def scores(ours: str | Path, theirs: str | Path) -> str:
    """The two files' bpb and bytes, and the difference of bpb, which counts if both scored one text in one way."""
    files = [result for run_dir in (ours, theirs) if (result := read_result(run_dir)) and result.roundtrip_val_bpb]
    if len(files) < 2:
        return "no scores to compare: a run without a scored file"
    a, b = files
    ways = {(one.scored_text or one.data_fingerprint, one.roundtrip_bytes, one.protocol) for one in files}
    texts = [f"{one.roundtrip_val_bpb:.4f} bpb in {one.total_bytes or 0:,} bytes" for one in files]
    difference = f"{a.roundtrip_val_bpb - b.roundtrip_val_bpb:+.4f} bpb"
    return f"{' against '.join(texts)}: {difference if len(ways) == 1 else 'not comparable, other text or protocol'}"


def _kind(setting: str, ours: object, theirs: object) -> str:
    """The kind of a differing setting. Paths of equal last part name the same thing in another folder."""
    if setting == "seed":
        return "chance"
    moved = all(isinstance(value, str) and "/" in value for value in (ours, theirs))
    if IDENTITY.fullmatch(setting) or (moved and PurePosixPath(ours).name == PurePosixPath(theirs).name):
        return "identity"
    return "outside" if setting in OUTSIDE else "knob"


def judge(rows: pd.DataFrame, claimed: Iterable[str]) -> str:
    """'' if the claimed knobs differ and nothing else does, otherwise the problems in words. rows: between().

    Another seed is never a problem, and may be claimed.
    """
    claimed = set(claimed)
    knobs = set(rows.setting[(rows.kind == "knob") | ((rows.kind == "chance") & rows.setting.isin(claimed))])
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
