"""A run's script trains, exports and scores alone, to the bits of the run."""

import ast
import gc
import hashlib
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.alone import ONLY, final_bpb, run_alone
from support.training import tiny

from pgolf.runs.result import ARTIFACT
from pgolf.script import compile as compiling
from pgolf.script import parts, reach, stored
from pgolf.script.compile import packed_script, script_of
from pgolf.script.folding import Folding
from pgolf.script.reach import ScriptError
from pgolf.training.forecast import CODE_MARGIN, forecast
from pgolf.training.run import train
from pgolf_core.config import ROOT, RunConfig

pytestmark = pytest.mark.usefixtures("real_scripts")
SHORT = dict(
    iterations=4, calibration_tokens=1024, val_loss_every=0, val_max_tokens=0, roundtrip_val_max_tokens=0,
    resume_every_seconds=0,
)  # fmt: skip
CASES = {
    "baseline": {},
    "record 1218": dict(
        num_layers=2, parallel_from=2, mlp_mult=4, xsa_last=2, rope_dims=16, ln_scale=True, ve_last=1, ve_dim=16,
        skip_gates=True, qk_gain_init=4.0, muon_wd=0.085, embed_wd=0.085, ema_decay=0.9, warmdown_frac=0.6,
        quantizer="sdclip:6:12.85", gptq=True, codec="brotli_shuffle", keep_float_max_numel=0, shuffle_sequences=1,
    ),
    "looped, averaged, solved": dict(
        num_layers=3, parallel_from=3, loop_start=1, loop_end=1, loop_extra=1, loop_from=0.35, ema_decay=0.9,
        allocation="solve", codec="ans", cap_bytes=60_000, int8_residual_rank=1, int8_residual_bits=4,
        keep_float_max_numel=0, compression_reg_weight=0.01,
    ),
    "halting": dict(
        num_layers=3, parallel_from=3, loop_start=1, loop_end=1, loop_extra=2, halting="act", halting_eval="threshold",
        halting_threshold=0.2, ponder_cost=0.02, eval_tilt_boost=1.5, eval_tilt_order=4,
    ),
    "learned": dict(
        allocation="solve", codec="ans", cap_bytes=50_000, keep_float_max_numel=0, learn_steps=4, learn_tokens=256,
        learn_labels=0.5, learn_rate=0.02, max_wallclock_seconds=300,
    ),
    "low-rank residuals": dict(
        int8_residual_rank=2, int8_residual_bits=4, int8_residual_budget_bytes=20_000, keep_float_max_numel=0,
        adapt="sgd", eval_stride=16, eval_tilt_boost=2.0,
    ),
    "adapted per document": dict(quantizer="step:0.4", codec="ans", adapt="lora", adapt_chunk=32, adapt_rank=2,
                                 compression_reg_weight=0.01, outlier_reg_weight=0.1),
    "codebook, sliding windows": dict(
        quantizer="codebook:32:2", embed_quantizer="step:0.5:fisher", codec="auto", keep_float_max_numel=0,
        eval_stride=16, eval_cache_size=8, eval_cache_mix_weight=0.02, smear_gate="v1", swa_every=2,
        warmdown_iters=6, swa_start_frac=0.9, train_seq_schedule="32@0.5", bigram_vocab_size=64, bigram_dim=8,
    ),
    "bases": dict(
        num_layers=3, num_unique_blocks=2, weights="basis", weight_bases=2, weight_rank=2, weight_row_scale=True,
        ema_decay=0.9, allocation="solve", codec="ans", cap_bytes=70_000,
    ),
    "Legendre bases": dict(num_layers=3, weights="basis", weight_coefficients="legendre", weight_bases=3),
    "hypernetwork": dict(num_layers=2, weights="hypernetwork", weight_bases=2, gptq=True, keep_float_max_numel=0),
    "random maps": dict(
        weights="random", weight_rank=4, allocation="solve", codec="ans", cap_bytes=60_000, adapt="lora",
        adapt_chunk=32, adapt_rank=2,
    ),
}  # fmt: skip

QUICK = ("looped, averaged, solved",)  # others are left to make test-long


