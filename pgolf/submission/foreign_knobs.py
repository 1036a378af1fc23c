"""Settings of the public trainers as our knobs: a name there, a knob here, and what has none."""

import re
from dataclasses import dataclass, field

from pgolf.analysis.training_logs import Log
from pgolf_core.config import RunConfig

TRACK = "h100"
RENAMED = dict(
    xsa_last_n="xsa_last", enable_looping_at="loop_from", num_loops="loop_extra", val_batch_tokens="val_batch_size",
    gate_window="attn_gate_width", sparse_attn_gate_scale="attn_gate_scale", skip_gates_enabled="skip_gates",
    embedding_dim="embed_dim", weight_decay="muon_wd", gptq_block_size="gptq_block", batch_seqs="sw_eval_batch",
    lqer_rank="int8_residual_rank", lqer_factor_bits="int8_residual_bits", lqer_asym_group="int8_residual_group",
)  # fmt: skip
# A switch, and the settings that do nothing where it is off.
SWITCHES = dict(
    swa_enabled=r"swa_(every|start_frac)", ema_enabled="ema_decay", ve_enabled="ve_.*", lqer_enabled="lqer_.*",
    sliding_window_enabled="eval_stride", gated_attn_enabled="gated_attn_init_std", ttt_enabled=".*ttt_.*",
    sparse_attn_gate_enabled="sparse_attn_gate_.*", late_qat_enabled="late_qat_.*",
)  # fmt: skip
GATES = dict(sparse_attn_gate_enabled="sparse", gated_attn_enabled="dense", attn_out_gate_enabled="doubled")
CODECS = dict(zlib="zlib", lzma="lzma", brotli="brotli_shuffle")
# Names of paths, processes, data and derived figures, which a repetition has of its own.
FACT = re.compile(
    r".*(_path|_dir|_files|_id|_params|path|\.\w*coder)|(local_)?rank|world_size|distributed|is_main_process|logfile"
    r"|(train|val)_(shards|tokens|loader.*)|files|sdp_backends.*|(en|de)coder|loop_warmup.*|tokenizer_kind|hostname"
    r"|warmup_cu_buckets|iters_each|gptq|effective_depth|unique_layers|active_layers|final_eval_mode|seed|device"
    r"|ttt_(phased|sliding)\..*|parallel_residuals|progressive_recurrence\..*|hessian_clip\..*|rope_train_seq_len"
)
NEUTRAL = (0, "", None, "0", [], "gqa")  # values of settings without a counterpart by which they change nothing
# What only code tells: its mark, the knob, and the value, None for the mark's own figure.
MARKS = [
    (r"leaky_relu\([^()\n]*?[,=] ?(0?\.\d{1,4})\)", "mlp_slope", None),
    (r"\bema_decay ?= ?(0\.\d{1,8})\b", "ema_decay", None),
    (r"\borthogonal_\(", "orthogonal_init", True),
    (r"\b8\.1565", "muon_polar_express", True),  # the first of its coefficients
    (r"\bclass ShuffledSequenceLoader\b", "shuffle_sequences", 1),
    (r"\bcoprime", "coprime_sequences", 1),
    (r"\bcu_seqlens\b", "document_mask", True),
]


@dataclass
class Mapped:
    """Settings as knobs. Each knob comes with a note: the name that it has there, or the reason for it."""

    knobs: dict[str, tuple[object, str]] = field(default_factory=dict)
    within: dict[str, object] = field(default_factory=dict)  # settings that knobs of other names or kinds express
    missing: dict[str, object] = field(default_factory=dict)  # settings without a counterpart
    off: list[str] = field(default_factory=list)  # settings without a counterpart that change nothing there
    facts: list[str] = field(default_factory=list)  # names as in FACT


def mapped(settings: dict[str, object], unread: dict[str, str], source: str, log: Log | None) -> Mapped:
    """settings: by name there, in lower case. unread: settings whose values only running the script would tell.

    source: of the script, '' if unknown. log: one of the record's.
    """
    s, done = dict(settings), Mapped()
    done.missing = {name: text for name, text in unread.items() if name not in s and not FACT.fullmatch(name)}
    for switch, names in SWITCHES.items():
        idle = [name for name in s if re.fullmatch(names, name)] if not s.get(switch, True) else []
        done.off += [name for name in idle if s.pop(name) is not None]
    _of_code(s, done, source)
    _of_model(s, done)
    _of_training(s, done, log)
    _of_file(s, done, (log.artifact.get("codec") or "") if log else "")
    for name, value in s.items():
        knob = RENAMED.get(name, name)
        if FACT.fullmatch(name):
            done.facts.append(name)
        elif knob in RunConfig.model_fields and (knob == name or knob not in s) and not isinstance(value, str):
            done.knobs.setdefault(knob, (value, "" if knob == name else name))
        elif value in NEUTRAL:
            done.off.append(name)
        else:
            done.missing[name] = value
    told = {*s, *done.off, *done.missing}
    done.within = {name: value for name, value in settings.items() if name not in told}
    return done


def _take(s: dict, *names: str) -> object:
    """The value of the first name that is there; all of them are dealt with then."""
    values = [s.pop(name) for name in names if name in s]
    return values[0] if values else None


def _of_code(s: dict, done: Mapped, source: str) -> None:
    for mark, knob, value in MARKS:
        if knob not in s and (found := re.search(mark, source)):
            done.knobs[knob] = (float(found[1]) if value is None else value, "by its source")
    if "shuffle_sequences" in done.knobs:
        done.knobs.pop("coprime_sequences", None)
    if "class SmearGate" in source and "smear_gate_enabled" not in s:
        done.knobs["smear_gate"] = ("v1", "by its source")
    if "warmup_cu_buckets" in s:
        done.knobs["document_mask"] = (True, "warmup_cu_buckets")


