"""Export ablation: many files of one checkpoint, each written, read back and scored; the stages of two notebooks."""

import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from pgolf.analysis.frontier import INT8_ZLIB_BASELINE
from pgolf.analysis.record_exports import RECORD_EXPORTS, solver_caps
from pgolf.runs.result import CHECKPOINT, Result, read_result
from pgolf.studies.reexport import derive, export_checkpoint, scoring_config, study
from pgolf.training.inputs import open_dataset
from pgolf.training.round_trip import load_checkpoint
from pgolf_core.config import RunConfig
from pgolf_core.device import pick_device
from pgolf_core.export_inputs import calibration_of
from pgolf_core.quantization.calibration import Calibration

Variants = dict[str, dict]  # name -> export knobs

# Every matrix quantised, control parameters in float16, the best codec.
ANS_ALL_QUANTIZED = INT8_ZLIB_BASELINE | dict(codec="ans", control_dtype="float16", keep_float_max_numel=0)
RESIDUAL_MODES = ("off", "early_proj_combo", "all_mlp_proj", "early_mlp_proj", "all_attn_proj", "early_combo")
LQER = dict(int8_residual_rank=4, int8_residual_bits=4, int8_residual_group=64)
MAX_AT_ONCE = 4  # more wait for each other in Python
EMBED_STEP = 0.25  # relative to other matrices: the embedding is the most sensitive per byte
CODEBOOKS = ("codebook:32:1:0.06", "codebook:256:2:0.06")  # 0.06: price on bits; without it a uniform step is better


def residual_variants(budgets: Iterable[int]) -> Variants:
    """No residual; the reference's modes at each budget in bytes; low-rank residuals in 4 bits."""
    variants: Variants = {"plain": {}}
    for budget in budgets:
        for mode in RESIDUAL_MODES:
            name = "global" if mode == "off" else mode
            variants[f"{name}-{budget}"] = dict(
                int8_residual_rank=1, int8_residual_budget_bytes=budget, int8_targeted_residual_mode=mode
            )
    permuted = {  # crossed as in the reference
        f"{name}-permuted": knobs | dict(mlp_permutation=True)
        for name, knobs in variants.items()
        if name.split("-")[0] in ("plain", "early_proj_combo")
    }
    low_rank = {f"LQER-{budget}": LQER | dict(int8_residual_budget_bytes=budget) for budget in budgets}
    return {name: INT8_ZLIB_BASELINE | knobs for name, knobs in (variants | permuted | low_rank).items()}


def lab_variants(steps: Iterable[float], codecs: Iterable[str]) -> Variants:
    """Codecs on the reference's integers; at each step size: σ-tied, GPTQ, Fisher, a residual; then other schemes."""
    variants = {f"int8 {codec}": INT8_ZLIB_BASELINE | dict(codec=codec) for codec in codecs}
    for bits in (4, 6):
        variants[f"int{bits} ans"] = INT8_ZLIB_BASELINE | dict(codec="ans", weight_quantization_bits=bits)
    for c in steps:
        tied = ANS_ALL_QUANTIZED | dict(quantizer=f"step:{c}", embed_quantizer=f"step:{EMBED_STEP * c:.3g}")
        fisher = tied | {name: f"{tied[name]}:fisher" for name in ("quantizer", "embed_quantizer")}
        variants[f"step {c}"] = tied
        variants[f"step {c} gptq"] = tied | dict(gptq=True)
        variants[f"step {c} gptq fisher"] = fisher | dict(gptq=True)
        variants[f"step {c} LQER"] = tied | LQER | dict(int8_residual_budget_bytes=32_768)
    schemes = {f"sdclip {bits} bits": f"sdclip:{bits}:{2 ** (bits - 2)}" for bits in (4, 5, 6)}
    schemes |= {word: word for word in ("ternary", *CODEBOOKS)}
    for name, quantizer in schemes.items():
        variants[name] = ANS_ALL_QUANTIZED | dict(quantizer=quantizer, embed_quantizer=f"step:{EMBED_STEP * 0.4:.3g}")
    variants["ternary gptq"] = variants["ternary"] | dict(gptq=True)
    return variants


def solver_variants(
    rows: list[dict], shares: Iterable[float], caps: Iterable[int] = (), learn_steps: int = 0, equal_loss: bool = True
) -> Variants:
    """The solver's file for each cap in bytes, code included, and for each share of the first row's bytes.

    learn_steps: 0 = off; else each of these files also after so many. equal_loss: then those to hold beside the
    records' files, which are sought among the rows finished so far.
    """
    caps = sorted({*caps, *(int(share * rows[0]["total_bytes"]) for share in shares)}, reverse=True)
    learned = {f"learn {cap}": _solved(cap) | dict(learn_steps=learn_steps) for cap in caps if learn_steps}
    caps += solver_caps(rows, caps) if equal_loss else []
    return {f"solve {cap}": _solved(cap) for cap in caps} | learned


def _solved(cap: int) -> dict:
    return ANS_ALL_QUANTIZED | dict(allocation="solve", cap_bytes=cap)


def allocate_residuals(source_dir: str | Path, run_dir: str | Path, budgets: Iterable[int], **knobs) -> Result:
    """A run with a sub-run per residual variant, and the solver's file of as many bytes as the plain one."""
    solver = partial(solver_variants, shares=[1.0])
    return _lab("residual_allocation", source_dir, run_dir, residual_variants(budgets), solver, knobs)


