"""Cost of killed workers to a sweep on a cluster: the same runs undisturbed, and with workers killed at random.

    python benchmarks/bench_cluster.py [--runs 12] [--workers 3] [--kills 5] [--iterations 40] [--seed 0]

A scheduler and workers on this machine. A killed process is started again by its nanny; every second time the nanny is
killed too and another joins. Lost work: the seconds from the start of a killed run's notebook to the kill. Must hold:
every run complete, equal to the undisturbed one in bpb and artifact; total time at most 1.5 times the undisturbed one
plus the lost work.
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


def add_worker(folder: Path, root: Path) -> subprocess.Popen:
    words = ["--nthreads", "1", "--nworkers", "1", "--no-dashboard", "--memory-limit", "0", "--host", "127.0.0.1"]
    words += ["--scheduler-file", str(folder / "scheduler.json"), "--local-directory", str(folder)]
    return dask(folder, "worker", *words, PGOLF_RUNS=str(root))


def strike(folder: Path, root: Path, workers: list, rng: random.Random, whole: bool) -> float | None:
    """Kill a worker that runs a notebook; the seconds since that started, None if no worker does."""
    for nanny in rng.sample(workers, len(workers)):
        for process in psutil.Process(nanny.pid).children():
            running = [p for p in process.children() if any("kernel_process" in word for word in p.cmdline())]
            if running:
                lost = time.time() - running[0].create_time()
                if whole:
                    nanny.kill()
                    nanny.wait()
                    workers.remove(nanny)
                process.kill()
                if whole:
                    workers.append(add_worker(folder, root))
                return lost
    return None


def measure(folder: Path, file: Path, arguments: argparse.Namespace, kills: int) -> tuple[float, list[float], Path]:
    """Seconds the sweep took, seconds lost per kill, and the runs folder."""
    root, rng = folder / f"runs{kills}", random.Random(arguments.seed)
    scheduler = dask(
        folder, "scheduler", "--no-dashboard", "--host", "127.0.0.1", "--port", "0",
        "--dashboard-address", "127.0.0.1:0", "--scheduler-file", str(folder / "scheduler.json"),
    )  # fmt: skip
    while not (folder / "scheduler.json").exists():
        time.sleep(0.1)
    workers = [add_worker(folder, root) for _ in range(arguments.workers)]
    time.sleep(15)  # until all have joined, even on a busy machine
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
                seconds = strike(folder, root, workers, rng, len(lost) % 2 == 1)
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
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        file = folder / "bench.yaml"
        base = TINY | {"iterations": arguments.iterations}
        file.write_text(yaml.safe_dump({"track": "nano", "base": base, "grid": {"seed": list(range(arguments.runs))}}))
        plain, _, undisturbed = measure(folder, file, arguments, 0)
        disturbed, lost, killed = measure(folder, file, arguments, arguments.kills)
        assert outcome(killed) == outcome(undisturbed) and len(outcome(killed)) == arguments.runs
    allowed = 1.5 * plain + sum(lost)
    print(
        f"{arguments.runs} runs, {arguments.workers} workers: undisturbed {plain:.0f} s; {len(lost)} killed: "
        f"{disturbed:.0f} s, {sum(lost):.0f} s of work lost; {disturbed / plain:.2f} times, allowed "
        f"{allowed:.0f} s; bpb and artifacts equal"
    )
    return 0 if disturbed <= allowed else 1


if __name__ == "__main__":
    sys.exit(main())
