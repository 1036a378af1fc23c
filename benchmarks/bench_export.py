"""What one checkpoint scores in how many bytes: every variant of the lab, and the solver against the fixed ones.

    python benchmarks/bench_export.py [--runs DIR] [--out FILE.json] [-k NAME=VALUE]

Trains a 6 × 384 model (240 steps of 8,192 tokens of the embedded corpus, a quarter of an hour on two cores) as
DIR/lab/base unless it is there, then runs the stages export_lab and residual_allocation beside it, and prints every
file with how the solver's file of no more bytes scores. What is done is not done again.
"""

import argparse
import json
from pathlib import Path

import pandas as pd

from pgolf.runs import directory
from pgolf.studies.export_lab import allocate_residuals, export_lab
from pgolf.training.run import train
from pgolf_core.config import RunConfig
from pgolf_core.files import atomic_write

CHECKPOINT = dict(
    track="nano", num_layers=6, model_dim=384, num_heads=6, num_kv_heads=3, train_seq_len=512, train_batch_tokens=8192,
    iterations=240, warmdown_iters=120, muon_momentum_warmup_steps=120, val_loss_every=120, cpu_threads=2,
    cap_bytes=16_000_000, resume_every_seconds=60,
)  # fmt: skip
SHARES = (1.0, 0.85, 0.7, 0.55, 0.47, 0.4)
STEPS = (0.4, 0.8)
BUDGETS = (65_536,)  # the reference's


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=Path, default=directory.RUNS, metavar="DIR")
    parser.add_argument("--out", type=Path, metavar="FILE")
    parser.add_argument("-k", dest="knobs", action="append", default=[], metavar="NAME=VALUE", help="of the exports")
    arguments = parser.parse_args()
    knobs = dict(pair.split("=", 1) for pair in arguments.knobs)
    base = arguments.runs / "lab" / "base"
    train(RunConfig(**CHECKPOINT), base)
    lab = export_lab(base, arguments.runs / "lab" / "export_lab", STEPS, shares=SHARES, **knobs)
    residual = allocate_residuals(base, arguments.runs / "lab" / "residual_allocation", BUDGETS, **knobs)
    table = pd.DataFrame(lab.table + residual.table[1:]).drop_duplicates("variant").set_index("variant")
    table = table.assign(loss=table.bpb - table.raw_bpb)  # against the raw weights
    solver = table[table.index.str.startswith("solve")]
    fixed = table.drop(solver.index)
    best = [solver[solver.total_bytes <= size].loss.min() for size in fixed.total_bytes]
    fixed = fixed.assign(solver=best, worse=fixed.loss - pd.Series(best, index=fixed.index))
    columns = {"bpb": "{:.5f}", "loss": "{:+.5f}", "total_bytes": "{:,}", "share": "{:.4f}"}
    print("\nThe solver's files\n" + _text(solver, columns))
    print("\nFixed ones; solver: loss of its best file of no more bytes\n" + _text(
        fixed.sort_values("total_bytes"), columns | {"solver": "{:+.5f}", "worse": "{:+.5f}"}
    ))  # fmt: skip
    beaten = fixed.dropna(subset="solver")
    print(
        f"\nsolver better than {(beaten.worse > 0).sum()} of {len(beaten)} fixed files that it has one to set against"
    )
    landing = [row.total_bytes / int(name.split()[1]) for name, row in solver.iterrows()]
    print(f"lands at {min(landing):.4%} to {max(landing):.4%} of its caps")
    if arguments.out:
        rows = {"checkpoint": CHECKPOINT, "solver": _rows(solver), "fixed": _rows(fixed)}
        print(atomic_write(arguments.out, json.dumps(rows, indent=1) + "\n"))


def _rows(table: pd.DataFrame) -> list[dict]:
    return json.loads(table.drop(columns=["knobs"]).reset_index().to_json(orient="records"))


def _text(table: pd.DataFrame, columns: dict[str, str]) -> str:
    return table[list(columns)].to_string(formatters={name: form.format for name, form in columns.items()})


if __name__ == "__main__":
    main()
