"""What learned rounding wins: the solver's file of one checkpoint with and without `learn_steps`, cap by cap.

    python benchmarks/bench_learning.py RUN [--caps 556000 741000 926000 1389000] [-k learn_steps=150] [--out FILE.json]

RUN is a finished run with its checkpoint; `python benchmarks/bench_export.py` leaves a 6 × 384 one of 240 steps in
runs/lab/base. Prints bits per byte above the raw weights' for both files of each cap, their bytes, and the seconds
that learning took; FILE.json also has the threads.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch

from pgolf.runs.result import CHECKPOINT, finished_run
from pgolf.studies.export_lab import ANS_ALL_QUANTIZED
from pgolf.studies.reexport import scoring_config
from pgolf.training.device import cpu_threads, pick_device
from pgolf.training.inputs import open_dataset
from pgolf.training.round_trip import calibration_of, load_checkpoint, model_of, round_trip, score_model
from pgolf_core.files import atomic_write

CAPS = (556_000, 741_000, 926_000, 1_389_000)  # 0.12 to 0.30 × int8 under zlib of a 6 × 384 model


def measure(run: Path, caps: list[int], knobs: dict) -> list[dict]:
    """A row per cap."""
    _, trained = finished_run(run)
    state = load_checkpoint(run / CHECKPOINT)
    base = scoring_config(trained, ANS_ALL_QUANTIZED | dict(allocation="solve", learn_steps=150) | knobs)
    dataset, device, rows, scored = open_dataset(base), pick_device(base.train), [], {}
    calibration = calibration_of(state, base, dataset, device)
    raw = score_model(model_of(state, base, device), base, dataset, roundtrip=True).val_bpb
    for cap in caps:
        row = {"cap": cap, "raw": raw, "threads": torch.get_num_threads()}
        for name, own in {"solver": dict(learn_steps=0), "learned": {}}.items():
            with tempfile.TemporaryDirectory() as folder:
                config = base.with_knobs(cap_bytes=cap, **own)
                trip = round_trip(state, config, dataset, Path(folder) / "artifact", calibration, scored=scored)
            row |= {f"{name}_rise": trip.score.val_bpb - raw, f"{name}_bytes": trip.account.total}
        row["learning_seconds"] = trip.calibration_seconds
        rows.append(row)
        print(
            f"{cap:>9,} B  solver {row['solver_rise']:+.4f} in {row['solver_bytes']:,}  learned "
            f"{row['learned_rise']:+.4f} in {row['learned_bytes']:,}  {row['learning_seconds']:.0f} s", flush=True,
        )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--caps", type=int, nargs="+", default=CAPS)
    parser.add_argument("--threads", type=int, default=0, help="0 = all cores")
    parser.add_argument("-k", dest="knobs", action="append", default=[], metavar="NAME=VALUE", help="set a knob")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    arguments = parser.parse_args()
    with cpu_threads(arguments.threads):
        rows = measure(arguments.run, arguments.caps, dict(pair.partition("=")[::2] for pair in arguments.knobs))
    if arguments.out:
        atomic_write(arguments.out, json.dumps(rows, indent=1).encode())


if __name__ == "__main__":
    main()
