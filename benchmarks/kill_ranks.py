"""Kill random processes of a training on several ranks, resume, repeat: does it hang, are the final weights the same?

    python benchmarks/kill_ranks.py --kills 20

Each kill (SIGKILL) takes a rank, torchrun, or the process that started it, at a random moment after the first step.
Prints the seconds until all processes had ended after each kill, and which were left running; at the end whether the
weights equal those of an undisturbed run.
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

from pgolf.runs.directory import metric_rows
from pgolf.runs.table import load_runs
from pgolf.training.run import train
from pgolf_core.config import RunConfig

PATIENCE_SECONDS = 60.0
SMALL = dict(
    track="nano", num_layers=1, model_dim=64, train_seq_len=64, train_batch_tokens=1024, val_batch_size=2048,
    val_max_tokens=2048, roundtrip_val_max_tokens=2048, val_loss_every=0, train_log_every=1, resume_every_seconds=0.1,
)  # fmt: skip


def family(run_dir: Path) -> list[psutil.Process]:
    """Every process of this run: the starter, torchrun, the ranks."""
    found = []
    for process in psutil.process_iter():
        try:
            if any(str(run_dir) in word for word in process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=600)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    luck = random.Random(arguments.seed)
    config = RunConfig(**SMALL, world_size=arguments.ranks, iterations=arguments.iterations)
    with tempfile.TemporaryDirectory() as folder:
        expected = train(config, Path(folder) / "undisturbed")
        run_dir, slowest, done = Path(folder) / "disturbed", 0.0, 0
        script = f"from pgolf.training.run import *; train(RunConfig(**{config.model_dump()}), {str(run_dir)!r})"
        while done < arguments.kills:
            before = len(metric_rows(run_dir))
            process = subprocess.Popen(
                [sys.executable, "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            lines = before + luck.randrange(2, arguments.iterations // arguments.kills)
            while len(metric_rows(run_dir)) < lines and process.poll() is None:
                time.sleep(0.02)
            if process.poll() is not None:
                sys.exit(f"the run ended by itself after {done} kills")
            victim = luck.choice(family(run_dir))
            is_torchrun = any("distributed.run" in word for word in victim.cmdline())
            rank = "torchrun" if is_torchrun else f"rank {victim.environ().get('RANK')}"
            words = "the starter" if victim.pid == process.pid else rank
            victim.kill()
            start = time.monotonic()
            while family(run_dir) and time.monotonic() - start < PATIENCE_SECONDS:
                if process.poll() is None:
                    process.poll()
                time.sleep(0.05)
            seconds, left = time.monotonic() - start, family(run_dir)
            slowest, done = max(slowest, seconds), done + 1
            row = load_runs(folder).set_index("run").loc["disturbed"]
            print(
                f"{done:3}  killed {words:12} at line {lines:4}: all over after {seconds:5.2f} s  {row.status}",
                flush=True,
            )
            if left:
                sys.exit(f"still running after {PATIENCE_SECONDS:.0f} s: {left}")
        result = train(config, run_dir)
        same = result.checkpoint_sha256 == expected.checkpoint_sha256
        print(
            f"{done} kills, the slowest end {slowest:.2f} s; resumed {result.resumed} times; the same weights: {same}"
        )
        sys.exit(0 if same else 1)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
