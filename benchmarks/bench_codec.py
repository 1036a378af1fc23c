"""Bytes and seconds of every codec on the same integers, held against their order-0 entropy.

    python benchmarks/bench_codec.py [checkpoint.safetensors] [--step 0.4] [--out codec.json]

The matrices of a checkpoint, or without one Gaussian and Laplace draws of the same shapes, are rounded at steps of
so many σ of each. Then an artifact of about 16 MB, 32 million weights at 4 bits, is packed and read; --quick leaves
it out.
"""

import argparse
import json
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch

from pgolf_core.artifact.codec import CODECS, coded_bytes, decode, encode
from pgolf_core.config import RunConfig
from pgolf_core.export import export, load, quantize_state
from pgolf_core.model import GPT

SHAPES = [(384, 384), (192, 384), (192, 384), (384, 384), (768, 384), (384, 768)] * 6


def draw(kind: str, shapes: list[tuple[int, int]]) -> list[np.ndarray]:
    """Matrices of unit spread."""
    rng = np.random.default_rng(0)
    return [{"gaussian": rng.normal, "laplace": rng.laplace}[kind](size=shape) for shape in shapes]


def rounded(weights: list[np.ndarray], step: float) -> list[np.ndarray]:
    """int8, or int16 for the whole set where one does not fit, at steps of step·σ of each."""
    whole = [np.rint(w / (step * w.std())) for w in weights]
    dtype = np.int8 if max(np.abs(q).max() for q in whole) < 128 else np.int16
    return [q.astype(dtype) for q in whole]


def entropy_bytes(arrays: list[np.ndarray]) -> float:
    """Order-0 entropy, each array by itself."""
    total = 0.0
    for q in arrays:
        counts = np.unique(q, return_counts=True)[1]
        total -= (counts * np.log2(counts / q.size)).sum() / 8
    return total


def compare(arrays: list[np.ndarray]) -> dict[str, dict[str, float]]:
    """Bytes, ratio to the entropy and seconds of each codec, and of the count that codes nothing."""
    bar, rows = entropy_bytes(arrays), {}
    for codec in CODECS:
        start = time.perf_counter()
        blob = encode(arrays, codec)
        coded = time.perf_counter()
        decoded = decode(blob, [(q.dtype, q.shape) for q in arrays], codec)
        rows[codec] = dict(encode_seconds=coded - start, decode_seconds=time.perf_counter() - coded, bytes=len(blob))
        assert all(np.array_equal(a, b) for a, b in zip(arrays, decoded, strict=True))
    start = time.perf_counter()
    counted = sum(map(coded_bytes, arrays))
    rows["ans, counted"] = dict(encode_seconds=time.perf_counter() - start, bytes=counted)
    return {name: row | dict(ratio=row["bytes"] / bar) for name, row in rows.items()}


def whole_file(codec: str) -> dict[str, float]:
    """Of a 14 × 576 model: seconds from state dict to file, and from file to a model that can be run."""
    config = RunConfig(num_layers=14, model_dim=576, quantizer="step:0.26", codec=codec, allow_over_cap=True)
    torch.manual_seed(0)
    model = GPT(config.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    state = model.state_dict()
    quantized = quantize_state(state, config.export)
    entropy = entropy_bytes([t.q.numpy() for t in quantized.tensors.values()])
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        account = export(state, config.export, Path(folder) / "artifact")
        written = time.perf_counter()
        model.load_state_dict(load(Path(folder) / "artifact"))
        seconds = time.perf_counter() - written
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in quantized.state_dict().items())
    ratio = account.parts["weights"] / entropy
    return dict(encode_seconds=written - start, decode_seconds=seconds, bytes=account.artifact, ratio=ratio)


def show(title: str, rows: dict[str, dict[str, float]]) -> None:
    print(f"\n{title}")
    for name, row in rows.items():
        read = f"read {row['decode_seconds']:7.2f} s" if "decode_seconds" in row else ""
        print(
            f"  {name:14} {row['bytes']:>12,} B   {row['ratio']:.4f} of the entropy   "
            f"write {row['encode_seconds']:7.2f} s   {read}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path)
    parser.add_argument("--step", type=float, default=0.4, help="in σ of each matrix (default 0.4)")
    parser.add_argument("--quick", action="store_true", help="without the artifact of 16 MB")
    parser.add_argument("--out", type=Path, help="JSON of all figures")
    arguments = parser.parse_args()
    sets = {"gaussian": draw("gaussian", SHAPES), "laplace": draw("laplace", SHAPES)}
    if arguments.checkpoint:
        state = safetensors.numpy.load_file(arguments.checkpoint)
        sets = {arguments.checkpoint.name: [w.astype(np.float64) for w in state.values() if w.ndim == 2]}
    figures = {"versions": {package: version(package) for package in ("numpy", "brotli", "constriction")}}
    for name, weights in sets.items():
        arrays = rounded(weights, arguments.step)
        figures[name] = compare(arrays)
        show(f"{name}: {len(arrays)} matrices, {sum(q.size for q in arrays):,} weights", figures[name])
    if not arguments.quick:
        figures["artifact"] = {codec: whole_file(codec) for codec in ("ans", "auto")}
        show("artifact of a 14 × 576 model, 33 million weights", figures["artifact"])
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
