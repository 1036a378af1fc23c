"""Tables and the curve of one run, for train.ipynb. Imports no statistics: every run of a sweep loads this module."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from pgolf.runs.result import Result
from pgolf.runs.table import load_metrics

TRAINING, VALIDATION = "#0072B2", "#D55E00"


def score_table(result: Result) -> pd.DataFrame:
    """Bits per byte before and after quantisation; scores that the run does not have are left out."""
    scores = {"before quantisation, validation text": result.val_bpb}
    if result.roundtrip_val_bpb is not None:
        scores |= {
            "before quantisation, round-trip text": result.prequant_val_bpb,
            "after quantisation, the file read back": result.roundtrip_val_bpb,
            "cost of quantisation": result.roundtrip_val_bpb - result.prequant_val_bpb,
        }
    return pd.DataFrame({"bits per byte": scores})


def size_table(result: Result) -> pd.DataFrame:
    """Bytes of each part of the artifact, and their share of the cap; no rows if the run wrote no file."""
    table = pd.DataFrame({"bytes": pd.Series(result.bytes, dtype=int)})
    return table.assign(**{"share of the cap": table.bytes / result.cap_bytes if result.cap_bytes else 0.0})


def plot_losses(run_dir: str | Path) -> Figure:
    """Cross-entropy by step: each training batch, and each validation with its bits per byte."""
    table = load_metrics(run_dir)
    figure, ax = plt.subplots(figsize=(8, 4), layout="constrained")
    if "train_loss" in table:
        training = table.dropna(subset="train_loss")
        ax.plot(training.step, training.train_loss, color=TRAINING, label="training batch")
    validation = table.dropna(subset="val_loss")
    ax.plot(validation.step, validation.val_loss, "o", color=VALIDATION, label="validation, before quantisation")
    for point in validation.itertuples():
        place = dict(xytext=(0, -13), textcoords="offset points", ha="center", fontsize=8)
        ax.annotate(f"{point.val_bpb:.3f} bpb", (point.step, point.val_loss), **place)
    ax.set(xlabel="step", ylabel="cross-entropy (nats per token)", title=Path(run_dir).name)
    ax.margins(y=0.15)
    ax.legend(frameon=False)
    return figure
