"""Synthetic run directories: single runs, configs of several seeds, the exports of one checkpoint, imported logs."""

import json
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from pgolf.analysis import frontier
from pgolf.runs.result import Result, evaluation_protocol, write_result
from pgolf.runs.table import load_runs
from pgolf_core.config import RunConfig
from pgolf_core.files import atomic_write

SEEDS = (1, 2, 3, 4, 5)


def make_run(
    root: Path, place: str, total: int | None = 500_000, bpb: float | None = 2.5, knobs: dict | None = None, **changes
) -> Path:
    """A complete run directory as train() leaves it; knobs of RunConfig, changes of Result."""
    run_dir = root / place
    run_dir.mkdir(parents=True)
    config = RunConfig(track="nano", **knobs or {})
    fields = dict(
        kind="train", config_hash=config.hash, seed=config.seed, track="nano", roundtrip_val_bpb=bpb,
        prequant_val_bpb=bpb, roundtrip_tokens=65_536, roundtrip_bytes=160_112, total_bytes=total, steps=120,
        bytes={"weights": total - 20_000, "code": 20_000, "total": total} if total else {}, cap_bytes=config.cap_bytes,
        parameters=total, train_seconds=30.0, data_fingerprint="5138ca61" * 8,
        protocol=evaluation_protocol(config.eval, config.train, "cpu"),
    )  # fmt: skip
    (run_dir / "config.json").write_text(json.dumps(config.model_dump()))
    (run_dir / "metrics.jsonl").write_text('{"step": 10, "train_loss": 5.0}\n{"step": 120, "val_bpb": 2.4}\n')
    write_result(run_dir, Result(**fields | changes))
    return run_dir


def make_config(root: Path, name: str, scores: Iterable[float], knobs=None, seeds=SEEDS, **changes) -> None:
    """Runs s/<name>-s<seed> that differ in nothing but their seed."""
    for seed, bpb in zip(seeds, scores, strict=True):
        fields = dict(bpb=bpb, knobs=(knobs or {}) | {"seed": seed}, roundtrip_val_loss=1.6 * bpb)
        make_run(root, f"s/{name}-s{seed}", **fields | changes)


def write_sweep(root: Path, names: list[str], baseline: str = "control", seeds=SEEDS) -> None:
    """sweep.json of sweep s: which run is which config's, and the baseline's name."""
    arms = {f"{name}-s{seed}": name for name in names for seed in seeds}
    atomic_write(root / "s" / "sweep.json", json.dumps({"control": baseline, "arms": arms}))


def make_exports(root: Path, source: str, count: int) -> None:
    """A trained run and `count` exports of it, every tenth by the solver; smaller is worse, every other dominated."""
    sha = "a" * 64
    fields = dict(kind="export", source=source, checkpoint_sha256=sha, prequant_val_bpb=2.5)
    make_run(root, source, total=900_000, bpb=2.502, checkpoint_sha256=sha, prequant_val_bpb=2.5)
    for i in range(count):
        knobs = dict(quantizer="step:0.4", allocation=("fixed", "solve")[i % 10 == 9], cap_bytes=300_000 + 20_000 * i)
        bpb = 2.5 + 0.1 * 0.8**i + (i % 2) * 0.01
        make_run(root, f"{source}-lab/file-{i:02}", total=299_000 + 20_000 * i, bpb=bpb, knobs=knobs, **fields)


def make_import(root: Path, place: str, bpb: float, **config) -> None:
    """A run as `pgolf import-log` leaves it; config as logged."""
    run_dir = root / place
    run_dir.mkdir(parents=True)
    (run_dir / "config.json").write_text(json.dumps(config))
    (run_dir / "import.json").write_text('{"flags": []}')
    write_result(run_dir, Result(kind="import", config_hash="x", seed=config["seed"], track="", roundtrip_val_bpb=bpb))


def only_group(root: Path) -> pd.DataFrame:
    """The runs under root, which must form exactly one comparison group."""
    ((_, runs),) = frontier.comparison_groups(load_runs(root))
    return runs
