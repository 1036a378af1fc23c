"""What learning wins at equal tokens: files of a model trained as usual, and of one trained for its bytes, cap by cap.

    python benchmarks/bench_learning.py [--shape nano] [--seeds 1337 1338 1339] [--shares 0.12 0.16 0.2 0.3]
    python benchmarks/bench_learning.py --runs DIR --threads 1 --out FILE.json --figure FILE.png
    python benchmarks/bench_learning.py --cost [--shape 6x384]    # seconds of learning / of training, per token

Every cap is a share of the usual model's file in int8 under zlib, code not counted. Rise in bits per byte over the
usual raw weights:

    solver   the usual model, by allocation=solve
    learned  the same, then learn_steps towards the raw model's predictions: what can be done after training
    trained  a model with weight decay that leaves the last part of its tokens to learn_steps with learn_labels

`trained` reads as many tokens of the same text as the usual model in all. Runs are kept in DIR/learning/SHAPE and not
trained again. Prints the mean over seeds, and at last the seconds of each. --cost needs no runs: it alternates the two
on equal numbers of random tokens.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

import pgolf
from pgolf.reports.figures import BLUE, RED, SKY, STYLE, byte_axis
from pgolf.runs import directory
from pgolf.runs.result import CHECKPOINT
from pgolf.script.compile import packed_script
from pgolf.training.inputs import open_dataset
from pgolf.training.round_trip import load_checkpoint, round_trip, score_model
from pgolf_core.batches import TokenStream
from pgolf_core.config import RunConfig
from pgolf_core.device import cpu_threads, keep_freed_memory, pick_device, training_dtype
from pgolf_core.export import quantize_state
from pgolf_core.export_inputs import calibration_of, model_of, teacher_of
from pgolf_core.files import atomic_write
from pgolf_core.quantization.learning import Student
from pgolf_core.shards import header
from pgolf_core.train import make_state, train_step

COMMON = dict(
    track="nano", iterations=240, val_loss_every=0, final_roundtrip_eval=False, keep_float_max_numel=0,
    resume_every_seconds=60,
)  # fmt: skip
SHAPES = {
    "nano": dict(warmdown_iters=120),
    "6x384": dict(
        num_layers=6, model_dim=384, num_heads=6, num_kv_heads=3, train_seq_len=512, train_batch_tokens=8192,
        warmdown_iters=120, muon_momentum_warmup_steps=120,
    ),
}  # fmt: skip
LEARNING_SHARE = 50 / 240  # share of the steps whose tokens learning gets
USUAL = dict(allocation="solve", codec="ans")
AFTER_TRAINING = dict(learn_rate=0.003)
DECAYED = dict(muon_wd=0.6)  # this and the next: trained for its bytes
IN_TRAINING = dict(learn_rate=0.01, learn_labels=0.7)
UPDATES = {"nano": dict(learn_tokens=1024), "6x384": dict(learn_tokens=2048)}  # a wide model pays more for small ones
WAYS = {"solver": "trained as usual, solver", "learned": "… and learned after training",
        "trained": "trained for its bytes"}  # fmt: skip
TICKS = (-0.075, -0.05, -0.025, 0, 0.025, 0.05, 0.1, 0.2, 0.4)


def trained(knobs: dict, folder: Path) -> tuple[RunConfig, dict, float]:
    """Knobs, raw weights and seconds of a run, which is trained unless it is there."""
    config = RunConfig(**knobs)
    result = pgolf.train(config, folder)
    return config, load_checkpoint(folder / CHECKPOINT), result.train_seconds


def measure(shape: str, seed: int, shares: list[float], ways: list[str], runs: Path) -> list[dict]:
    """A row per cap and way to store."""
    knobs = COMMON | SHAPES[shape] | dict(seed=seed)
    left = round(knobs["iterations"] * (1 - LEARNING_SHARE))
    short = knobs | DECAYED | dict(iterations=left, warmdown_iters=round(left / 2))
    models = {
        "usual": trained(knobs, runs / f"usual-s{seed}"),
        "short": trained(short, runs / f"for_its_bytes-s{seed}"),
    }
    config, state, _ = models["usual"]
    learned_tokens = (knobs["iterations"] - left) * config.train_batch_tokens
    in_training = IN_TRAINING | UPDATES[shape]
    models_of = {"solver": ("usual", {}), "learned": ("usual", AFTER_TRAINING), "trained": ("short", in_training)}
    dataset, device = open_dataset(config), pick_device(config.train)
    raw = score_model(model_of(state, config, device), config, dataset, roundtrip=True).val_bpb
    int8 = stored(state, config, dataset).account.artifact
    statistics = {
        name: calibration_of(weights, own.with_knobs(**USUAL), dataset.train_shards, device)
        for name, (own, weights, _) in models.items()
        if any(models_of[way][0] == name for way in ways)
    }
    rows = []
    for share in shares:
        for way in ways:
            name, learning = models_of[way]
            own, weights, seconds = models[name]
            cap = round(share * int8)
            storing = own.with_knobs(cap_bytes=cap, **USUAL, **learning)
            if learning:
                storing = storing.with_knobs(learn_steps=learned_tokens // storing.learn_tokens)
            storing = storing.with_knobs(cap_bytes=cap + len(packed_script(storing)))
            trip = stored(weights, storing, dataset, statistics[name])
            rows.append(
                dict(seed=seed, raw=raw, share=share, cap=cap, way=way, rise=trip.score.val_bpb - raw,
                     fill=trip.account.artifact / (storing.cap_bytes - trip.account.code), training_seconds=seconds,
                     learning_seconds=trip.calibration_seconds)
            )  # fmt: skip
            print(f"seed {seed}  {cap:>9,} B  {way:8} {rows[-1]['rise']:+.4f}  {rows[-1]['fill']:.2%} full", flush=True)
    return rows


def stored(state, config, dataset, calibration=None):
    with tempfile.TemporaryDirectory() as folder:
        return round_trip(state, config, dataset, Path(folder) / "artifact", calibration)


def cost(shape: str, rounds: int = 9) -> tuple[float, float]:
    """Median ratios of seconds per token to those of training: of updates alone, and with the two checks of `learn`."""
    learning = IN_TRAINING | UPDATES[shape] | dict(quantizer="step:1:fisher", calibration_tokens=2048)
    config = RunConfig(**COMMON | SHAPES[shape] | learning)
    config = config.with_knobs(learn_steps=2 * config.train_batch_tokens // config.learn_tokens)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        tokens = np.random.default_rng(0).integers(0, config.vocab_size, 1_000_000, dtype=np.uint16)
        shard = Path(folder) / "fineweb_train_000000.bin"
        shard.write_bytes(header(len(tokens)) + tokens.tobytes())
        device = pick_device(config.train)
        state = make_state(config, TokenStream([shard]), device, training_dtype(config.train, device))
        weights = {name: p.clone() for name, p in state.model.state_dict().items()}
        statistics = calibration_of(weights, config, [shard], device)
        teacher = teacher_of(weights, config, [shard], device)
        student = Student(teacher.model, quantize_state(weights, config.export, statistics))
        seconds = []
        for _ in range(2 + rounds):
            times = [time.perf_counter()]
            teacher.update(student, config.export, None)
            times.append(time.perf_counter())
            teacher.loss(student, config.learn_labels)
            times.append(time.perf_counter())
            train_step(state, 1.0)
            train_step(state, 1.0)
            seconds.append(np.diff([*times, time.perf_counter()]))
        state.batches.load_state_dict(state.batches.state_dict())  # wait for the thread that reads the file
    updates, check, training = np.array(seconds[2:]).T
    rounds_per_file = LEARNING_SHARE * config.iterations / 2  # a round has the tokens of two steps of training
    with_checks = updates + 2 * check / rounds_per_file
    return float(np.median(updates / training)), float(np.median(with_checks / training))


def plot(table: pd.DataFrame) -> Figure:
    """Rise over bytes, a line per way through the means of seeds, which are dots."""
    plt.rcParams.update(STYLE)
    figure, ax = plt.subplots(figsize=(8, 4), layout="constrained")
    for (way, name), colour in zip(WAYS.items(), (SKY, BLUE, RED), strict=True):
        own = table[table.way == way]
        means = own.groupby("share")[["cap", "rise"]].mean()
        ax.plot(own.cap, own.rise, ls="", marker=".", ms=5, color=colour, alpha=0.6)
        ax.plot(means.cap, means.rise, color=colour, lw=1.6, marker="o", ms=6, mfc="white", label=name)
    ax.axhline(0, color="black", lw=0.8, ls=(0, (4, 3)))
    ax.annotate("usual weights, not rounded", (1, 0), (-4, -11), xycoords=("axes fraction", "data"),
                textcoords="offset points", ha="right", fontsize=8)  # fmt: skip
    ax.set_yscale("symlog", linthresh=0.1)
    ax.set_yticks(TICKS, [f"{tick:+g}".replace("-", "−") if tick else "0" for tick in TICKS])
    ax.set_yticks([], minor=True)
    ax.set_ylabel("bits per byte above the usual weights")
    byte_axis(ax.xaxis, table.cap, "file")
    ax.legend(fontsize=9)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="nano")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337, 1338, 1339])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.12, 0.16, 0.2, 0.3])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--runs", type=Path, default=directory.RUNS, metavar="DIR")
    parser.add_argument("--threads", type=int, default=1, help="0 = all cores")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the rows")
    parser.add_argument("--figure", type=Path, metavar="FILE.png", help="draw the rows")
    parser.add_argument("--cost", action="store_true", help="time alone")
    arguments = parser.parse_args()
    if arguments.cost:
        with cpu_threads(arguments.threads):
            print("x training per token: {:.3f}, with checks {:.3f}".format(*cost(arguments.shape)))
            return
    with cpu_threads(arguments.threads):
        folder = arguments.runs / "learning" / arguments.shape
        options = (arguments.shares, arguments.ways, folder)
        rows = [row for seed in arguments.seeds for row in measure(arguments.shape, seed, *options)]
    table = pd.DataFrame(rows)
    print(table.pivot_table("rise", "share", "way").round(4).to_string())
    print(
        table.pivot_table(["training_seconds", "learning_seconds", "fill"], "way", aggfunc="mean").round(3).to_string()
    )
    if arguments.figure:
        plot(table).savefig(arguments.figure, dpi=130)
    if arguments.out:
        atomic_write(arguments.out, json.dumps(rows, indent=1).encode())


if __name__ == "__main__":
    main()
