"""A checkpoint made elsewhere becomes a run: read without running its code, stored, read back and scored."""

import hashlib
import pickle
import re
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pgolf.disk import removed_on_error
from pgolf.runs.directory import describe_environment, locked, write_environment
from pgolf.runs.result import ARTIFACT, CHECKPOINT, Result, RunError, read_result, write_result
from pgolf.training.inputs import check_scored, open_dataset
from pgolf.training.round_trip import round_trip, roundtrip_fields, score_model
from pgolf_core.config import ConfigError, RunConfig
from pgolf_core.device import cpu_threads, pick_device
from pgolf_core.export_inputs import model_of
from pgolf_core.files import atomic_write
from pgolf_core.model import skeleton

State = dict[str, Tensor]
KIND = "checkpoint"  # kind of the result
WRAPPERS = ("model", "state_dict", "model_state_dict", "module", "weights")  # keys under which trainers keep weights
PREFIXES = ("_orig_mod.", "module.", "model.")  # torch.compile, DistributedDataParallel, wrapper modules
# Per-block names of the public baseline, whose blocks are sequential, and the stacked parameter here.
PER_BLOCK = {
    "attn.q_gain": "q_gains", "attn_scale": "attn_scales", "mlp_scale": "mlp_scales", "resid_mix": "resid_mixes",
}  # fmt: skip
MAX_NAMED = 8  # tensors in a message
MAX_DEPTH = 3  # dictionaries around the weights
MAX_ELEMENTS_PER_BYTE = 4  # limit for a file: an element has a byte or more, and tied ones are stored once


@dataclass(frozen=True)
class Checkpoint:
    """The weights under our names, in float32, and the knobs that their names and shapes tell."""

    state: State
    knobs: dict


def read_checkpoint(path: str | Path) -> Checkpoint:
    """The weights in a file of safetensors or torch.save (weights_only), whatever its ending. RunError if neither."""
    path = Path(path)
    if not path.is_file():
        raise RunError(f"{path}: no such file")
    found = _tensors(_read(path))
    if not found:
        raise RunError(f"{path}: holds no tensors by name; save model.state_dict()")
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in found):
            found = {name.removeprefix(prefix): t for name, t in found.items()}
    for name, t in found.items():
        if not t.is_floating_point() or t.layout != torch.strided or t.device.type != "cpu":
            raise RunError(f"{path}: tensor {name} holds {t.dtype} ({t.layout}, {t.device}), not dense float weights")
    if sum(t.numel() for t in found.values()) > MAX_ELEMENTS_PER_BYTE * path.stat().st_size:
        raise RunError(f"{path}: its tensors are views that unfold to far more than the file holds")
    state = {name: t.detach().float().contiguous() for name, t in found.items()}
    if broken := [name for name, t in state.items() if not t.isfinite().all()]:
        raise RunError(f"{path}: tensor {broken[0]} holds NaN or infinity")
    state, sequential = _stacked(state)
    return Checkpoint(state, knobs_of(state, sequential))


def _read(path: Path) -> object:
    try:
        with path.open("rb") as file:
            pickled = file.read(1) == b"\x80"  # torch.save before it wrote zip files
        if pickled or zipfile.is_zipfile(path):
            return torch.load(path, map_location="cpu", weights_only=True)
        return safetensors.torch.load_file(path)
    except pickle.UnpicklingError as error:
        why = "holds objects besides tensors, which would run code to load"
        raise RunError(f"{path}: {why}; save model.state_dict() alone") from error
    except (safetensors.SafetensorError, RuntimeError, EOFError, KeyError, ValueError) as error:
        why = " ".join(str(error).split())[:200]
        raise RunError(f"{path}: neither a whole .safetensors file nor one of torch.save ({why})") from error


def _tensors(content: object, depth: int = 0) -> State:
    """The tensors of a state dict, or of the one that a training checkpoint holds; {} without any."""
    if not isinstance(content, dict) or depth > MAX_DEPTH:
        return {}
    found = {str(name): t for name, t in content.items() if isinstance(t, Tensor)}
    inner = [content[key] for key in WRAPPERS if isinstance(content.get(key), dict)]
    return max([found, *(_tensors(each, depth + 1) for each in inner)], key=len)


