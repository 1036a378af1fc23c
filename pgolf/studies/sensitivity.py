"""Sensitivity map of a checkpoint: rise of bits per byte and bytes saved, one tensor changed at a time."""

import math
from pathlib import Path

import torch
from torch import Tensor

from pgolf.analysis.statistics import compare_blocks
from pgolf.data.dataset import Dataset
from pgolf.runs.result import CHECKPOINT, Result, RunError
from pgolf.studies.exact_map import exact_scores
from pgolf.studies.reexport import derive, study
from pgolf.training.inputs import open_dataset, scored_tokens
from pgolf.training.round_trip import load_checkpoint
from pgolf_core.artifact.format import pack
from pgolf_core.batches import sequences
from pgolf_core.config import RunConfig
from pgolf_core.device import pick_device, pick_dtype
from pgolf_core.evaluate import batches, scored_nats
from pgolf_core.export import quantize_state, stored_float
from pgolf_core.export_inputs import calibration_of, model_of
from pgolf_core.knobs import ExportConfig
from pgolf_core.model import GPT, roles
from pgolf_core.parameters import tensor_place
from pgolf_core.quantization.calibration import calibrate
from pgolf_core.quantization.stored import Quantized

# Steps of 2σ leave about 1.2 bits per weight. Finer changes measure the tokens more than the tensors: the two halves
# of 16,384 tokens rank the 37 tensors of a 6×384 checkpoint alike by a Spearman correlation of 0.94 at 2σ, 0.50 at 1σ.
COARSE = "step:2"

GRADIENT_WINDOWS = 2  # the estimate's gradient is of every second window
GRADIENT_BATCH_TOKENS = 4096  # activations of so many are held at a time
FISHER_SHARE = 16  # the estimate's Fisher information is of one training token per 16 scored
FISHER_TOKENS = 8192  # and of no more than these


