"""Time and memory of all report pages over synthetic run directories; the bars are 60 s and 2 GB.

    python benchmarks/bench_report.py [--runs 2000] [--sweeps 30] [--keep FOLDER]

Sweeps in three comparison groups, each with configs of five seeds and exports of its baseline; some runs over their
cap, incomplete, failed or damaged.
"""

import argparse
import json
import random
import resource
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from pgolf.reports import pages as report
from pgolf.runs.directory import write_failure
from pgolf.runs.result import ARTIFACT, Result, evaluation_protocol, result_checksum
from pgolf.runs.table import load_runs
from pgolf_core.config import RunConfig

SEEDS = (1337, 1338, 1339, 1340, 1341)


def make_runs(root: Path, count: int, sweeps: int = 30, seed: int = 0) -> None:
    """Run directories as train() and export_checkpoint() leave them, artifacts hollow and checkpoints absent."""
    rng = random.Random(seed)
    configs: dict[int, dict[str, str]] = {sweep: {} for sweep in range(sweeps)}
    for i in range(count):
        sweep, place = i % sweeps, i // sweeps
        kind = "export" if place % 8 == 7 else "train"
        label = "control" if place < len(SEEDS) else f"lr{place // len(SEEDS)}"
        run_seed = SEEDS[place % len(SEEDS)]
        name = f"export-{place:03}" if kind == "export" else label + (f"-s{run_seed}" if run_seed != SEEDS[0] else "")
        if kind == "train":
            configs[sweep][name] = label
        run_dir = root / f"sweep{sweep:02}" / name
        run_dir.mkdir(parents=True)
        config = RunConfig(
            track="nano",
            num_layers=1 + sweep % 4,
            matrix_lr=0.04 if label == "control" else round(0.01 * (1 + place // len(SEEDS)), 4),
            seed=run_seed,
            weight_quantization_bits=8 if kind == "train" else rng.randint(4, 8),
            eval_stride=(0, 64, 0)[sweep % 3],
            roundtrip_val_max_tokens=(65_536, 65_536, 32_768)[sweep % 3],
        )
        (run_dir / "config.json").write_text(json.dumps(config.model_dump(), indent=1))
        steps = range(10, config.iterations + 1, 10)
        rows = [{"step": s, "train_loss": 3 + 40 / (s + 5) + rng.gauss(0, 0.02)} for s in steps]
        rows += [{"step": s, "val_loss": 3.1, "val_bpb": 1.9 + 12 / (s + 5)} for s in (40, 80, 120)]
        fate = rng.random() if name != "control" else 1
        if fate < 0.05:  # killed while it trained, in the middle of a line
            rows = rows[: rng.randint(0, 11)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (run_dir / "metrics.jsonl").write_text(lines + ('{"step": 1' if fate < 0.05 else ""))
        if fate < 0.05:
            continue
        if fate < 0.08:
            write_failure(run_dir, RuntimeError("training loss is nan at step 40; lower matrix_lr"))
            continue
        if fate < 0.10:
            (run_dir / "result.json").write_text('{"kind": "train", "conf')
            continue
        result = _result(config, kind, f"sweep{sweep:02}/control" if kind == "export" else None, rng)
        with open(run_dir / ARTIFACT, "wb") as artifact:
            artifact.truncate(result.total_bytes - result.bytes["code"])  # a hole: no disk is used
        # As write_result, without its fsync: making the runs is not what is measured.
        content = asdict(result) | {"checksum": result_checksum(asdict(result))}
        (run_dir / "result.json").write_text(json.dumps(content, indent=1))
    for sweep, names in configs.items():
        about = {"control": "control", "arms": names, "changes": {label: ["matrix_lr"] for label in names.values()}}
        (root / f"sweep{sweep:02}" / "sweep.json").write_text(json.dumps(about))


def _result(config: RunConfig, kind: str, source: str | None, rng: random.Random) -> Result:
    total = int(rng.lognormvariate(13.4, 0.35))
    bpb = 2.0 + 250_000 / total + abs(rng.gauss(0, 0.05)) + (5 if rng.random() < 0.01 else 0)
    nats = [rng.gauss(1600, 100) for _ in range(64)]
    share = {"weights": 0.6, "scales": 0.02, "residuals": 0.01, "float tensors": 0.3, "metadata": 0.01}
    parts = {name: int(part * total) for name, part in share.items()}
    return Result(
        kind=kind, config_hash=config.hash, seed=config.seed, track=config.track, source=source,
        val_loss=bpb * 1.6, val_bpb=bpb - 0.001, val_tokens=65_536, val_bytes=160_112,
        roundtrip_val_loss=bpb * 1.6, roundtrip_val_bpb=bpb,
        roundtrip_tokens=config.roundtrip_val_max_tokens, roundtrip_bytes=int(2.443 * config.roundtrip_val_max_tokens),
        prequant_val_bpb=bpb - abs(rng.gauss(0, 0.002)), roundtrip_block_nats=nats,
        prequant_block_nats=[value - rng.gauss(0.5, 0.5) for value in nats], checkpoint_sha256="1" * 64,
        bytes={**parts, "code": total - sum(parts.values()), "total": total},
        total_bytes=total, cap_bytes=config.cap_bytes, artifact_sha256="0" * 64, parameters=total * 2, steps=120,
        tokens=120 * 4096, stopped_by="iterations", train_seconds=rng.uniform(30, 90), eval_seconds=2.0,
        export_seconds=0.2, data_fingerprint="5138ca61" * 8,
        protocol=evaluation_protocol(config.eval, config.train, "cpu"),
        environment={"git_commit": "0" * 40, "git_dirty": False, "torch": "2.13.0", "python": "3.12.0"},
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--sweeps", type=int, default=30)
    parser.add_argument("--keep", type=Path, help="leave runs and report in this new folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = arguments.keep or Path(folder)
        make_runs(folder / "runs", arguments.runs, arguments.sweeps)
        start = time.perf_counter()
        table = load_runs(folder / "runs")
        loaded = time.perf_counter()
        pages = report.write_reports(folder / "runs", folder / "reports")
        seconds = time.perf_counter() - loaded
        size = sum(page.stat().st_size for page in pages) / 1e6
        print(f"runs.load       {loaded - start:6.1f} s for {len(table):,} run directories")
        print(f"write_reports   {seconds:6.1f} s, bar 60 s; {len(pages)} pages of {size:.1f} MB")
    unit = 1e6 if sys.platform == "darwin" else 1e3
    peaks = [resource.getrusage(who).ru_maxrss / unit for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(f"peak memory     {peaks[0]:6.0f} MB here, {peaks[1]:.0f} MB in the largest of {report.AT_ONCE} kernels")


if __name__ == "__main__":
    main()
