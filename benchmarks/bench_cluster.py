"""What killed workers cost a sweep on a cluster: the same runs undisturbed, and with workers killed at random.

    python benchmarks/bench_cluster.py [--runs 12] [--workers 3] [--kills 5] [--iterations 40] [--seed 0] [--apart]

A scheduler and workers on this machine; --apart gives each worker a run store of its own, so that files are copied. A
killed process is started anew by its nanny, every second time the nanny is killed too and another comes. Lost work: of
each kill, the seconds since its run's notebook was started. Must hold: every run complete, equal to the undisturbed one
in bpb and artifact; total time at most 1.5 times the undisturbed one and the lost work.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import yaml

from pgolf.runs.table import load_runs

TINY = dict(
    num_layers=1, model_dim=96, num_heads=2, num_kv_heads=1, train_seq_len=64, train_batch_tokens=2048,
    warmdown_iters=0, val_loss_every=0, val_batch_size=2048, val_max_tokens=2048, roundtrip_val_max_tokens=2048,
    cpu_threads=1, resume_every_seconds=0.5,
)  # fmt: skip


def dask(folder: Path, *words: str, **environment: str) -> subprocess.Popen:
    with open(folder / "dask.log", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "dask", *words], stdout=log, stderr=subprocess.STDOUT, env=os.environ | environment
        )


def add_worker(folder: Path, root: Path, apart: bool) -> subprocess.Popen:
    root = Path(tempfile.mkdtemp(dir=folder)) if apart else root
    words = ["--nthreads", "1", "--nworkers", "1", "--no-dashboard", "--memory-limit", "0", "--host", "127.0.0.1"]
    words += ["--scheduler-file", str(folder / "scheduler.json"), "--local-directory", str(folder)]
    return dask(folder, "worker", *words, PGOLF_RUNS=str(root))


def strike(folder: Path, root: Path, workers: list, rng: random.Random, whole: bool, apart: bool) -> float | None:
    """Kill one that is at work; the seconds that its run had taken, None where none is."""
    for nanny in rng.sample(workers, len(workers)):
        for process in psutil.Process(nanny.pid).children():
            slots = [
                p for p in process.children() if any("pgolf.sweeps.kernel_process" in word for word in p.cmdline())
            ]
            if slots:
                lost = time.time() - slots[0].create_time()
                if whole:
                    nanny.kill()
                    nanny.wait()
                    workers.remove(nanny)
                process.kill()
                if whole:
                    workers.append(add_worker(folder, root, apart))
                return lost
    return None


def measure(folder: Path, file: Path, arguments: argparse.Namespace, kills: int) -> tuple[float, list[float], Path]:
    """Seconds of the sweep, those lost with each kill, and where its runs are."""
    root, rng = folder / f"runs{kills}", random.Random(arguments.seed)
    scheduler = dask(
        folder, "scheduler", "--no-dashboard", "--host", "127.0.0.1", "--port", "0",
        "--dashboard-address", "127.0.0.1:0", "--scheduler-file", str(folder / "scheduler.json"),
    )  # fmt: skip
    while not (folder / "scheduler.json").exists():
        time.sleep(0.1)
    workers = [add_worker(folder, root, arguments.apart) for _ in range(arguments.workers)]
    time.sleep(15)  # until all are there, whatever else this machine does
    lost = []
    try:
        start = time.perf_counter()
        sweep = subprocess.Popen(
            [sys.executable, "-m", "pgolf.cli.main", "sweep", str(file), "--cluster", str(folder / "scheduler.json")],
            env=os.environ | {"PGOLF_RUNS": str(root)},
        )
        while sweep.poll() is None:
            time.sleep(rng.uniform(1, 6))
            done = len(list(root.glob("*/*/result.json")))
            if len(lost) < kills and done < arguments.runs - 1:
                seconds = strike(folder, root, workers, rng, len(lost) % 2 == 1, arguments.apart)
                if seconds is not None:
                    lost.append(seconds)
                    print(f"  kill {len(lost)}: {seconds:.1f} s of work, {done} runs complete", flush=True)
        seconds = time.perf_counter() - start
        assert sweep.returncode == 0, f"exit status {sweep.returncode}"
    finally:
        for process in [*workers, scheduler]:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
            process.wait()
        (folder / "scheduler.json").unlink(missing_ok=True)
    return seconds, lost, root


def outcome(root: Path) -> dict[str, tuple]:
    table = load_runs(root, thorough=True)
    assert (table.status == "complete").all(), table[["run", "status", "problem"]]
    return {row.run: (row.bpb, row.artifact_sha256, row.steps) for row in table.itertuples()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=12)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--apart", action="store_true", help="each worker has a run store of its own")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        file = folder / "bench.yaml"
        base = TINY | {"iterations": arguments.iterations}
        file.write_text(yaml.safe_dump({"track": "nano", "base": base, "grid": {"seed": list(range(arguments.runs))}}))
        plain, _, there = measure(folder, file, arguments, 0)
        disturbed, lost, here = measure(folder, file, arguments, arguments.kills)
        assert outcome(here) == outcome(there) and len(outcome(here)) == arguments.runs
    allowed = 1.5 * plain + sum(lost)
    print(
        f"{arguments.runs} runs, {arguments.workers} workers: undisturbed {plain:.0f} s; {len(lost)} killed: "
        f"{disturbed:.0f} s, {sum(lost):.0f} s of work lost; {disturbed / plain:.2f} times, allowed "
        f"{allowed:.0f} s; bpb and artifacts equal"
    )
    return 0 if disturbed <= allowed else 1


if __name__ == "__main__":
    sys.exit(main())
