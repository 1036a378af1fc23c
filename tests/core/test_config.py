"""Knobs: four ways to set them, and every way to get them wrong."""

import json
import re
import subprocess
import sys

import pytest

from pgolf_core.config import FIRST_DEFAULTS, ConfigError, RunConfig, environment_knobs, hash_of
from pgolf_core.knobs import TrainConfig
from pgolf_core.tracks import TRACKS


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in RunConfig.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)


def test_defaults_are_the_references():
    c = RunConfig()
    reference = dict(
        seed=1337, val_batch_size=524288, val_loss_every=1000, train_log_every=200, iterations=20000,
        warmdown_iters=1200, warmup_steps=20, train_batch_tokens=524288, train_seq_len=1024,
        max_wallclock_seconds=600, qk_gain_init=1.5, vocab_size=1024, num_layers=9, num_heads=8, num_kv_heads=4,
        model_dim=512, mlp_mult=2, tie_embeddings=True, rope_base=10000, logit_softcap=30, embed_lr=0.6,
        head_lr=0.008, tied_embed_lr=0.05, tied_embed_init_std=0.005, matrix_lr=0.04, scalar_lr=0.04,
        muon_momentum=0.95, muon_backend_steps=5, muon_momentum_warmup_start=0.85, muon_momentum_warmup_steps=500,
        beta1=0.9, beta2=0.95, adam_eps=1e-8, sw_eval_batch=32, compression_reg_interval=1,
        compression_reg_sample_tensors=4, compression_reg_max_cols=256, weight_quantization_bits=8,
        int8_axis_mode="auto", int8_residual_power_iters=6, int8_targeted_residual_mode="off",
    )  # fmt: skip
    assert {name: getattr(c, name) for name in reference} == reference
    zeros = "num_unique_blocks embed_dim window_size eval_stride grad_clip_norm compression_reg_weight eval_cache_size"
    assert all(getattr(c, name) == 0 for name in zeros.split())


def test_groups_hold_every_knob_once_and_are_those_of_the_config_itself():
    c = RunConfig(track="nano", eval_seq_len=0)
    groups = [c.model, c.data, c.train, c.regularizer, c.export, c.eval]
    names = [name for group in groups for name in type(group).model_fields]
    assert sorted([*names, "track"]) == sorted(RunConfig.model_fields)
    assert all(field.description for field in RunConfig.model_fields.values())
    assert c.eval.eval_seq_len == c.train_seq_len
    assert c.model_copy(update={"num_layers": 7}).model.num_layers == 7 and c.model.num_layers == 2
    assert c == RunConfig(track="nano") and hash(c) == hash(RunConfig(track="nano"))
    assert TrainConfig(**c.train.model_dump()) == c.train
    with pytest.raises(ValueError, match="frozen"):
        c.seed = 3


