"""Which tensors deserve bytes: sensitivity by protecting one at a time, and the seed's residual allocations."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from pgolf_core import runs
from pgolf_core.config import RunConfig
from pgolf_core.data import Dataset
from pgolf_core.export import Quantized, pack, quantize_state, unpack
from pgolf_core.roundtrip import (
    cpu_threads,
    export_checkpoint,
    finished,
    load_checkpoint,
    model_of,
    open_dataset,
    pick_device,
    score_model,
    scoring_config,
    stored,
)

RESIDUAL_MODES = ("off", "early_proj_combo", "all_mlp_proj", "early_mlp_proj", "all_attn_proj", "early_combo")


def tensor_place(name: str) -> tuple[int | None, str]:
    """'blocks.3.mlp.fc.weight' -> (3, 'mlp.fc'); outside the blocks (None, name)."""
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)\.weight", name)
    return (int(match[1]), match[2]) if match else (None, name.removesuffix(".weight"))


def protect(quantized: Quantized, state: dict[str, Tensor], name: str) -> Quantized:
    """The same export with one tensor left in float16."""
    return replace(
        quantized,
        integers={k: t for k, t in quantized.integers.items() if k != name},
        residuals={k: r for k, r in quantized.residuals.items() if k != name},
        floats=quantized.floats | {name: state[name].to(torch.float16).contiguous()},
    )


def sensitivity(state: dict[str, Tensor], config: RunConfig, dataset: Dataset) -> Iterator[dict]:
    """Rows: first the plain export (tensor ''), then one a quantised tensor, protected in float16.

    bpb and bytes are of the whole artifact, packed and unpacked; delta_* against the plain export (negative
    bpb: protection helps); bpb_per_kb is the bits per byte won for each 1,000 bytes spent. Scored on
    roundtrip_val_max_tokens tokens.
    """
    device = pick_device(config)

    def score(quantized: Quantized) -> tuple[float, int]:
        artifact, _, _ = pack(quantized)
        model = model_of(unpack(artifact), config, device)
        return score_model(model, config, dataset, config.roundtrip_val_max_tokens).val_bpb, len(artifact)

    quantized = quantize_state(state, config.export)
    plain_bpb, plain_bytes = score(quantized)
    row = {"tensor": "", "layer": None, "part": "", "bpb": plain_bpb, "bytes": plain_bytes}
    yield row | {"delta_bpb": 0.0, "delta_bytes": 0, "bpb_per_kb": 0.0}
    for name in quantized.integers:
        layer, part = tensor_place(name)
        bpb, size = score(protect(quantized, state, name))
        row = {"tensor": name, "layer": layer, "part": part, "bpb": bpb, "bytes": size}
        delta_bpb, delta_bytes = bpb - plain_bpb, size - plain_bytes
        won = -delta_bpb / (delta_bytes / 1000) if delta_bytes else 0.0
        yield row | {"delta_bpb": delta_bpb, "delta_bytes": delta_bytes, "bpb_per_kb": won}


def map_sensitivity(source_dir: str | Path, run_dir: str | Path, tokens: int = 0, **knobs) -> runs.Result:
    """A run whose table is the sensitivity of source_dir's checkpoint on `tokens` validation tokens; 0 = its own.

    knobs: other export or eval knobs. Returns the stored result when the directory is complete. Raises
    RunError when the source is not, ConfigError on knobs of training.
    """
    source_dir, run_dir = Path(source_dir), Path(run_dir)
    source, config = finished(source_dir)
    config = scoring_config(config, knobs | ({"roundtrip_val_max_tokens": tokens} if tokens else {}))
    with runs.claim(run_dir, config), cpu_threads(config):
        if (result := stored(run_dir, source_dir, source)) is not None:
            return result
        dataset = open_dataset(config)
        rows = []
        for row in sensitivity(load_checkpoint(source_dir / runs.CHECKPOINT), config, dataset):
            rows.append(row)
            print(
                f"{row['tensor'] or 'plain export':32} {row['bpb']:.5f} bpb {row['delta_bpb']:+.5f}  {row['bytes']:,} B"
            )
        return _write_stage(run_dir, "sensitivity", source_dir, source, config, dataset.fingerprint, rows)


def residual_variants(budgets: Iterable[int]) -> dict[str, dict]:
    """Variant name -> export knobs: no residual, then every mode of the seed at each budget in bytes."""
    variants = {"plain": dict(int8_residual_rank=0, int8_residual_budget_bytes=0, int8_targeted_residual_mode="off")}
    for budget in budgets:
        for mode in RESIDUAL_MODES:
            name = "global" if mode == "off" else mode
            variants[f"{name}-{budget}"] = dict(
                int8_residual_rank=1, int8_residual_budget_bytes=budget, int8_targeted_residual_mode=mode
            )
    return {
        name + suffix: knobs | {"mlp_permutation": permutation}
        for name, knobs in variants.items()
        for suffix, permutation in (("", False), ("-permuted", True))
        if not permutation or name.split("-")[0] in ("plain", "early_proj_combo")  # as the seed crossed them
    }


def allocate_residuals(source_dir: str | Path, run_dir: str | Path, budgets: Iterable[int], **knobs) -> runs.Result:
    """A run with a sub-run for each of residual_variants: a real file, really scored; the table compares them.

    knobs: other export or eval knobs for all of them. Sub-runs that are complete are not done again. Raises
    RunError when the source is incomplete, ConfigError on knobs of training.
    """
    source_dir, run_dir = Path(source_dir), Path(run_dir)
    source, config = finished(source_dir)
    config = scoring_config(config, knobs)
    with runs.claim(run_dir, config):
        if (result := stored(run_dir, source_dir, source)) is not None:
            return result
        rows = []
        for name, own in residual_variants(budgets).items():
            variant = export_checkpoint(source_dir, run_dir / name, **knobs | own)
            row = {
                "variant": name,
                "mode": own["int8_targeted_residual_mode"],
                "budget_bytes": own["int8_residual_budget_bytes"],
                "permuted": own["mlp_permutation"],
                "bpb": variant.roundtrip_val_bpb,
                "total_bytes": variant.total_bytes,
            }
            plain = rows[0] if rows else row
            row["delta_bpb"] = row["bpb"] - plain["bpb"]
            row["delta_bytes"] = row["total_bytes"] - plain["total_bytes"]
            rows.append(row)
            print(f"{name:32} {row['bpb']:.5f} bpb {row['delta_bpb']:+.5f}  {row['total_bytes']:,} B")
        return _write_stage(run_dir, "residual_allocation", source_dir, source, config, variant.data_fingerprint, rows)


def _write_stage(
    run_dir: Path,
    kind: str,
    source_dir: Path,
    source: runs.Result,
    config: RunConfig,
    fingerprint: str,
    rows: list[dict],
) -> runs.Result:
    """A stage's result: its table, and nothing that a frontier would take for a score of its own."""
    result = runs.Result(
        kind=kind,
        config_hash=config.hash,
        seed=source.seed,
        track=source.track,
        source=f"{source_dir.parent.name}/{source_dir.name}",
        checkpoint_sha256=source.checkpoint_sha256,
        data_fingerprint=fingerprint,
        protocol=runs.evaluation_protocol(config),
        environment=runs.environment(pick_device(config)),
        table=rows,
    )
    return runs.write_result(run_dir, result)
