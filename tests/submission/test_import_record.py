"""A record folder of others becomes runs, findings and a sweep file that repeats it."""

import base64
import json
import lzma
import zlib

import pytest
import yaml
from support.logs import REFERENCE, SLIDING, SOURCE

from pgolf.cli import main
from pgolf.disk import read_json
from pgolf.reports import sentences
from pgolf.runs import directory
from pgolf.submission import foreign_script
from pgolf.submission.import_record import import_record
from pgolf.sweeps.sweep_file import SweepError, load_sweep
from pgolf_core.config import ROOT, RunConfig
from pgolf_core.model import skeleton

pytestmark = pytest.mark.usefixtures("real_scripts")
SWEEPS = ROOT / "notebooks" / "sweeps"
# Settings in the shape of three published generations, with the values of the sweeps made by hand.
SCRIPT_1019 = """
import os
class Hyperparameters:
    data_path = os.environ.get("DATA_PATH", "./data")
    seed = int(os.environ.get("SEED", 1337))
    warmdown_iters = int(os.environ.get("WARMDOWN_ITERS", 3500))
    train_batch_tokens = int(os.environ.get("TRAIN_BATCH_TOKENS", 2048 * 48 * 8))
    train_seq_len = int(os.environ.get("TRAIN_SEQ_LEN", 2048))
    num_layers = int(os.environ.get("NUM_LAYERS", 11))
    mlp_mult = float(os.environ.get("MLP_MULT", 3.0))
    tie_embeddings = bool(int(os.environ.get("TIE_EMBEDDINGS", "1")))
    tied_embed_lr = float(os.environ.get("TIED_EMBED_LR", 0.035))
    matrix_lr = float(os.environ.get("MATRIX_LR", 0.025))
    scalar_lr = float(os.environ.get("SCALAR_LR", 0.025))
    muon_momentum = float(os.environ.get("MUON_MOMENTUM", 0.99))
    muon_momentum_warmup_start = float(os.environ.get("MUON_MOMENTUM_WARMUP_START", 0.92))
    muon_momentum_warmup_steps = int(os.environ.get("MUON_MOMENTUM_WARMUP_STEPS", 1500))
    grad_clip_norm = float(os.environ.get("GRAD_CLIP_NORM", 0.3))
    eval_stride = int(os.environ.get("EVAL_STRIDE", 64))
    swa_enabled = bool(int(os.environ.get("SWA_ENABLED", "1")))
    swa_every = int(os.environ.get("SWA_EVERY", 50))
    muon_wd = float(os.environ.get("MUON_WD", 0.04))
    adam_wd = float(os.environ.get("ADAM_WD", 0.04))
    bigram_vocab_size = int(os.environ.get("BIGRAM_VOCAB_SIZE", 2048))
    bigram_dim = int(os.environ.get("BIGRAM_DIM", 128))
    trigram = bool(int(os.environ.get("TRIGRAM", "0")))
    xsa_last_n = int(os.environ.get("XSA_LAST_N", 11))
    rope_dims = int(os.environ.get("ROPE_DIMS", 16))
    ln_scale = bool(int(os.environ.get("LN_SCALE", "1")))
    ve_enabled = bool(int(os.environ.get("VE_ENABLED", "1")))
    ve_dim = int(os.environ.get("VE_DIM", 128))
    ve_layers = os.environ.get("VE_LAYERS", "9,10")
    gptq_calib_batches = int(os.environ.get("GPTQ_CALIB_BATCHES", 256))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    grad_accum_steps = 8 // world_size
    mystery = sorted(os.environ)

class SmearGate:
    pass

def train():
    ema_decay = 0.997
    nn.init.orthogonal_(weight)
    x = F.leaky_relu(x, negative_slope=0.5)
"""
BLOCK_1218 = """\
  adam_wd: 0.02
  compressor: brotli
  ema_decay: 0.997
  embed_wd: 0.085
  embedding_dim: 512
  eval_stride: 64
  gptq_calibration_batches: 64
  gptq_reserve_seconds: 14.0
  grad_accum_steps: 1
  grad_clip_norm: 0.3
  ln_scale: True
  matrix_lr: 0.02
  mlp_mult: 4.0
  model_dim: 512
  muon_momentum: 0.99
  muon_momentum_warmup_start: 0.92
  muon_momentum_warmup_steps: 1500
  muon_wd: 0.085
  num_layers: 11
  qk_gain_init: 4.0
  rope_dims: 16
  scalar_lr: 0.02
  skip_gates_enabled: True
  tied_embed_lr: 0.03
  train_batch_tokens: 786432
  train_seq_len: 2048
  ve_dim: 128
  ve_enabled: True
  ve_layers: 9,10
  vocab_size: 4096
  warmdown_frac: 0.667
  world_size: 8
  xsa_last_n: 11
"""
BLOCK_1855 = """\
  adam_wd: 0.02
  attn_clip_sigmas: 13.0
  beta2: 0.99
  caseops_enabled: True
  compressor: pergroup
  ema_decay: 0.9965
  embed_bits: 7
  embed_clip_sigmas: 14.0
  embed_wd: 0.085
  enable_looping_at: 0.35
  gated_attn_enabled: False
  gated_attn_quant_gate: True
  gptq_calibration_batches: 16
  grad_accum_steps: 1
  grad_clip_norm: 0.3
  ln_scale: True
  loop_end: 5
  loop_start: 3
  lqer_asym_group: 64
  lqer_enabled: True
  lqer_factor_bits: 4
  lqer_rank: 4
  lqer_top_k: 3
  matrix_bits: 6
  matrix_clip_sigmas: 12.85
  matrix_lr: 0.026
  min_lr: 0.1
  mlp_clip_sigmas: 11.5
  mlp_mult: 4.0
  muon_momentum: 0.97
  muon_momentum_warmup_start: 0.92
  muon_momentum_warmup_steps: 1500
  muon_row_normalize: True
  muon_wd: 0.095
  num_layers: 11
  num_loops: 2
  parallel_final_lane: mean
  parallel_start_layer: 8
  qk_gain_init: 5.0
  rope_dims: 16
  scalar_lr: 0.02
  skip_gates_enabled: True
  smear_gate_enabled: True
  sparse_attn_gate_enabled: True
  sparse_attn_gate_scale: 0.5
  tied_embed_lr: 0.03
  train_batch_tokens: 786432
  train_seq_len: 2048
  ttt_enabled: True
  ttt_lora_rank: 80
  vocab_size: 8192
  warmdown_frac: 0.85
  world_size: 8
  xsa_last_n: 11
"""
CODE_ALONE = {"mlp_slope", "orthogonal_init", "muon_polar_express", "document_mask", "coprime_sequences"}