def trained_alone(knobs: dict, data: Path, tmp_path: Path, ranks: int = 1) -> None:
    """Train with the workbench and with both forms of the script, and compare files and scores."""
    config = tiny(**SHORT | dict(data_path=str(data)) | knobs)
    result = train(config, tmp_path / "run")
    script = script_of(config)
    assert result.bytes["code"] == len(script.packed) and result.script_sha256 == script.sha256
    assert set(script.packages) <= set(ONLY)
    assert forecast(config).parts["code"] == pytest.approx(len(script.packed), rel=CODE_MARGIN)
    (tmp_path / "train_gpt.py").write_bytes(script.packed)
    (tmp_path / "train_gpt_readable.py").write_text(script.readable)
    output = run_alone(tmp_path / "train_gpt.py", data, ranks=ranks)
    artifact = tmp_path / "out" / ARTIFACT
    assert hashlib.sha256(artifact.read_bytes()).hexdigest() == result.artifact_sha256, output
    assert final_bpb(output) == f"{result.roundtrip_val_bpb:.8f}"
    assert f"Total submission size: {result.total_bytes} bytes" in output
    if knobs in ({}, CASES[QUICK[0]]):
        again = run_alone(tmp_path / "train_gpt_readable.py", data, "--eval", str(artifact))
        assert final_bpb(again) == final_bpb(output)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_a_script_alone_makes_the_bytes_and_the_score_of_its_run(few_documents, tmp_path, case):
    trained_alone(CASES[case], few_documents, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["baseline", "looped, averaged, solved", "random maps"])
def test_two_ranks_of_a_script_make_the_bytes_of_one_process(few_documents, tmp_path, case):
    trained_alone(CASES[case], few_documents, tmp_path, ranks=2)


@pytest.mark.slow
def test_the_readable_script_is_the_packed_one(few_documents, tmp_path):
    config = tiny(**SHORT | CASES["adapted per document"])
    (tmp_path / "readable").mkdir()
    script = script_of(config)
    (tmp_path / "train_gpt.py").write_bytes(script.packed)
    (tmp_path / "readable" / "train_gpt.py").write_text(script.readable)
    files = []
    for path in (tmp_path / "train_gpt.py", tmp_path / "readable" / "train_gpt.py"):
        run_alone(path, few_documents)
        files.append((path.parent / "out" / ARTIFACT).read_bytes())
    assert files[0] == files[1]


def test_seeds_folders_and_processes_share_a_script_and_what_counts_does_not():
    config = RunConfig(track="nano")
    script = script_of(config)
    assert script == script_of(
        config.with_knobs(seed=7, data_path="elsewhere", world_size=2, roundtrip_val_max_tokens=0)
    )
    assert script.packed != script_of(config.with_knobs(matrix_lr=0.03)).packed
    assert script.readable.count("import pgolf") == script.readable.count("pgolf_core.") == 0


def test_options_that_are_off_are_left_out():
    lean, full = (script_of(tiny(**knobs)).readable for knobs in ({}, CASES["codebook, sliding windows"]))
    classes = ("class BigramHash", "class SmearGate", "class CodebookTensor", "class Generat")
    for name in (*classes, "def ngram_cache", "ANS", "def gptq"):
        assert name not in lean
    for name in ("class BigramHash", "class SmearGate", "def ngram_cache", "class CodebookTensor"):
        assert name in full
    assert "class CompressionRegularizer" not in lean and "class Halting" not in lean and "ponder_cost" not in lean
    assert "def tilted" not in lean and "def hints_of" not in lean


@pytest.mark.parametrize(("device", "most"), [("auto", 13_100), ("cuda", 11_800), ("cpu", 13_000), ("mps", 11_800)])
def test_packed_scripts_stay_small_and_their_size_is_forecast(device, most):
    """Measured 12,978 for the baseline and 11,578 for CUDA alone; a rise is to be seen and decided on."""
    config = RunConfig(track="h100", device=device)
    assert forecast(config).parts["code"] == pytest.approx(len(packed_script(config)), rel=CODE_MARGIN)
    assert len(packed_script(config)) < most


def test_a_script_of_one_kind_of_device_holds_no_other_and_says_what_it_needs():
    configs = [RunConfig(track="h100", device=device) for device in ("cuda", "cpu")]
    cuda, cpu = (compiling._minified_all(reach.Reached(config, literal=True)) for config in configs)
    assert "torch.autograd" not in cuda and "this script needs CUDA" in cuda
    assert "torch.autograd" in cpu and "triton" not in cpu


def test_scripts_are_the_same_bytes_from_any_process():
    program = (
        "import hashlib; from pgolf.script.compile import _made; from pgolf_core.config import RunConfig; "
        "print(hashlib.sha256(_made(RunConfig(track='nano'))).hexdigest())"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)}
    other = subprocess.check_output([sys.executable, "-c", program], env=environment, text=True)
    assert other.strip() == hashlib.sha256(compiling._made(RunConfig(track="nano"))).hexdigest()