def estimate(
    state: dict[str, Tensor], changes: dict[str, Tensor], config: RunConfig, dataset: Dataset, tokens: Tensor
) -> dict[str, float]:
    """Name -> predicted rise in bits per byte on tokens (n,) when that one tensor of the float32 model is changed.

    First order: gradient · change of the scored loss, on every second window of these very tokens. Second order:
    half of Fisher · change², from `calibrate` on training text. An export never sees the former: it is most of what
    there is in small changes and in late layers.
    Limits: the first order is half a sample, so rises below about 1e-4 bpb (8 bits) come in no reliable order. The
    second order takes weights and positions for independent and the loss for a parabola; it is two to five times
    too low for mlp.fc, and worse for changes that ruin the model.
    """
    device = pick_device(config.train)
    model = GPT(config.model).to(device)
    model.load_state_dict(state)
    fisher_tokens = max(1, min(FISHER_TOKENS, tokens.numel() // FISHER_SHARE))
    fisher = calibrate(model, sequences(dataset.train_shards, fisher_tokens, config.train_seq_len))
    windows = max(1, GRADIENT_BATCH_TOKENS // config.eval.eval_seq_len)
    small = config.eval.model_copy(update={"val_batch_size": GRADIENT_BATCH_TOKENS, "sw_eval_batch": windows})
    targets = text_bytes = 0
    for batch in batches(tokens, dataset.byte_table, small, device, every=GRADIENT_WINDOWS):
        scored_nats(model(batch.ids), batch, small).sum().backward()
        targets += batch.tokens
        text_bytes += batch.bytes.item()
    bpb_per_nat = targets / text_bytes / math.log(2)
    rises = {}
    for name, changed in changes.items():
        weight = model.get_parameter(name)
        change = changed.float().cpu() - weight.detach().float().cpu()
        first = (weight.grad.cpu() / targets * change).sum(dtype=torch.float64).item()
        second = fisher[name].cost(change) if name in fisher else 0.0
        rises[name] = (first + second) * bpb_per_nat
    return rises


def only(quantized: Quantized, names: set[str]) -> Quantized:
    """The part of an export that stores these tensors in few bits."""
    tensors = {name: t for name, t in quantized.tensors.items() if name in names}
    return Quantized(tensors, {name: r for name, r in quantized.residuals.items() if name in names}, {})


def protect(quantized: Quantized, name: str, stored: Tensor) -> Quantized:
    """The same export with one tensor stored as this float tensor."""
    others = only(quantized, quantized.tensors.keys() - {name})
    return Quantized(others.tensors, others.residuals, quantized.floats | {name: stored})


def sensitivity(state: dict[str, Tensor], config: RunConfig, dataset: Dataset, change: str = COARSE) -> list[dict]:
    """Rows: first the unchanged model (tensor ''), then one for each tensor that the export quantises.

    change: what is done to one tensor at a time.
        a quantizer, as 'step:2': rounded to nearest, all others left as trained
        'quantise': as the export knobs say, all others left as trained
        'protect': left in float16, all others as the export knobs say
    bpb is exact, scored on roundtrip_val_max_tokens tokens; delta_bpb and estimated_delta_bpb are rises over the
    first row, delta_half is the half width of the 95 % interval of delta_bpb over other text. tensor_bytes: the
    tensor's own, coded by the knob codec (float16 if protected). bytes: the coded file of that row, for 'protect' a
    real one; else all in float16 plus the difference of the tensor's coded bytes. bpb_per_kb = −1000 · delta_bpb /
    delta_bytes: bits per byte that 1,000 coded bytes are worth in this tensor, won when they are spent ('protect')
    and lost when they are saved; negative if more bytes score worse. Raises ValueError when no tensor is quantised.
    """
    config = _probe(config, change)
    device, role_of = pick_device(config.train), roles(config.model)
    calibration = calibration_of(state, config, dataset.train_shards, device)
    quantized = quantize_state(state, config.export, calibration, role_of)
    names = [name for name in state if name in quantized.tensors]
    if not names:
        raise ValueError(f"change={change}: no tensor of this model is quantised, so there is nothing to map")
    floats = {name: stored_float(t.detach().cpu(), role_of[name], config.export) for name, t in state.items()}
    rounded = quantized.state_dict()
    if change == "protect":
        base, changes = rounded, {name: floats[name].float() for name in names}
    else:
        base, changes = state, {name: rounded[name] for name in names}
    own, files = _coded_bytes(quantized, {name: floats[name] for name in names}, floats, change, config.codec)
    tokens = scored_tokens(dataset, config.train_seq_len, config.eval, roundtrip=True)
    model, dtype = model_of(base, config, device), pick_dtype(config.train, device)
    scores = exact_scores(model, changes, tokens, dataset.byte_table, config.eval, dtype)
    estimates = estimate(base, changes, config, dataset, tokens)
    rows = []
    for name in ("", *names):
        layer, part = tensor_place(name)
        delta_bpb, delta_bytes = scores[name].val_bpb - scores[""].val_bpb, files[name] - files[""]
        rows.append({
            "tensor": name, "layer": layer, "part": part, "change": change,
            "bpb": scores[name].val_bpb, "bytes": files[name], "tensor_bytes": own.get(name, 0),
            "delta_bpb": delta_bpb,
            "delta_half": compare_blocks(scores[name].block_nats, scores[""].block_nats, scores[""].bytes).half,
            "estimated_delta_bpb": estimates.get(name, 0.0), "delta_bytes": delta_bytes,
            "bpb_per_kb": -1000 * delta_bpb / delta_bytes if delta_bytes else 0.0,
        })  # fmt: skip
    return rows


def _coded_bytes(
    quantized: Quantized, mapped: dict[str, Tensor], floats: dict[str, Tensor], change: str, codec: str
) -> tuple[dict[str, int], dict[str, int]]:
    """Coded bytes of each mapped tensor's changed form alone, and of each row's whole file ('' = the unchanged one).

    mapped and floats: the mapped tensors, and all, as they are stored in float.
    """

    def size(file: Quantized) -> int:
        return len(pack(file, codec).bytes)

    frame = size(only(quantized, set()))  # a file of no tensors
    as_float = {name: size(Quantized({}, {}, {name: t})) - frame for name, t in mapped.items()}
    if change == "protect":
        return as_float, {"": size(quantized)} | {n: size(protect(quantized, n, t)) for n, t in mapped.items()}
    own = {name: size(only(quantized, {name})) - frame for name in mapped}
    unchanged = size(Quantized({}, {}, floats))
    return own, {"": unchanged} | {name: unchanged + own[name] - as_float[name] for name in mapped}


def _probe(config: RunConfig, change: str) -> RunConfig:
    """The knobs under which tensors are quantised. ConfigError naming a quantizer that is none."""
    # Neurons in another order make the same model only if fc and proj both have it.
    # Learned levels make up for each other, so that none has an error of its own.
    config = config.with_knobs(mlp_permutation=False, learn_steps=0)
    if change in ("quantise", "protect"):
        return config
    others = [name for name in ExportConfig.model_fields if name.endswith("_quantizer")]
    return config.with_knobs(
        quantizer=change, **dict.fromkeys(others, ""), allocation="fixed", gptq=False, int8_residual_rank=0
    )


def map_sensitivity(
    source_dir: str | Path, run_dir: str | Path, tokens: int = 0, change: str = COARSE, **knobs
) -> Result:
    """A run whose table is the sensitivity of source_dir's checkpoint on `tokens` validation tokens; 0 = its own.

    change: as `sensitivity`. knobs: other export or eval knobs. Returns the stored result when the directory is
    complete. Raises RunError when the source is not complete or the stored map is of another change, ConfigError on
    knobs of training.
    """
    limits = dict(roundtrip_val_max_tokens=tokens, roundtrip_val_max_documents=0) if tokens else {}

    def make(source: Result, trained: RunConfig, config: RunConfig) -> Result:
        dataset = open_dataset(config)
        rows = sensitivity(load_checkpoint(Path(source_dir) / CHECKPOINT), config, dataset, change)
        for row in rows:
            print(
                f"{row['tensor'] or 'unchanged':32} {row['bpb']:.5f} bpb {row['delta_bpb']:+.5f}  "
                f"estimated {row['estimated_delta_bpb']:+.5f}  {row['delta_bytes']:+,} B"
            )
        return study("sensitivity", source, config, rows, dataset.fingerprint)

    def answers(stored: Result) -> bool:
        if (was := stored.table[0]["change"]) != change:
            raise RunError(f"{run_dir}: a map of change={was}, not {change}; choose another folder")
        return True

    return derive(source_dir, run_dir, knobs | limits, make, answers)
