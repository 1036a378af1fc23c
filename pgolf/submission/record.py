"""What a record folder holds: scripts, artifacts and logs of all seeds, submission.json, README, requirements."""

import json
import math
import re
import shutil
import statistics
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import pandas as pd
from scipy import stats

from pgolf.analysis import diff
from pgolf.analysis.statistics import RECORD_ALPHA, RECORD_NATS
from pgolf.data import audit
from pgolf.runs.result import ARTIFACT, Result
from pgolf.script.compile import Script
from pgolf_core.config import RunConfig
from pgolf_core.evaluate import Score
from pgolf_core.files import atomic_write

SCRIPT, READABLE = "train_gpt.py", "train_gpt_readable.py"


@dataclass(frozen=True)
class Seed:
    """A run, and its file's score on the whole validation split. plain: with config.adapt that of fixed weights."""

    directory: Path
    result: Result
    score: Score
    plain: Score | None
    scored_on: str

    @property
    def artifact_bytes(self) -> int:
        return (self.directory / ARTIFACT).stat().st_size


@dataclass(frozen=True)
class Comparison:
    """changes: settings that differ from a base run, as diff.between gives them. beats: a claim in bits per byte."""

    changes: pd.DataFrame | None = None
    beats: float | None = None


@dataclass(frozen=True)
class Record:
    name: str
    seeds: list[Seed]
    config: RunConfig
    script: Script
    found: audit.Audit
    comparison: Comparison

    @property
    def bpb(self) -> list[float]:
        return [seed.score.val_bpb for seed in self.seeds]

    @property
    def std(self) -> float:
        """Standard deviation over seeds; nan of one."""
        return statistics.stdev(self.bpb) if len(self.seeds) > 1 else math.nan

    @property
    def p_value(self) -> float:
        """p of a one-sided t-test that the mean is not below the claim by RECORD_NATS; nan for one seed."""
        if len(self.seeds) < 2:
            return math.nan
        score = self.seeds[0].score
        margin = RECORD_NATS * score.tokens / score.bytes / math.log(2)
        return float(stats.ttest_1samp(self.bpb, self.comparison.beats - margin, alternative="less").pvalue)


def compared(run_dir: Path, base: str | Path) -> pd.DataFrame:
    """The knobs in which a run differs from a base run. Raises RunError."""
    rows = diff.between(run_dir, base)
    return rows[rows.kind == "knob"]


def write(record: Record, folder: Path) -> None:
    """Write all files into an existing folder."""
    atomic_write(folder / SCRIPT, record.script.packed)
    atomic_write(folder / READABLE, record.script.readable)
    for seed in record.seeds:
        shutil.copyfile(seed.directory / ARTIFACT, folder / f"artifact_seed{seed.result.seed}.pgolf")
        atomic_write(folder / f"train_seed{seed.result.seed}.log", _log(seed))
    shutil.copyfile(record.seeds[0].directory / "config.json", folder / "config.json")
    environments = {str(seed.result.seed): seed.result.environment for seed in record.seeds}
    atomic_write(folder / "environment.json", json.dumps(environments, indent=1))
    known = metadata.packages_distributions()  # import name -> distributions
    packages = [known[name][0] for name in record.script.packages]
    pinned = [f"{package}=={metadata.version(package).partition('+')[0]}\n" for package in packages]
    atomic_write(folder / "requirements.txt", "".join(pinned))
    atomic_write(folder / "audit.txt", audit.format_audit(record.found) + "\n")
    atomic_write(folder / "submission.json", json.dumps(claims(record), indent=1))
    atomic_write(folder / "README.md", readme(record))


def _log(seed: Seed) -> str:
    """The run's log; if the run scored a part of the split, with the score of the whole one at its end."""
    text = (seed.directory / "log.txt").read_text(encoding="utf-8")
    if seed.score.tokens == seed.result.roundtrip_tokens:
        return text
    name = re.findall(r"^final_\S*_roundtrip_exact", text, re.MULTILINE)[-1]
    said = "scored again for the submission, on the whole validation split:"
    return f"{text}{said}\n{name} val_loss:{seed.score.val_loss:.8f} val_bpb:{seed.score.val_bpb:.8f}\n"


def claims(record: Record) -> dict:
    """submission.json: means over seeds, the largest sizes, and every seed's own figures."""
    scores, code = [seed.score for seed in record.seeds], len(record.script.packed)
    artifacts = [seed.artifact_bytes for seed in record.seeds]
    same = ("track", "data_fingerprint", "protocol", "cap_bytes", "weights")
    return {
        "name": record.name,
        "date": max(seed.result.finished for seed in record.seeds)[:10],
        "val_loss": statistics.fmean(score.val_loss for score in scores),
        "val_bpb": statistics.fmean(record.bpb),
        "val_bpb_std": None if math.isnan(record.std) else record.std,
        "val_tokens": scores[0].tokens,
        "val_bytes": scores[0].bytes,
        "bytes_total": max(artifacts) + code,
        "bytes_model": max(artifacts),
        "bytes_code": code,
        "seeds": {str(seed.result.seed): _claims_of_seed(seed, code) for seed in record.seeds},
        "audit": {"findings": [asdict(finding) for finding in record.found.findings], "figures": record.found.figures},
    } | {name: getattr(record.seeds[0].result, name) for name in same}


