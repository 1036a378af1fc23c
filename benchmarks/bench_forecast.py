"""Bytes of 12 trainings as they were forecast, and as they came out.

    python benchmarks/bench_forecast.py [--runs DIR] [--out benchmarks/results/forecast.json] [--only NAME ...]

Eight of nano shapes, four of the shape of fixed_step, 12×384. A CPU core takes 8 s for 4096 tokens of that shape, so
its trainings are a few steps of few tokens with a short fall of the learning rate, where the track has 300 steps of
32,768: the sizes of σ-tied steps hang on the spread of rows and columns, which is less there. All in all 20 minutes
on one core. A run that is complete in DIR is not trained again.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from pgolf.training.forecast import forecast
from pgolf.training.run import train
from pgolf_core.config import RunConfig

ALWAYS = dict(
    cpu_threads=1, allow_over_cap=True, cap_bytes=16_000_000, val_loss_every=0,
    val_batch_size=8192, val_max_tokens=8192, roundtrip_val_max_tokens=8192,
)  # fmt: skip
SHORT = dict(
    track="fixed_step", train_batch_tokens=4096, train_seq_len=256, warmdown_iters=8, muon_momentum_warmup_steps=8
)
FINE_EMBEDDING = dict(embed_quantizer="step:0.05")
NO_FLOATS = dict(keep_float_max_numel=4096)
CONFIGS = {
    "nano": dict(quantizer="step:0.6", codec="ans"),
    "nano-3x160": dict(num_layers=3, model_dim=160, quantizer="step:0.3:row", codec="ans", iterations=60),
    "nano-2x256": dict(model_dim=256, quantizer="step:0.6", **FINE_EMBEDDING, codec="brotli", iterations=60),
    "nano-vocabulary4096": dict(model_dim=128, vocab_size=4096, quantizer="step:0.4", codec="zlib", iterations=60),
    "nano-shared": dict(num_layers=4, num_unique_blocks=2, quantizer="step:0.8", codec="lzma", iterations=60),
    "nano-1x256": dict(num_layers=1, model_dim=256, quantizer="step:0.5", embed_quantizer="step:0.1", codec="auto"),
    "nano-no-floats": dict(**NO_FLOATS, quantizer="step:0.6:row", codec="ans"),
    "nano-3x208-gptq": dict(
        num_layers=3, model_dim=208, **NO_FLOATS, quantizer="step:0.35", gptq=True, codec="ans", iterations=60
    ),
    "fixed_step": dict(**SHORT, quantizer="step:0.6", codec="ans", iterations=16),
    "fixed_step-fine": dict(**SHORT, quantizer="step:0.4:row", **FINE_EMBEDDING, codec="brotli", iterations=20),
    "fixed_step-coarse": dict(**SHORT | {"train_seq_len": 512}, quantizer="step:0.8", codec="zlib", iterations=16),
    "fixed_step-gptq": dict(
        **SHORT, quantizer="step:0.5", gptq=True, calibration_tokens=16_384, codec="ans", iterations=24
    ),
}


def compare(name: str, root: Path) -> dict:
    """One training's sizes. Code is known exactly, so errors are of the artifact, which makes them larger."""
    config = RunConfig(**{"track": "nano"} | ALWAYS | CONFIGS[name])
    start = time.perf_counter()
    expected = forecast(config)
    seconds = time.perf_counter() - start
    result = train(config, root / name)
    real = result.total_bytes - result.bytes["code"]
    artifact = expected.bytes - expected.parts["code"]
    row = dict(
        name=name, steps=result.steps, quantizer=config.quantizer, codec=config.codec, forecast=artifact, real=real,
        error=artifact / real - 1, forecast_seconds=seconds, forecast_parts=expected.parts, real_parts=result.bytes,
    )  # fmt: skip
    if result.forecast_at_tenth is not None:
        row["error_at_tenth"] = (result.forecast_at_tenth - expected.parts["code"]) / real - 1
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, help="folder of the trainings; default: one that is left in the system's")
    parser.add_argument("--only", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--out", type=Path, help="JSON of all figures")
    arguments = parser.parse_args()
    root = arguments.runs or Path(tempfile.mkdtemp(prefix="bench_forecast_"))
    rows = []
    for name in arguments.only:
        row = compare(name, root)
        rows.append(row)
        tenth = f"{row['error_at_tenth']:+7.2%} at a tenth" if "error_at_tenth" in row else ""
        print(
            f"{name:20} {row['quantizer']:13} {row['codec']:7} forecast {row['forecast']:>10,}   "
            f"real {row['real']:>10,}   {row['error']:+7.2%}   {tenth}",
            flush=True,
        )
    print(f"largest error {max(abs(row['error']) for row in rows):.2%}; the runs are in {root}")
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