def parameters(config: RunConfig) -> int:
    return sum(p.numel() for p in skeleton(config.model).parameters())


def tuned(block: str, count: int, sliding: bool = True) -> str:
    """A log that prints its settings, as the later scripts do."""
    log = SLIDING if sliding else SLIDING.replace("sliding_window", "other")
    return f"Hyperparameters:\n{block}  seed: 42\nmodel_params:{count}\n{log}"


@pytest.fixture
def record(tmp_path):
    """Write a record folder: text or bytes by file name; returns it."""

    def write(files: dict, name="2026-01-01_Record"):
        folder = tmp_path / "records" / name
        folder.mkdir(parents=True, exist_ok=True)
        for path, content in files.items():
            (folder / path).write_bytes(content if isinstance(content, bytes) else content.encode())
        return folder

    return write


def imported(folder, tmp_path):
    """The record as imported, and the text of its sweep file."""
    found = import_record(folder, None, tmp_path / "runs")
    return found, found.sweep.read_text()


def by_hand(name: str) -> RunConfig:
    return load_sweep(SWEEPS / f"record_{name}.yaml").runs["record"]


def differing(sweep, hand: RunConfig) -> set[str]:
    """Knobs of a sweep file's first run that differ from those of the sweep made by hand."""
    return load_sweep(sweep).runs["record-s42"].differences(hand).keys() - {"seed"}


def test_script_and_command_of_a_record_give_the_knobs_of_the_sweep_made_by_hand(record, tmp_path):
    hand = by_hand("1019")
    log = f"model_params:{parameters(hand)}\n{SLIDING}"
    command = "BIGRAM_VOCAB_SIZE=3072 BIGRAM_DIM=112 WARMDOWN_ITERS=4000 \\\nSEED=1 RUN_ID=$NAME torchrun train_gpt.py"
    readme = f"# Run\n```bash\n{command}\n```\n```\nXSA_LAST_N=4 torchrun train_gpt.py\n```\n"
    folder = record({"train_seed42.log": log, "train_gpt.py": SCRIPT_1019, "README.md": readme})
    found, text = imported(folder, tmp_path)
    assert "27,067,484 parameters with these knobs, as many as its log says" in found.said
    assert differing(found.sweep, hand) == {
        "calibration_tokens",
        "grad_accum_steps",
    }  # theirs wrote its own text; 0 is 1 there
    assert "swa_every=50" in text and "mystery=sorted(os.environ)" in text and "trigram" in text


