"""The reference's 60-step trace against ours, and against ours with one weight moved by 1e-7.

    python benchmarks/trace_conformance.py ../shared/golden/trace [--perturbed 6]

Newton-Schulz rounds to bfloat16, so that a difference in the last bit of a gradient grows within a few
steps. The spread of the perturbed runs says how near two right implementations on two machines can be.
"""

import argparse
import contextlib
import io
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

from pgolf.runs.table import load_metrics
from pgolf.training.run import train
from pgolf_core.config import RunConfig


def losses(folder: Path, recorded: dict, run_dir: Path, perturbation: float, where: int) -> tuple:
    """Training losses (60,), the regulariser's values (13,) and the result of one run."""
    with np.load(folder / "init.npz") as arrays:
        initial = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    initial["tok_emb.weight"].view(-1)[where] += perturbation
    config = RunConfig(
        **recorded["knobs"],
        data_path=str(folder.resolve() / "data"),
        tokenizer_path=str(folder.resolve() / "sp1024.model"),
        eval_cache_delay=1,
        cpu_threads=1,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        result = train(config, run_dir, initial)
    table = load_metrics(run_dir).dropna(subset="train_loss")
    penalties = table.comp_reg.to_numpy()
    return table.train_loss.to_numpy(), penalties[penalties > 0], result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--perturbed", type=int, default=6, help="runs with one weight moved")
    arguments = parser.parse_args()
    recorded = json.loads((arguments.folder / "trace.json").read_text())
    reference = np.array([loss for _, loss in recorded["train_loss"]])
    reference_reg = np.array([value for _, value in recorded["comp_reg"]])
    ours = []
    print("run          max|Δloss|  mean|Δloss|  steps>2e-3  max|Δreg|   Δval_bpb    Δround-trip bpb")
    with tempfile.TemporaryDirectory() as root:
        for i in range(arguments.perturbed + 1):
            name = "as recorded" if i == 0 else f"weight {i}"
            loss, reg, result = losses(arguments.folder, recorded, Path(root) / str(i), 1e-7 * (i > 0), i)
            ours.append(loss)
            difference = np.abs(loss - reference)
            print(
                f"{name:12} {difference.max():.5f}     {difference.mean():.5f}      {(difference > 2e-3).sum():3}"
                f"         {np.abs(reg - reference_reg).max():.6f}   {result.val_bpb - recorded['val_bpb']:+.6f}"
                f"   {result.roundtrip_val_bpb - recorded['roundtrip_val_bpb']:+.6f}"
            )
    if arguments.perturbed > 1:
        ours = np.array(ours)
        spread = ours.std(axis=0, ddof=1) * np.sqrt(1 + 1 / len(ours))
        z = (reference - ours.mean(axis=0)) / np.maximum(spread, 5e-5)  # the recorded losses have 4 decimals
        among = max(np.abs(a - b).max() for a in ours for b in ours)
        print(f"ours among themselves: max|Δloss| {among:.5f}")
        print(f"the reference within our spread: |z| median {np.median(np.abs(z)):.2f}, max {np.abs(z).max():.2f}")


if __name__ == "__main__":
    main()