def export_lab(
    source_dir: str | Path,
    run_dir: str | Path,
    steps: Iterable[float],
    codecs: Iterable[str] = ("zlib", "lzma", "brotli", "ans"),
    shares: Iterable[float] = (1.0, 0.8, 0.6, 0.4),
    caps: Iterable[int] = (),
    equal_loss: bool = True,
    **knobs,
) -> Result:
    """A run with a sub-run per lab variant, the records' exports among them, and the solver's files.

    shares: size limits of the solver relative to int8 under zlib of this checkpoint. caps: further limits in bytes.
    equal_loss: search the solver's smallest files that lose no more than the records', some ten files more.
    knobs: with learn_steps the solver's files of these limits also after learning; the others apply to all files.
    """
    variants = {"plain": INT8_ZLIB_BASELINE} | lab_variants(steps, codecs) | RECORD_EXPORTS
    limits = dict(shares=tuple(shares), caps=tuple(caps), learn_steps=int(knobs.pop("learn_steps", 0)))
    solver = partial(solver_variants, **limits, equal_loss=equal_loss)
    return _lab("export_lab", source_dir, run_dir, variants, solver, knobs)


def _lab(
    kind: str, source_dir: str | Path, run_dir: str | Path, variants: Variants,
    solver: Callable[[list[dict]], Variants], knobs: dict,
) -> Result:  # fmt: skip
    """A result whose table compares all variants with the first, named plain; knobs apply to all of them.

    solver: the variants that follow from the rows so far, until none is new. Sub-runs that are complete are not done
    again. Raises RunError if the source is incomplete, ConfigError on knobs of training.
    """
    knobs = {"learn_steps": 0} | knobs  # the source's own; a variant that learns says so

    def make(source: Result, trained: RunConfig, config: RunConfig) -> Result:
        rows: list[dict] = []
        calibration, scored = None, {}  # shared, since no variant changes a knob of calibration or eval

        def calibrate(config: RunConfig) -> Calibration:
            state, dataset = load_checkpoint(Path(source_dir) / CHECKPOINT), open_dataset(config)
            return calibration_of(state, config, dataset.train_shards, pick_device(config.train))

        def needs(own: dict) -> bool:
            return scoring_config(config, own).export.needs_calibration

        def export(name: str, own: dict) -> Result:
            made = calibration.result() if calibration and needs(own) else None
            return export_checkpoint(source_dir, _variant_dir(run_dir, name), made, scored, **knobs | own)

        todo = variants
        with ThreadPoolExecutor(_at_once(config)) as pool:
            while todo:
                todo = dict(sorted(todo.items(), key=lambda item: needs(item[1])))  # others begin meanwhile
                new = [own for name, own in todo.items() if read_result(_variant_dir(run_dir, name)) is None]
                if calibration is None and (needing := [own for own in new if needs(own)]):
                    calibration = pool.submit(calibrate, scoring_config(config, needing[0]))
                for (name, own), variant in zip(todo.items(), pool.map(export, todo, todo.values()), strict=True):
                    rows.append(_row(name, own, variant, rows[0] if rows else None))
                    line = "{variant:36} {bpb:.5f} bpb {delta_bpb:+.5f}  {total_bytes:>11,} B  {share:.3f}"
                    print(line.format(**rows[-1]), flush=True)
                todo = {name: own for name, own in solver(rows).items() if all(name != row["variant"] for row in rows)}
        place = {name: i for i, name in enumerate(variants)}
        rows.sort(key=lambda row: place.get(row["variant"], len(place)))
        return study(kind, source, config, rows, variant.data_fingerprint)

    def answers(stored: Result) -> bool:
        asked = variants | solver(stored.table)
        return {row["variant"]: row["knobs"] for row in stored.table} == asked

    return derive(source_dir, run_dir, knobs, make, answers)


def _variant_dir(run_dir: str | Path, name: str) -> Path:
    return Path(run_dir) / re.sub(r"[^\w.]+", "-", name)


def _at_once(config: RunConfig) -> int:
    """Variants made at a time, each on the threads of the knob cpu_threads."""
    on_cpu = pick_device(config.train).type == "cpu"
    return max(1, min(MAX_AT_ONCE, (os.cpu_count() or 1) // torch.get_num_threads())) if on_cpu else 1


def _row(name: str, knobs: dict, variant: Result, plain: dict | None) -> dict:
    """A variant's row of the table; delta_* and share compare it with the first row."""
    bpb, size = variant.roundtrip_val_bpb, variant.total_bytes
    plain = plain or {"bpb": bpb, "total_bytes": size}
    return {
        "variant": name, "bpb": bpb, "delta_bpb": bpb - plain["bpb"],
        "total_bytes": size, "delta_bytes": size - plain["total_bytes"], "share": size / plain["total_bytes"],
        "raw_bpb": variant.prequant_val_bpb, "bytes": variant.bytes, "knobs": knobs,
        "block_nats": variant.roundtrip_block_nats, "raw_block_nats": variant.prequant_block_nats,
        "text_bytes": variant.roundtrip_bytes,
    }  # fmt: skip