def test_settings_in_a_log_give_the_knobs_of_the_sweeps_made_by_hand(record, tmp_path):
    for name, block, sliding in (("1218", BLOCK_1218, True), ("1855", BLOCK_1855, False)):
        hand = by_hand(name)
        log = tuned(block, parameters(hand), sliding).replace("+lzma", "+brotli")
        found, text = imported(record({"train_seed42.log": log}, name), tmp_path)
        assert found.said.endswith("as many as its log says.") and "there is no script" in " ".join(text.split("\n# "))
        assert differing(found.sweep, hand) <= CODE_ALONE


def test_every_setting_of_a_log_is_named_in_the_file(record, tmp_path):
    extra = "  novel_trick: 0.25\n  novel_switch: False\n"
    _, text = imported(record({"train.log": tuned(BLOCK_1855 + extra, 1)}), tmp_path)
    said = text.replace("\n# ", " ")
    assert "novel_trick=0.25" in said and "compressor=pergroup" in said and "ttt_lora_rank=80" in said
    settings = [line.split(":")[0].strip() for line in (BLOCK_1855 + extra).splitlines()]
    assert [name for name in settings if name not in said] == [] and "matrix_clip_sigmas=12.85" in said


def test_a_model_of_another_size_is_not_called_the_record(record, tmp_path):
    found, text = imported(record({"train.log": tuned("  num_layers: 3\n", 5_000_000)}), tmp_path)
    assert "its log says 5,000,000: something of its model is missing" in found.said
    assert found.said in text.replace("\n# ", " ")
    load_sweep(found.sweep)


def test_knobs_that_cannot_work_are_named_in_a_file_that_does_not_load(record, tmp_path):
    found, text = imported(record({"train.log": tuned("  num_heads: 7\n  mlp_mult: 3.5\n", 5)}), tmp_path)
    assert "does not load" in found.said and "mlp_mult=3.5" in found.said and "mlp_mult: 3.5" in text
    with pytest.raises(SweepError, match="num_heads=7"):
        load_sweep(found.sweep)


PACKED = SCRIPT_1019.replace("import os", "import os\nopen('executed', 'w')").encode()
RAW2 = lzma.compress(PACKED, lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2}])
RAW1 = lzma.compress(PACKED, lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA1, "dict_size": 1 << 20, "pb": 0}])
LATIN = RAW1.decode("latin1").replace("\\", "\\\\").replace("\r", "\\r").replace("'", "\\'").replace("\0", "\\0")


