"""Lines of log.txt about the tensors: how each group is trained, regularised and stored, and knobs without effect."""

import re
from collections import Counter
from collections.abc import Iterator

from torch import nn

from pgolf_core.config import RunConfig, shown
from pgolf_core.export import scheme_of, stored_float
from pgolf_core.parameters import roles_of
from pgolf_core.quantization.schemes.absmax import Absmax
from pgolf_core.rules import without_effect

OPTIMIZERS = {  # role -> optimizer and the knob of its rate, as make_optimizers gives them
    "matrix": "muon matrix_lr", "head": "adam head_lr", "projection": "adam scalar_lr", "control": "adam scalar_lr",
}  # fmt: skip


def tensor_lines(model: nn.Module, config: RunConfig) -> Iterator[str]:
    """'2 x blocks.*.attn.c_q.weight 192x192, muon matrix_lr, regularised, stored as int8', per group of equals.

    No `name:value` is in it, which import-log would take for a knob.
    """
    roles, groups = roles_of(model), Counter()
    for name, t in model.state_dict().items():
        role = roles[name]
        embedding = f"adam {'tied_embed_lr' if config.tie_embeddings else 'embed_lr'}"
        pressed = "regularised" if config.compression_reg_weight and not role.is_control else "not regularised"
        shape = "x".join(map(str, t.shape)) or "scalar"
        how = f"{OPTIMIZERS.get(role.kind, embedding)}, {pressed}, stored as {_stored(t, role, config)}"
        groups[f"{re.sub(r'[.][0-9]+[.]', '.*.', name)} {shape}, {how}"] += 1
    for line, count in groups.items():
        yield f"{count} x {line}"


def idle_knobs(config: RunConfig) -> Iterator[str]:
    """A warning per knob that changes nothing as the others are set."""
    for knob, why in without_effect(config).items():
        yield f"warning:{knob}={shown(getattr(config, knob))} has no effect: {why}"


def _stored(t, role, config: RunConfig) -> str:
    """The form in the file: 'solved', 'int8', 'step-0.4-fisher', 'float16'."""
    if config.allocation == "solve" and not role.is_control:
        return "solved"
    scheme = scheme_of(t, role, config.export)
    if scheme is None:
        return str(stored_float(t[:0] if t.ndim else t, role, config.export).dtype).removeprefix("torch.")
    if isinstance(scheme, Absmax):
        return f"int{config.embed_bits if role.kind == 'embedding' else config.weight_quantization_bits}"
    own = role.quantizer_group and getattr(config, f"{role.quantizer_group}_quantizer")
    return (own or config.quantizer).replace(":", "-")