def test_keyword_beats_environment_beats_track(monkeypatch):
    environment = {"TRACK": "fixed_step", "NUM_LAYERS": "5", "model_dim": "96", "TIE_EMBEDDINGS": "0"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    c = RunConfig(model_dim=48)
    assert (c.iterations, c.num_layers, c.model_dim, c.tie_embeddings) == (300, 5, 48, False)
    assert RunConfig(track="nano", num_layers=3).num_layers == 3
    assert RunConfig(track="nano").train_seq_len == TRACKS["nano"]["train_seq_len"]


def test_prefixed_names_win_and_a_run_knows_what_it_took(monkeypatch):
    for name, value in {"SEED": "1", "PGOLF_SEED": "2", "COMPILE": "yes", "WIDTH": "3", "PGOLF_RUNS": "x"}.items():
        monkeypatch.setenv(name, value)
    assert (environment_knobs(), environment_knobs(prefixed=True)) == ({"seed": "2", "compile": "yes"}, {"seed": "2"})
    c = RunConfig()
    assert (c.seed, c.compile, c.taken_from(environment_knobs())) == (2, True, environment_knobs())
    assert RunConfig(seed=3).taken_from(environment_knobs()) == {"compile": "yes"}
    assert RunConfig(environment_knobs(prefixed=True)).compile is False
    monkeypatch.setenv("PGOLF_SEED", "many")
    with pytest.raises(ConfigError, match=r"seed='many' \(from the environment, PGOLF_SEED\)"):
        RunConfig()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert RunConfig(seed=1).world_size == 2 and "world_size" not in environment_knobs()


def test_file_round_trip(tmp_path):
    (tmp_path / "knobs.yaml").write_text("track: nano\nnum_layers: 6\n")
    c = RunConfig.from_file(tmp_path / "knobs.yaml", seed=7)
    assert (c.num_layers, c.seed) == (6, 7)
    (tmp_path / "config.json").write_text(json.dumps(c.model_dump()))
    again = RunConfig.from_file(tmp_path / "config.json")
    assert again == c and again.hash == c.hash
    assert c.with_knobs(seed=8).hash != c.hash


def test_files_that_are_refused(tmp_path):
    for content, knobs, message in (
        ("- 1", {}, r"knobs\.yaml: expected a mapping"), ("a: [1", {}, r"knobs\.yaml: not YAML or JSON"),
        ("1: 2", {}, "1: no such knob"),
        (json.dumps(RunConfig(track="nano").model_dump()), {"track": "quick"}, r"track=quick: .* sets every knob"),
    ):  # fmt: skip
        (tmp_path / "knobs.yaml").write_text(content)
        with pytest.raises(ConfigError, match=message):
            RunConfig.from_file(tmp_path / "knobs.yaml", **knobs)


def test_every_bad_knob_in_one_message(monkeypatch):
    monkeypatch.setenv("EMBED_LR", "quick")
    with pytest.raises(ConfigError) as error:
        RunConfig(num_layer=3, seed=-1, num_heads=7, model_dim=100, weight_quantization_bits=9, adam_eps=float("nan"))
    message = str(error.value)
    for part in (
        "num_layer: no such knob; did you mean num_layers?", "seed=-1: ", "weight_quantization_bits=9: ",
        "adam_eps=nan: ", "embed_lr='quick' (from the environment, EMBED_LR): ",
        "num_heads=7 does not divide model_dim=100",
    ):  # fmt: skip
        assert part in message, message


BAD_COMBINATIONS = [
    (dict(model_dim=100, num_heads=8), "num_heads=8 does not divide model_dim=100"),
    (dict(model_dim=72, num_heads=8), "head dimension model_dim/num_heads=9 is odd"),
    (dict(num_heads=8, num_kv_heads=3), "num_kv_heads=3 does not divide num_heads=8"),
    (dict(num_layers=4, num_unique_blocks=5), "num_unique_blocks=5 is more than num_layers=4"),
    (dict(model_dim=64, embed_dim=65), "embed_dim=65 is more than model_dim=64"),
    (dict(world_size=3), "world_size=3 does not divide 8"),
    (dict(train_batch_tokens=1000), "train_batch_tokens=1000 is not a multiple of 8"),
    (dict(eval_seq_len=64, eval_stride=65), "eval_stride=65 is more than the window of 64"),
    (dict(eval_seq_len=2048, val_batch_size=1024), "val_batch_size=1024 holds no window of 2048"),
    (dict(val_max_tokens=100), "val_max_tokens=100 is less than one window of 1024"),
    (dict(roundtrip_val_max_tokens=100), "roundtrip_val_max_tokens=100 is less than one window of 1024"),
    (dict(eval_cache_mix_weight=0.1), "eval_cache_size=0"),
    (dict(embed_quantization_bits=9), "embed_quantization_bits=9: "),
    (dict(wd_taper_final_mult=0.5), "wd_taper_final_mult=0.5 tapers muon_wd, which is 0"),
    (dict(muon_wd=0.1, wd_taper_start_frac=0.5), "wd_taper_start_frac=0.5 begins no taper"),
    (dict(min_lr=0.1, warmdown_iters=0), "min_lr=0.1 is a floor of falling rates"),
    (dict(learn_steps=9, mlp_permutation=True), "mlp_permutation cannot be combined with learn_steps=9"),
    (dict(swa_start_frac=0.2), "swa_start_frac=0.2 begins no average: set swa_every"),
    (dict(muon_polar_express=True, muon_backend_steps=6), "fewer than muon_backend_steps=6"),
    (dict(ema_decay=0.9, swa_every=5), "ema_decay=0.9 and swa_every=5: one average is scored"),
    (dict(swa_every=5, min_lr=0.5), "swa_every=5 averages nothing"),
    (dict(swa_every=5, warmdown_iters=0), "swa_every=5 averages nothing"),
    (dict(train_seq_schedule="512@0.5,256@0.2"), "train_seq_schedule='512@0.5,256@0.2': value error, write values and"),
    (dict(train_batch_schedule="many"), "train_batch_schedule='many': value error, write values and the shares"),
    (dict(train_seq_schedule="1000@0.5"), "per sequence) [(524288, 1000), (524288, 1024)]: at most 8 of them"),
    (dict(shuffle_documents=1, coprime_sequences=2), "training text has one order; leave the others 0"),
    (dict(shuffle_sequences=1, train_seq_schedule="512@0.5"), "train_seq_schedule needs running text"),
    (dict(document_mask=True, eval_cache_size=8), "document_mask ends a token's sight at its document"),
    (dict(model_dim=64, rope_dims=10), "rope_dims=10 is not an even number up to the head dimension model_dim"),
    (dict(xsa_last=10), "xsa_last=10 or ve_last=0 is more than num_layers=9"),
    (dict(ve_last=10), "xsa_last=0 or ve_last=10 is more than num_layers=9"),
    (dict(attn_gate="sparse", attn_gate_width=600), "attn_gate_width=600 is more than model_dim=512"),
    (dict(bigram_vocab_size=1), "bigram_vocab_size=1: one row is for tokens that begin"),
    (dict(residual_lanes=2, parallel_from=9), "residual_lanes=2 begin at layer parallel_from=9"),
    (dict(loop_start=4, loop_end=3, loop_extra=1), "loop_start=4 to loop_end=3 is no band of layers, of which there"),
    (dict(loop_extra=101), "loop_extra=101: input should be less than or equal to 100"),
    (dict(loop_end=9, loop_extra=1), "loop_start=0 to loop_end=9 is no band of layers, of which there are 9"),
    (dict(residual_lanes=2, loop_end=3, loop_extra=1, parallel_from=3), "parallel_from=3 must be after loop_end=3"),
    (dict(loop_extra=1, loop_from=0.95, iterations=10), "loop_from=0.95 of iterations=10 is after the last step"),
    (dict(loop_extra=1, loop_from=0.5, train_seq_schedule="64@.1,128@.2,256@.3,512@.4"), "at most 4 of them"),
    (dict(text_transform="caseops", data_path="data/own"), "text_transform=caseops is for the embedded corpus"),
    (dict(text_transform="caseops", tokenizer="bytes", vocab_size=260), "not for data_path=embedded, tokenizer=bytes"),
    (dict(weights="basis", weight_bases=10), "weight_bases=10 are more than the 9 blocks that weights=basis makes"),
    (dict(weights="random"), "weights=random with weight_rank=0 learns scales of rows alone"),
    (dict(weights="basis", weight_rank=256), "weight_rank=256 is no low rank of matrices"),
    (dict(weights="basis", mlp_permutation=True), "not those of weights=basis; leave it 0"),
    (dict(track="nanoo"), "track='nanoo': "),
    (dict(device="gpu"), "device='gpu': "),
    (dict(vocab_size=70000), "vocab_size=70000: "),
]


@pytest.mark.parametrize(("knobs", "message"), BAD_COMBINATIONS)
def test_combinations_that_cannot_work(knobs, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        RunConfig(**knobs)


def test_misspelt_environment_warns(monkeypatch):
    monkeypatch.setenv("NUM_LAYRS", "3")
    with pytest.warns(UserWarning, match="NUM_LAYRS is no knob; did you mean NUM_LAYERS"):
        RunConfig()


def test_tracks_are_whole():
    for track, knobs in TRACKS.items():
        assert knobs.items() <= RunConfig(track=track).model_dump().items()


def test_a_config_with_quantizers_loads_no_torch():
    """It takes seconds, and the command line and pages read configs."""
    code = "import sys; from pgolf_core.config import RunConfig; "
    code += "config = RunConfig(track='nano', quantizer='step:0.4:row', embed_quantizer='sdclip:6:12', "
    code += "head_quantizer='float16', mlp_in_quantizer='ternary', attn_in_quantizer='absmax:5'); "
    code += "assert not config.export.needs_calibration; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_a_knob_of_a_later_version_and_a_default_that_changed_change_no_hash():
    config = RunConfig(track="nano", num_layers=3)
    knobs = config.model_dump()
    assert hash_of({name: v for name, v in knobs.items() if name != "mlp_permutation"}) == config.hash
    assert hash_of(knobs | {"mlp_permutation": True}) != config.hash != hash_of(knobs | {"no_longer_a_knob": 1})
    assert config.with_knobs(allow_over_cap=True).hash == config.hash
    assert hash_of(knobs | FIRST_DEFAULTS) == hash_of(
        {name: v for name, v in knobs.items() if name not in FIRST_DEFAULTS}
    )
    assert hash_of(knobs | FIRST_DEFAULTS) != config.hash  # these are other knobs now