def _claims_of_seed(seed: Seed, code: int) -> dict:
    result = seed.result
    same = ("steps", "train_seconds", "stopped_by", "artifact_sha256", "budget")
    return {
        "run": f"{seed.directory.parent.name}/{seed.directory.name}",
        "val_loss": seed.score.val_loss,
        "val_bpb": seed.score.val_bpb,
        "prequant_val_bpb": result.prequant_val_bpb,
        "run_val_bpb": result.roundtrip_val_bpb,
        "unadapted_val_bpb": seed.plain and seed.plain.val_bpb,
        "run_eval_seconds": result.eval_seconds,
        "run_val_tokens": result.roundtrip_tokens,
        "bytes_model": seed.artifact_bytes,
        "bytes_total": seed.artifact_bytes + code,
        "scored_on": seed.scored_on,
    } | {name: getattr(result, name) for name in same}


def readme(record: Record) -> str:
    count, mean = len(record.seeds), statistics.fmean(record.bpb)
    spread = f" ± {record.std:.5f} (standard deviation of {count} seeds)" if count > 1 else " (one seed)"
    rows = "\n".join(_row(seed) for seed in record.seeds)
    data = record.found.figures.get("published") or "the shards of the fingerprint in submission.json"
    first, seeds = record.seeds[0], ", ".join(str(seed.result.seed) for seed in record.seeds)
    ranks = record.config.world_size
    launch = f"torchrun --standalone --nproc_per_node={ranks} {SCRIPT}" if ranks > 1 else f"python {SCRIPT}"
    part = "" if first.score.tokens == first.result.roundtrip_tokens else _part_note(first)
    return f"""# {record.name}

**{mean:.5f} bits per byte**{spread}: the score of each artifact as read back from disk, on the whole validation split
({first.score.tokens:,} tokens, {first.score.bytes:,} bytes). Artifact and code: at most
{max(seed.artifact_bytes for seed in record.seeds) + len(record.script.packed):,} of {first.result.cap_bytes:,} bytes.

| seed | steps | seconds | pre-quant bpb | post-quant bpb | adapted bpb | artifact bytes |
|--:|--:|--:|--:|--:|--:|--:|
{rows}

Code: {len(record.script.packed):,} bytes ({SCRIPT}, packed; {READABLE} is the same program).{part}
{_comparison(record)}
## Repeat

```
pip install -r requirements.txt
SEED={first.result.seed} DATA_PATH=data {launch}      # writes train.log and artifact.pgolf; seeds: {seeds}
DATA_PATH=data python {SCRIPT} --eval artifact_seed{first.result.seed}.pgolf    # scores a file
```

DATA_PATH is a folder of fineweb_train_*.bin and fineweb_val_*.bin with their tokenizer ({data}); TOKENIZER_PATH names
another place of the tokenizer. environment.json says what the runs were made on.
"""


def _row(seed: Seed) -> str:
    result = seed.result
    seconds, before = result.train_seconds or 0.0, result.prequant_val_bpb or math.nan
    after, adapted = f"{seed.score.val_bpb:.5f}", ""
    if seed.plain:
        after, adapted = f"{seed.plain.val_bpb:.5f}", after
    return (
        f"| {result.seed} | {result.steps:,} | {seconds:.1f} | {before:.5f} | {after} | {adapted} "
        f"| {seed.artifact_bytes:,} |"
    )


def _part_note(seed: Seed) -> str:
    return (
        f"\nPre-quant figures are of {seed.result.roundtrip_tokens:,} tokens, which the runs scored; "
        "post-quant figures of the whole split."
    )


def _comparison(record: Record) -> str:
    """Sections on the base and on the claim that is beaten; '' without."""
    text, comparison = "", record.comparison
    if comparison.changes is not None:
        changed = [f"| {row.setting} | {row.theirs} | {row.ours} |" for row in comparison.changes.itertuples()]
        text += "\n".join(["", "## Changes", "", "| knob | base | here |", "|---|---|---|", *changed, ""])
    if comparison.beats is not None:
        p = record.p_value
        verdict = "not tested: only one seed" if math.isnan(p) else f"p = {p:.2g} (one-sided t-test over seeds)"
        needed = "it holds" if p < RECORD_ALPHA else "it does not hold"
        text += (
            f"\nAgainst {comparison.beats:.5f} bpb: better by {RECORD_NATS:g} nats per token, {verdict}; the rule asks "
            f"for p < {RECORD_ALPHA:g}, and {needed}.\n"
        )
    return text