def _stacked(state: State) -> tuple[State, bool]:
    """The state with the baseline's parameters per block stacked by layer, and whether it had any."""
    state, stacked = dict(state), False
    for part, name in PER_BLOCK.items():
        own = {int(m[1]): key for key in state if (m := re.fullmatch(rf"blocks\.(\d+)\.{re.escape(part)}", key))}
        alike = len({state[key].shape for key in own.values()}) == 1
        if alike and [*sorted(own)] == [*range(len(own))]:
            state[name] = torch.stack([state.pop(own[i]) for i in range(len(own))])
            stacked = True
    return state, stacked


def knobs_of(state: State, sequential: bool = False) -> dict:
    """The knobs that names and shapes tell; those that they do not are left out. sequential: no layer is parallel."""
    shape, knobs = {name: tuple(t.shape) for name, t in state.items()}, {}

    def size(name: str, axis: int, dims: int) -> int | None:
        return shape[name][axis] if len(shape.get(name, ())) == dims else None

    layers, heads = size("q_gains", 0, 2), size("q_gains", 1, 2)
    dim = size("attn_scales", 1, 2) or size("blocks.0.attn.c_q.weight", 1, 2)
    blocks = len({m[1] for name in state if (m := re.match(r"blocks\.(\d+)\.", name))})
    rows = {part: size(f"blocks.0.{part}.weight", 0, 2) for part in ("attn.c_k", "mlp.fc")}
    embed = size("tok_emb.weight", 1, 2)
    knobs |= dict(vocab_size=size("tok_emb.weight", 0, 2), num_layers=layers, num_heads=heads, model_dim=dim)
    if layers and blocks:
        knobs["num_unique_blocks"] = blocks if blocks < layers else 0
    if dim and heads and rows["attn.c_k"]:
        knobs["num_kv_heads"] = rows["attn.c_k"] * heads // dim
    if dim and rows["mlp.fc"]:
        knobs["mlp_mult"] = rows["mlp.fc"] // dim
    if dim and embed:
        knobs["embed_dim"] = embed if embed < dim else 0
    knobs["tie_embeddings"] = "lm_head.weight" not in state
    if sequential and layers:
        knobs["parallel_from"] = layers
    knobs |= _options(state, size)
    return {name: value for name, value in knobs.items() if value is not None}


def _options(state: State, size) -> dict:
    """Knobs of the options whose parameters are there."""
    parts = {name.partition(".")[0] for name in state}
    knobs = {}
    if "bigram_hash" in parts:
        knobs |= dict(bigram_vocab_size=size("bigram_hash.table.weight", 0, 2))
        knobs |= dict(bigram_dim=size("bigram_hash.table.weight", 1, 2))
    if "value_embed" in parts:
        knobs |= dict(ve_last=size("value_embed.layer_scales", 0, 1), ve_dim=size("value_embed.table.weight", 1, 2))
    if "skip_gates" in parts:
        knobs["skip_gates"] = True
    if "softcaps" in parts:
        knobs["asymmetric_softcap"] = True
    if "lanes" in parts:
        knobs["residual_lanes"] = 2
    if "smear_gate" in parts:
        knobs["smear_gate"] = "v2" if "smear_gate.strength" in state else "v1"
    return knobs