def test_a_script_on_disk_serves_its_own_knobs_and_code_and_a_damaged_one_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "FOLDER", tmp_path / "scripts")
    made = []

    def script_of(**knobs):
        return stored.from_disk(knobs, lambda: made.append(knobs) or b"script")

    assert script_of(a=1) == script_of(a=1) == b"script" and made == [dict(a=1)]
    script_of(a=2)
    monkeypatch.setitem(stored.SOURCES, "pgolf_core.model", "other code")
    script_of(a=2)
    assert made == [dict(a=1), dict(a=2), dict(a=2)]
    for path in (tmp_path / "scripts").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    assert script_of(a=2) == b"script" and len(made) == 4
    monkeypatch.setattr(stored, "FOLDER", next((tmp_path / "scripts").iterdir()) / "no folder")
    assert script_of(a=2) == b"script" and len(made) == 5


QUOTED = ("looped, averaged, solved", "adapted per document")


@pytest.mark.parametrize("case", [pytest.param(c, marks=() if c in QUOTED else pytest.mark.slow) for c in CASES])
def test_f_strings_of_packed_scripts_are_quoted_alike_by_every_python(case):
    """Python 3.12 and later may write a string inside an f-string's braces in other quotes."""
    reached = compiling.Reached(tiny(**CASES[case]), literal=True)
    nodes = [*ast.walk(ast.parse(compiling._minified_all(reached)))]
    in_braces = [m for n in nodes if isinstance(n, ast.FormattedValue) for m in ast.walk(n.value)]
    assert in_braces
    assert not [m.value for m in in_braces if isinstance(m, ast.Constant) and isinstance(m.value, str)]


def test_threads_make_scripts_at_the_same_time(tmp_path, monkeypatch):
    """CPython 3.11's parser fails when the collector lets another thread parse in the middle of it."""
    monkeypatch.setattr(stored, "FOLDER", tmp_path)
    compiling._script.cache_clear()
    compiling._packed.cache_clear()
    parts.module.cache_clear()
    threshold = gc.get_threshold()
    gc.set_threshold(50)
    gc.callbacks.append(let_others := lambda *_: time.sleep(0))
    configs = [tiny(), tiny(num_layers=2)] * 2
    try:
        with ThreadPoolExecutor(4) as pool:
            scripts = list(pool.map(script_of, configs))
    finally:
        gc.callbacks.remove(let_others)
        gc.set_threshold(*threshold)
    assert scripts == [script_of(config) for config in configs]


BEFORE = """
def f(self, config, mask, x):
    if config.a and x:
        x = 1 if config.b else 2
    if not config.a or mask is None:
        return config.name or x
    if x > 2:
        raise ValueError("large")
    try:
        x = self.gone is None and config.data.b
    except KeyError as error:
        raise ValueError("no") from error
    return x if config.other else -x
"""
AFTER = """
def f(self, config, mask, x):
    if x:
        x = 2
    if mask is None:
        return x
    x = config.data.b
    return x if config.other else -x
"""


def test_two_definitions_of_one_name_make_no_script(monkeypatch):
    """A user's quantizer with a helper that is called like one of the core, and whose tests are left as they are."""
    source = "from pgolf_core.scheme import register\n\ndef norm(x, mask):\n    return x if mask is None else mask\n"
    monkeypatch.setitem(parts.SOURCES, "users_scheme", source)
    monkeypatch.setattr(reach, "forms", lambda config: [("users_scheme", "norm")])
    parts.module.cache_clear()
    with pytest.raises(ScriptError, match=r"norm is defined in .* and in .*; rename one"):
        reach.Reached(tiny(), literal=True)
    parts.module.cache_clear()


def test_a_loop_keeps_its_only_exit():
    source = "def f(x):\n    while x:\n        if x > 9:\n            raise ValueError\n        x += 1"
    folded = Folding({}, {}, kept_errors=(), literal=False).visit(ast.parse(source))
    assert ast.unparse(folded) == source


def test_folding_decides_by_knobs_alone():
    folding = Folding(dict(a=True, b=0, name=""), {}, kept_errors={"SystemExit"}, literal=False)
    folding.absent = {"gone"}
    assert ast.unparse(folding.visit(ast.parse(BEFORE))) == AFTER.strip()