def _of_model(s: dict, done: Mapped) -> None:
    layers, knobs = s.get("num_layers"), done.knobs
    layers = layers if isinstance(layers, int) else RunConfig({}, track=TRACK).num_layers
    start = _take(s, "parallel_start_layer", "parallel_residual_start", "parallel_layer_start")
    lanes, inside = _take(s, "parallel_final_lane"), isinstance(start, int) and 0 < start < layers
    knobs["parallel_from"] = (start, "parallel layers") if inside else (layers, "sequential in every layer, as there")
    if inside and lanes:
        knobs["residual_lanes"] = (2, "parallel_final_lane")
    gates = {kind: switch for switch, kind in GATES.items() if _take(s, switch)}
    for kind, switch in gates.items():
        knobs["attn_gate"] = (kind, switch)
    if not gates and _take(s, "gate_window"):
        done.off.append("gate_window")
    if _take(s, "smear_gate_enabled"):
        knobs["smear_gate"] = ("v2", "smear_gate_enabled")
    if s.get("embedding_dim") == s.get("model_dim"):
        _take(s, "embedding_dim")
    embedded = [int(part) for part in re.findall(r"\d{1,4}", str(s.get("ve_layers", s.get("ve_layers_str"))))]
    if embedded and embedded == [*range(layers - len(embedded), layers)]:
        _take(s, "ve_layers", "ve_layers_str", "ve_enabled")
        knobs["ve_last"] = (len(embedded), "ve_layers")
    tokenizer = str(s.get("tokenizer_path", ""))
    if "vocab_size" not in s and (named := re.search(r"_(\d{3,5})_bpe", tokenizer)):
        knobs["vocab_size"] = (int(named[1]), "tokenizer_path")
    if _take(s, "caseops_enabled") or "caseops" in tokenizer:
        knobs["text_transform"] = ("caseops", "caseops_enabled")


def _of_training(s: dict, done: Mapped, log: Log | None) -> None:
    printed, labels = (log.config, [score.label for score in log.scores]) if log else ({}, ["sliding"])
    if s.get("tie_embeddings") and "embed_lr" in printed and "tied_embed_lr" not in printed:
        done.knobs["tied_embed_lr"] = (printed["embed_lr"], "embed_lr, as logs print it")
        _take(s, "embed_lr", "tied_embed_lr", "head_lr")
    if "adam_wd" in s and "embed_wd" not in s:
        done.knobs["embed_wd"] = (s["adam_wd"], "adam_wd, for tables too")
    if "ema_decay" in s | done.knobs and "swa_every" in s:
        done.missing |= {name: s.pop(name) for name in ("swa_every", "swa_start_frac") if name in s}
    stride, mode = _take(s, "eval_stride", "stride"), str(s.get("final_eval_mode"))
    if stride and any("sliding" in label or "window" in label for label in [*labels, mode]):
        done.knobs["eval_stride"] = (stride, "")
        _take(s, "sliding_window_enabled")
    elif stride:
        done.missing["eval_stride"] = f"{stride} (its log has no score of sliding windows)"


def _of_file(s: dict, done: Mapped, label: str) -> None:
    """label: of the file's size in the log, such as int6+lzma."""
    knobs, (bits, sigmas) = done.knobs, (_take(s, name) for name in ("matrix_bits", "matrix_clip_sigmas"))
    attn, mlp = (_take(s, f"{kind}_clip_sigmas") or sigmas for kind in ("attn", "mlp"))
    batches = _take(s, "gptq_calibration_batches", "gptq_calib_batches")
    if batches or any(name.startswith("gptq") for name in s):
        knobs["gptq"] = (True, "gptq settings")
    if isinstance(batches, int) and isinstance(batch := s.get("train_batch_tokens"), int):
        tokens = batches * batch // (s.get("world_size") or 8)
        knobs["calibration_tokens"] = (tokens, f"{batches} batches of one GPU")
    if bits and attn and mlp:
        knobs["quantizer"] = (f"sdclip:{bits}:{attn:g}", "matrix_bits, clip_sigmas")
        if mlp != attn:
            knobs["mlp_in_quantizer"] = knobs["mlp_out_quantizer"] = (f"sdclip:{bits}:{mlp:g}", "mlp_clip_sigmas")
        if embed := _take(s, "embed_clip_sigmas"):
            knobs["embed_quantizer"] = (f"sdclip:{_take(s, 'embed_bits') or 8}:{embed:g}", "embed_clip_sigmas")
        knobs["control_dtype"] = ("float16", "as there")
    elif named := re.search(r"int([2-8])", label):
        knobs["weight_quantization_bits"] = (int(named[1]), label)
        if named[1] != "8":
            knobs["embed_quantization_bits"] = (8, "not in its log; 8 is usual there")
        if "gptq" in knobs:
            knobs["int8_axis_mode"] = ("row", "with GPTQ")
    codec = str(_take(s, "compressor") or label.rpartition("+")[2])
    if codec and codec not in CODECS:
        done.missing["compressor"] = codec
    knobs["codec"] = (CODECS.get(codec, "brotli_shuffle" if codec else "zlib"), f"theirs: {codec or 'unknown'}")
    if _take(s, "gated_attn_quant_gate"):
        knobs["keep_float_max_numel"] = (0, "gated_attn_quant_gate")
    if s.get("lqer_rank"):
        _take(s, "lqer_enabled")
        knobs["int8_residual_budget_bytes"] = (32_768, "lqer: about 30 kB there")
        if s.get("lqer_top_k") == 3:
            _take(s, "lqer_top_k")
            knobs["int8_targeted_residual_mode"] = ("largest_3", "lqer_top_k")
