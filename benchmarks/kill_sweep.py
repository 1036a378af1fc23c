"""Kill the tour sweep at random moments, run it again each time, and compare its results with an undisturbed one.

    python benchmarks/kill_sweep.py [--kills 20] [--seed 0] [--full]

Default: the tour's runs and stages shrunk to seconds each, about eight minutes on two cores; --full: the tour
itself, an hour. Most kills hit the sweep's process only, some the whole family, one kernel or one kernel process. Must
hold: the sweep ends complete; every figure, byte and artifact equals the undisturbed sweep's; no complete run is
done again; no process survives its sweep; no torn file counts as complete.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import psutil
import safetensors.torch
import torch
import yaml

from pgolf.runs.result import ARTIFACT, CHECKPOINT, read_result
from pgolf.sweeps.sweep_file import NOTEBOOKS
from pgolf_core.export import load

TOUR = NOTEBOOKS / "sweeps" / "tour.yaml"
SHRUNK = dict(
    iterations=16, train_batch_tokens=2048, warmdown_iters=8, val_loss_every=8, val_batch_size=4096,
    val_max_tokens=4096, roundtrip_val_max_tokens=4096, resume_every_seconds=0.3,
)  # fmt: skip
SHRUNK_STAGES = ["train", {"sensitivity": {"tokens": 1024}}, {"residual_allocation": {"budgets": [2048]}}]
VICTIMS = ["sweep"] * 5 + ["family"] * 2 + ["kernel"] * 2 + ["kernel process"]
DIFFER = {
    "train_seconds", "eval_seconds", "export_seconds", "budget", "peak_memory_bytes", "resumed", "environment",
    "finished", "files", "checksum",
}  # fmt: skip
END_SECONDS = 5  # a kernel process and its kernel may outlive their sweep by this


def start(file: Path, root: Path) -> subprocess.Popen:
    with open(root.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "pgolf.cli.main", "sweep", str(file)],
            env=os.environ | {"PGOLF_RUNS": str(root)}, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip


def strike(victim: str, sweep: psutil.Process, rng: random.Random) -> tuple[str, list[psutil.Process]]:
    """Kill -9 a victim; the sweep, if no kernel process runs yet. Returns the victim and all that must end for it."""
    workers = [p for p in sweep.children() if p.status() != psutil.STATUS_ZOMBIE]
    worker = rng.choice(workers) if workers else None
    kernels = worker.children() if worker else []
    if worker and (victim == "kernel process" or (victim == "kernel" and kernels)):
        doomed = [worker, *kernels] if victim == "kernel process" else kernels
        doomed[0].kill()
        return victim, doomed
    doomed = [sweep, *sweep.children(recursive=True)]
    for process in doomed if victim == "family" else doomed[:1]:
        process.kill()
    return "family" if victim == "family" else "sweep", doomed


def results(root: Path) -> dict[str, int]:
    """Complete runs and sub-runs of stages -> when they were completed."""
    return {p.parent.relative_to(root).as_posix(): p.stat().st_mtime_ns for p in root.rglob("result.json")}


def check_files(root: Path) -> None:
    """Every file under its final name can be read completely."""
    for path in root.rglob("*.json"):
        json.loads(path.read_text(encoding="utf-8"))
    for path in root.rglob(CHECKPOINT):
        safetensors.torch.load_file(path)
    for path in root.rglob(ARTIFACT):
        load(path)
    for path in root.rglob("resume.pt"):
        torch.load(path, weights_only=True)


def outcome(root: Path) -> dict[str, dict]:
    """Figures of every run, without timings and facts about this machine."""
    rows = {}
    for name in sorted(results(root)):
        rows[name] = {k: v for k, v in asdict(read_result(root / name)).items() if k not in DIFFER}
    return rows


def compare(disturbed: Path, undisturbed: dict[str, dict]) -> None:
    ours = outcome(disturbed)
    assert ours.keys() == undisturbed.keys(), ours.keys() ^ undisturbed.keys()
    for name, figures in undisturbed.items():
        differ = {k: (v, ours[name][k]) for k, v in figures.items() if ours[name][k] != v}
        assert not differ, f"{name}: {differ}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--full", action="store_true", help="the real tour, not the shrunk one")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        content = yaml.safe_load(TOUR.read_text(encoding="utf-8"))
        if not arguments.full:
            content |= {"base": SHRUNK, "stages": SHRUNK_STAGES}
        file = Path(folder) / "tour.yaml"
        file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")

        root = Path(folder) / "undisturbed"
        start_time = time.perf_counter()
        assert start(file, root).wait() == 0, root.with_suffix(".log").read_text(encoding="utf-8")
        whole = time.perf_counter() - start_time
        undisturbed = outcome(root)
        # Up to a third of a sweep between kills: several hit one sweep, its stages included.
        apart = whole / 3 if arguments.full else min(whole / 3, 25)
        print(f"undisturbed: {len(undisturbed)} runs and sub-runs, {whole:.0f} s\n", flush=True)
        print(f"{'kill':>4}  {'sweep':>5}  {'victim':14}{'after':>8}  {'complete':>8}  {'gone in':>8}")

        sweep, attempt, finished = None, 1, 0
        root = Path(folder) / f"disturbed{attempt}"
        kills = 0
        struck = False  # a run that lost its kernel or kernel process fails: only then may its sweep exit 1
        while kills < arguments.kills or sweep is not None or results(root) or not finished:
            if sweep is None:
                before, struck = results(root), False
                sweep, started = start(file, root), time.perf_counter()
            try:
                status = sweep.wait(rng.uniform(0, apart) if kills < arguments.kills else None)
            except subprocess.TimeoutExpired:
                process = psutil.Process(sweep.pid)
                after, done = time.perf_counter() - started, len(results(root))
                victim, doomed = strike(rng.choice(VICTIMS), process, rng)
                kills += 1
                hit = time.perf_counter()
                struck = True
                if process in doomed:
                    sweep.wait()
                    sweep = None
                _, alive = psutil.wait_procs(doomed, timeout=END_SECONDS)
                assert not alive, f"survived their sweep: {[p.cmdline() for p in alive]}"
                gone = time.perf_counter() - hit
                print(f"{kills:>4}  {attempt:>5}  {victim:14}{after:>6.1f} s  {done:>8}  {gone:>6.1f} s", flush=True)
            else:
                log = root.with_suffix(".log").read_text(encoding="utf-8")
                assert status == 0 or (status == 1 and struck), f"exit status {status}:\n{log}"
                assert status or results(root).keys() == undisturbed.keys(), "complete, it says"
                sweep = None
            if sweep is None:
                check_files(root)
                after = results(root)
                repeated = [name for name, when in before.items() if after.get(name) != when]
                assert not repeated, f"complete, and done again: {repeated}"
                if after.keys() == undisturbed.keys():
                    compare(root, undisturbed)
                    finished += 1
                    attempt += 1
                    root = Path(folder) / f"disturbed{attempt}"
    print(
        f"\n{kills} kills; {finished} sweeps ended complete, each equal to the undisturbed one in every figure and "
        f"artifact; no complete run was repeated; no torn file; {time.perf_counter() - began:.0f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