@pytest.mark.parametrize(
    "script",
    [
        f"import lzma as L,base64 as B\nexec(L.decompress(B.b85decode({base64.b85encode(RAW2).decode()!r}),3,None,[]))",
        f"import lzma,base64\nexec(lzma.decompress(base64.b64decode({base64.b64encode(lzma.compress(PACKED))!r})))",
        f"import zlib;exec(zlib.decompress({zlib.compress(PACKED)!r}))",
    ],
    ids=["raw lzma in base85", "lzma in base64", "zlib in bytes"],
)
def test_a_packed_script_is_read_as_the_plain_one_and_not_run(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain = foreign_script.settings_in(SCRIPT_1019)
    assert foreign_script.settings_in(foreign_script.unpacked(script.encode())) == plain and len(plain[0]) == 32
    assert not (tmp_path / "executed").exists()


def test_a_script_of_the_compilers_loader_is_unpacked():
    text = f"#coding:latin1\nimport lzma\nexec(lzma.decompress('''{LATIN}'''.encode('latin1'),3,None,[]))\n"
    assert foreign_script.unpacked(text.encode("latin1")) == PACKED.decode()


@pytest.mark.parametrize(
    "expression, value",
    [
        ("int(os.environ.get('A', 2 * 3 * 8))", 48), ("env_float('B', 1e-8)", 1e-8),
        ("os.getenv('C', '0') == '1'", False),
        ("bool(int(os.environ.get('D', '1')))", True), ("os.environ.get('E', ' Hard ').strip().lower()", "hard"),
        ("num_layers // 2", 5), ("-1", -1), ("[1, 2]", [1, 2]), ("10 ** 10 ** 10", None), ("'a' * 10 ** 9", None),
        ("__import__('os').getpid()", None), ("1 / 0", None), ("open('X', 'w')", "w"),
    ],
)  # fmt: skip
def test_a_default_is_computed_without_running_it(expression, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = f"class Hyperparameters():\n\tnum_layers: int = 11\n\tx = {expression}\n"
    values, unread = foreign_script.settings_in(text)
    assert (values.get("x"), "x" in unread) == (value, value is None) and not [*tmp_path.iterdir()]


def test_a_bomb_and_what_is_no_python_end_as_they_are():
    bomb = base64.b85encode(lzma.compress(b"import os" + bytes(8 * 2**20))).decode()
    for text in (f"exec({bomb!r})", "class Hyperparameters:\n  x = (", "\0", "(" * 5000, ""):
        assert foreign_script.unpacked(text.encode()) == text
        assert foreign_script.settings_in(text) == ({}, {})


def test_the_source_that_a_log_prints_is_read_where_there_is_no_script(record, tmp_path):
    source = SOURCE.replace("seed: int = 7", "seed: int = 7\n    model_dim: int = 256\n    mystery = sorted('ab')")
    _, text = imported(record({"train.log": f"{source}{'=' * 100}\n{REFERENCE}"}), tmp_path)
    assert "model_dim: 256" in text and "mystery=sorted('ab')" in text and "there is no script" not in text


def test_names_and_values_that_would_break_a_file_stay_in_its_comments(record, tmp_path):
    script = 'class Hyperparameters:\n  evil = "a\\nruns: {x: {}}\\u2028 \\x07"\n  codec = "z\\n#"\n  größe = 3\n'
    _, text = imported(record({"train.log": REFERENCE, "train_gpt.py": script}), tmp_path)
    content = yaml.safe_load(text)
    assert list(content["runs"]) == ["record"] and content["control"] == "record" and "evil=" in text
    assert text.isprintable() or set(c for c in text if not c.isprintable()) == {"\n"}


def test_a_record_of_our_own_is_repeated_with_exactly_its_knobs(record, tmp_path):
    config = RunConfig({}, track="nano", num_layers=3, quantizer="step:0.4", adam_eps=1e-9, seed=7)
    files = {
        "config.json": json.dumps(config.model_dump()),
        "train.log": REFERENCE,
        "submission.json": '{"seeds": [7]}',
    }
    found, text = imported(record(files), tmp_path)
    [repeated] = load_sweep(found.sweep).runs.values()
    assert repeated == config and "FineWeb" not in text


def test_findings_are_kept_and_a_changed_sweep_file_stays(record, tmp_path):
    claims = json.dumps({"val_bpb": 1.5, "seeds": [1337, 42]})
    folder = record({"train.log": REFERENCE, "submission.json": claims})
    found, text = imported(folder, tmp_path)
    place = tmp_path / "runs" / "2026-01-01_Record"
    kept = read_json(place / "legality_2026-01-01_Record.json")
    assert {"rule": "a log of every seed", "outcome": "fail"}.items() <= kept["verdicts"][1].items()
    assert "2026-01-01_Record, a log of every seed: no log of seed 42, which is claimed" in sentences.findings(place)
    assert read_json(place / "train" / "import.json")["flags"] == [] and "seeds: [1337, 42]" in text
    again, _ = imported(folder, tmp_path)
    assert again.runs[0].again and "stays as it is" not in again.said
    found.sweep.write_text(text.replace("nproc: 8", "nproc: 4"))
    again, edited = imported(folder, tmp_path)
    assert "nproc: 4" in edited and "stays as it is" in again.said


def test_the_command_takes_a_folder_of_records_and_goes_on_after_one_that_is_none(record, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(directory, "RUNS", tmp_path / "runs")
    record({"submission.json": "{}", "train.log": REFERENCE}, "a")
    record({"submission.json": "{}"}, "b")
    assert main.main(["import-record", str(tmp_path / "records")]) == 0
    out = capfd.readouterr().out
    assert "a/train  complete" in out and "no training log, so no run" in out and "2 of 2 records imported" in out
    load_sweep(tmp_path / "runs" / "a" / "repeat_a.yaml")
    (tmp_path / "empty").mkdir()
    assert main.main(["import-record", str(tmp_path / "empty"), str(tmp_path / "records")]) == 1
    assert "not imported: " in capfd.readouterr().out
    for words, says in ((["empty"], "neither a run nor a record"), (["none"], "no such folder")):
        assert main.main(["import-record", str(tmp_path / words[0])]) == 2
        assert says in capfd.readouterr().err