def fitted_config(checkpoint: Checkpoint, path: Path, given: dict) -> RunConfig:
    """The RunConfig of the checkpoint's knobs and the given ones, which win. RunError if its model has other tensors.

    The message names tensors that are missing, too many or of another shape, and given knobs that the shapes deny.
    """
    config = RunConfig(**checkpoint.knobs | given)
    try:
        wanted = {name: tuple(t.shape) for name, t in skeleton(config.model).state_dict().items()}
    except RuntimeError as error:
        told = " ".join(f"{name}={value}" for name, value in checkpoint.knobs.items())
        raise RunError(f"{path}: its shapes tell {told}, and no memory holds such a model") from error
    found = {name: tuple(t.shape) for name, t in checkpoint.state.items()}
    problems = [
        *_listed("missing", [f"{name} {shape}" for name, shape in wanted.items() if name not in found]),
        *_listed("not in the model of these knobs", [f"{n} {shape}" for n, shape in found.items() if n not in wanted]),
        *_listed(
            "of another shape",
            [f"{n} {found[n]}, the model's {shape}" for n, shape in wanted.items() if found.get(n, shape) != shape],
        ),
    ]
    if not problems:
        return config
    denied = {name: v for name, v in checkpoint.knobs.items() if name in given and getattr(config, name) != v}
    if not checkpoint.state.keys() & wanted.keys():
        problems = [f"{path.name} has none of the model's names, such as tok_emb.weight and blocks.0.attn.c_q.weight"]
        problems += _listed("it has", [f"{name} {shape}" for name, shape in found.items()])
    elif denied:
        said = ", ".join(f"{name}={getattr(config, name)}" for name in denied)
        right = " ".join(f"-k {name}={int(v) if isinstance(v, bool) else v}" for name, v in denied.items())
        problems.append(f"{said} was given, and the shapes say {right}; leave it out")
    else:
        told = " ".join(f"{name}={value}" for name, value in checkpoint.knobs.items())
        problems.append(f"names and shapes tell {told}; `pgolf knobs` lists options that bring other tensors")
    raise RunError(
        f"{path}: not the weights of the model that these knobs make:\n" + "\n".join(f"  - {p}" for p in problems)
    )


def _listed(what: str, names: list[str]) -> list[str]:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return [f"{what}: {', '.join(names[:MAX_NAMED])}{more}"] if names else []


def import_checkpoint(path: str | Path, run_dir: str | Path, **knobs) -> Result:
    """A run, of kind KIND, of the weights in a file: stored by the export knobs, read back and scored.

    knobs: those that the file does not tell, such as the track, and those that win over what it tells. Nothing is
    written before names and shapes fit. Returns the stored result if the directory is complete. Raises RunError or
    ConfigError saying what does not fit, DataError.
    """
    path, run_dir = Path(path), Path(run_dir)
    checkpoint = read_checkpoint(path)
    config = fitted_config(checkpoint, path, knobs)
    if not config.final_roundtrip_eval or not config.save_raw_checkpoint:
        raise ConfigError(
            "final_roundtrip_eval=0 or save_raw_checkpoint=0: an import is stored and scored; leave both 1"
        )
    print("names and shapes tell:", *(f"{name}={value}" for name, value in checkpoint.knobs.items()))
    if "parallel_from" in checkpoint.knobs:
        print("parameters per block, as the public baseline has them: no layer is parallel")
    dataset, device = open_dataset(config), pick_device(config.train)
    if "data_path" not in knobs:
        print(f"scored on {dataset.directory.name}; data_path names shards of the tokenizer that it was trained with")
    check_scored(dataset, config.train_seq_len, config.eval)
    order = skeleton(config.model).state_dict()  # export and file have the tensors in this order
    state = {name: checkpoint.state[name] for name in order}
    content = safetensors.torch.save(state)
    sha256 = hashlib.sha256(content).hexdigest()
    with removed_on_error(run_dir), locked(run_dir, config), cpu_threads(config.cpu_threads):
        if (stored := read_result(run_dir)) is not None:
            if stored.checkpoint_sha256 != sha256:
                raise RunError(f"{run_dir}: holds other weights; name another run with --name, or delete that folder")
            return stored
        write_environment(run_dir, device)
        atomic_write(run_dir / CHECKPOINT, content)
        trip = round_trip(state, config, dataset, run_dir / ARTIFACT)
        raw = score_model(model_of(state, config, device), config, dataset, roundtrip=True)
        fields = roundtrip_fields(trip, raw.val_bpb, raw.block_nats, dataset, config)
        result = Result(
            KIND, config.hash, config.seed, config.track, source=path.name, checkpoint_sha256=sha256, weights="raw",
            val_loss=raw.val_loss, val_bpb=raw.val_bpb, val_tokens=raw.tokens, val_bytes=raw.bytes, stopped_by=KIND,
            parameters=sum(t.numel() for t in state.values()), environment=describe_environment(device, studies=True),
        )  # fmt: skip
        return write_result(run_dir, replace(result, **fields))
