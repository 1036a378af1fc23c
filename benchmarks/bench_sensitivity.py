"""The sensitivity map three ways: whole evaluations, with shared prefixes, estimated. The same numbers, at what cost?

    python benchmarks/bench_sensitivity.py runs/explore/base [--tokens 32768] [--change step:2] [--out FILE.json]

On one thread. Seconds are of the process, which other work on the machine disturbs less than the clock.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pgolf.runs.result import CHECKPOINT, finished_run
from pgolf.studies import sensitivity
from pgolf.studies.exact_map import exact_scores
from pgolf.training.inputs import open_dataset
from pgolf.training.round_trip import load_checkpoint
from pgolf_core.device import pick_device, pick_dtype
from pgolf_core.evaluate import Score, evaluate
from pgolf_core.export import quantize_state
from pgolf_core.export_inputs import model_of
from pgolf_core.model import roles


def timed(work: Callable[[], dict]) -> tuple[dict, float, float]:
    """Result, seconds of the process, seconds of the clock."""
    clock, start = time.perf_counter(), time.process_time()
    result = work()
    return result, time.process_time() - start, time.perf_counter() - clock


def correlations(a: Tensor, b: Tensor) -> dict[str, float]:
    ranks = torch.stack([a, b]).argsort(1).argsort(1).double()
    return {"spearman": torch.corrcoef(ranks)[0, 1].item(), "pearson": torch.corrcoef(torch.stack([a, b]))[0, 1].item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="directory of a finished run")
    parser.add_argument("--tokens", type=int, default=32_768, help="of validation (default 32768)")
    parser.add_argument("--change", default=sensitivity.COARSE, help=f"quantizer (default {sensitivity.COARSE})")
    parser.add_argument("--out", type=Path, help="JSON of all figures")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = finished_run(arguments.run)[1].with_knobs(quantizer=arguments.change)
    dataset, state = open_dataset(config), load_checkpoint(arguments.run / CHECKPOINT)
    device, dtype = pick_device(config.train), pick_dtype(config.train, pick_device(config.train))
    tokens = dataset.validation(config.train_seq_len, arguments.tokens)
    quantized = quantize_state(state, config.export, roles=roles(config.model))
    changes = {name: t for name, t in quantized.state_dict().items() if name not in quantized.floats}
    model = model_of(state, config, device)

    def whole() -> dict[str, Score]:
        scores = {}
        for name in ("", *changes):
            model.load_state_dict(state | {n: t for n, t in changes.items() if n == name})
            scores[name] = evaluate(model, tokens, dataset.byte_table, config.eval, dtype)
        model.load_state_dict(state)
        return scores

    def shared() -> dict[str, Score]:
        return exact_scores(model, changes, tokens, dataset.byte_table, config.eval, dtype)

    def estimate() -> dict[str, float]:
        return sensitivity.estimate(state, changes, config, dataset, tokens)

    evaluate(model, tokens[: config.train_seq_len + 1], dataset.byte_table, config.eval, dtype)  # warm
    results, figures = {}, {"tokens": tokens.numel() - 1, "tensors": len(changes), "change": arguments.change}
    for work in (estimate, shared, whole):
        results[work.__name__], process, clock = timed(work)
        figures[work.__name__] = {"process_seconds": process, "clock_seconds": clock}
        print(f"{work.__name__:10} {process:8.1f} s of the process {clock:8.1f} s of the clock", flush=True)
    exact = results["shared"]
    rises = torch.tensor([exact[name].val_bpb - exact[""].val_bpb for name in changes], dtype=torch.float64)
    estimated = torch.tensor([results["estimate"][name] for name in changes], dtype=torch.float64)
    figures |= {
        "same": exact == results["whole"],
        "shared_of_whole": figures["shared"]["process_seconds"] / figures["whole"]["process_seconds"],
        "shared_over_estimate": figures["shared"]["process_seconds"] / figures["estimate"]["process_seconds"],
        **correlations(rises, estimated),
        "rows": {n: [rises[i].item(), estimated[i].item()] for i, n in enumerate(changes)},
    }
    print(f"shared prefixes: same numbers {figures['same']}, {figures['shared_of_whole']:.3f} of the time")
    print(
        f"estimate: {figures['shared_over_estimate']:.1f} times faster than that, "
        f"Spearman {figures['spearman']:.3f}, Pearson {figures['pearson']:.4f}"
    )
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
