"""Cost of a notebook: one train.ipynb as a sweep runs it, against train() in a fresh process.

    python benchmarks/notebook_overhead.py [--repeats 5]

Bar: at most 6 s per run. Both train the same few steps, alternating, each from an empty directory.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pgolf.runs import directory
from pgolf.runs.result import read_result
from pgolf.sweeps import runner
from pgolf.sweeps.pool import LocalPool
from pgolf.sweeps.sweep_file import load_sweep
from pgolf.training.inputs import open_dataset

BAR_SECONDS = 6.0
FILE = """
track: nano
runs: {notebook: {iterations: 10, val_loss_every: 5, val_max_tokens: 8192, roundtrip_val_max_tokens: 8192}}
"""
DIRECT = """
import json, sys
from pgolf_core.config import RunConfig
from pgolf.training.run import train
train(RunConfig(**json.loads(sys.argv[1])), sys.argv[2])
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    extra = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "overhead.yaml"
        file.write_text(FILE, encoding="utf-8")
        print(f"{'repeat':>6}  {'notebook':>10}  {'train()':>10}  {'extra':>7}")
        for i in range(repeats):
            directory.RUNS = Path(folder) / f"runs{i}"
            (job,) = runner.plan(load_sweep(file))
            open_dataset(job.config)
            start = time.perf_counter()
            workers = LocalPool([{}])
            workers.start(job)
            status = workers.started[job][0].wait()
            notebook = time.perf_counter() - start
            assert status == 0, job.log.read_text(encoding="utf-8")
            direct_dir = Path(folder) / f"direct{i}"
            start = time.perf_counter()
            command = [sys.executable, "-c", DIRECT, json.dumps(job.config.model_dump()), str(direct_dir)]
            subprocess.run(command, check=True, capture_output=True)
            direct = time.perf_counter() - start
            same = [read_result(d).artifact_sha256 for d in (job.run_dir, direct_dir)]
            assert same[0] == same[1], same
            extra.append(notebook - direct)
            print(f"{i + 1:>6}  {notebook:>8.2f} s  {direct:>8.2f} s  {extra[-1]:>5.2f} s", flush=True)
    median = statistics.median(extra)
    print(f"median {median:.2f} s per run, bar {BAR_SECONDS:.0f} s: {'holds' if median <= BAR_SECONDS else 'MISSED'}")
    return 0 if median <= BAR_SECONDS else 1


if __name__ == "__main__":
    sys.exit(main())
