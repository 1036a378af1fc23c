"""Shapes of lines met in public logs: final score, size, seed and step, as a reader sees them. All figures invented."""

import math
import re
import time

import pytest

from pgolf.analysis import claims, log_lines, training_logs
from pgolf.analysis.training_logs import read

HEAD = "seed:77\nstep:200/200 val_loss:3.1000 val_bpb:1.3000 train_time:90000ms\n"
RAW = "Serialized model: 67000000 bytes\nCode size: 70000 bytes\nTotal submission size: 67070000 bytes\n"
PACKED = "Serialized model int8+zlib: 15200000 bytes\nTotal submission size int8+zlib: 15270000 bytes\n"
FINAL = "final_int8_zlib_roundtrip val_loss:3.0500 val_bpb:1.1900 eval_time:1ms\n"


@pytest.mark.parametrize(
    ("lines", "bpb"),
    [
        (
            "sliding_window_exact val_loss:2.99 val_bpb:1.15\nsgd_ttt param_set:all lr:0.1 val_loss:2.9 val_bpb:1.12",
            1.12,
        ),
        ("final_quant_roundtrip_exact mode:mixed val_loss:2.99 val_bpb:1.15000001", 1.15000001),
        (
            "final_int8_zstd-22_roundtrip val_loss:3.0 val_bpb:1.15\nfinal_int8_zstd-22_roundtrip_exact val_bpb:1.1501",
            1.1501,
        ),
        ("final_ttt_lora val_loss:2.99 val_bpb:1.15 eval_time:9ms lora_rank:16", 1.15),
        ("ttt:done val_loss=2.990000 val_bpb=1.150000 elapsed=370.9s", 1.15),
        ("final_int6_lzma_roundtrip(ttt_lora) val_loss:2.99 val_bpb:1.15 eval_time:24ms", 1.15),
        ("final val_loss:2.99 val_bpb:1.150001 eval_time:37682ms", 1.150001),
        ("baseline_with_correction val_loss:2.99 val_bpb:1.15\nimprovement: -0.04 BPB", 1.15),
        ("  slot_chunk [1/60] bpb=1.1\nslot step:3/8 val_loss:2.9 val_bpb:1.1", 1.19),
        ("step:5/8 loss:2.9", 1.19),  # of a loop of test-time training
        (
            "legal_ttt val_loss:2.99 val_bpb:1.15\n[W501 23:01:49.1 Config.cpp:28] Warning: PYTORCH_CUDA is deprecated",
            1.15,
        ),
        ("diagnostic quantized val_loss:2.99 val_bpb:1.15", 1.19),
    ],
)
def test_the_last_score_of_the_file(lines, bpb):
    log = read(f"{HEAD}{RAW}{PACKED}{FINAL}{lines}\n")
    assert (log.final.val_bpb, log.artifact["total"], log.seed, log.steps) == (bpb, 15_270_000, 77, 200)
    assert log.final.val_loss is not None


TOTAL = "Total submission size"


@pytest.mark.parametrize(
    ("lines", "total"),
    [
        (f"Code size: 70000 bytes\nTernary artifact: 15200000 bytes (lzma)\n{TOTAL}: 15270000 bytes = 15.27MB", 15.27),
        (f"{RAW}Serialized model int6+coder: 15200000 bytes\n{TOTAL}: 15270000 bytes", 15.27),
        (
            f"{RAW}Serialized model int8+zlib (best): 15200000 bytes\n{TOTAL} int8+zlib: 15270000 bytes",
            15.27,
        ),
        (f"{RAW}Serialized model zstd-22: 15200000 bytes\n{TOTAL} zstd: 15270000 bytes", 15.27),
        (f"Serialized model fp32/bf16: 67000000 bytes\n{TOTAL} raw: 67070000 bytes\n{PACKED}", 15.27),
        ("raw_model:67000000 code:70000 total:67070000\nint8_zlib:15200000 code:70000 total:15270000 of:95%", 15.27),
        (f"{RAW}{PACKED}with_table: 15,900,000 bytes\ntotal_submission_with_table: 15,970,000 bytes (15 MB)", 15.97),
        (f"{RAW}serialized_artifact_lzma:15200000 bytes\n{TOTAL} lzma: 15270000 bytes\nsubmission_valid_lzma:1", 15.27),
        (f"{RAW}{PACKED}submission_budget int8+zlib total:15270000 budget:16000000\nsubmission_valid:0 bytes", 15.27),
        (f"{RAW}{PACKED}Serialized model int6+zstd: 14000000 bytes\n{TOTAL} int6+zstd: 14070000 bytes", 14.07),
        (f"{RAW}Serialized model: 90000000 bytes\n{PACKED}{TOTAL}: 15.27 MB", 15.27),
    ],
)
def test_the_size_of_file_and_code(lines, total):
    log = read(f"{HEAD}{lines}\n{FINAL}")
    assert (log.artifact["total"], log.final.val_bpb) == (round(total * 1e6), 1.19)
    assert total == 15.97 or not any("bytes" in flag for flag in log.flags)


def test_sizes_of_raw_weights_alone_are_no_artifact():
    log = read(f"{HEAD}{RAW}Serialized model int6+lzma: 9000000 bytes\n")
    assert "total" not in log.artifact and log.final is None
    prefix = RAW + "Serialized model int6: 11000000 bytes\nPaid prefix blob: 4000000 bytes\n"
    log = read(f"{HEAD}{prefix}Total submission size int6: 15070000 bytes\n{FINAL}")
    assert log.artifact["total"] == 15_070_000 and not any("is not the file's" in flag for flag in log.flags)


@pytest.mark.parametrize(
    ("line", "seed"),
    [
        ("lr:embed=0.035 matrix=0.025 batch:786432 wall:600s seed:1338", 1338),
        ("Hyperparameters:\n  seed: 314\n  rank: 0", 314),
        ("Seed: 42", 42),
        ("train_seq_len:1024 seed:7 iterations:200", 7),
        ("seed:abc", None),
        ("seed:" + "9" * 4000, None),
    ],
)
def test_the_seed_wherever_it_stands(line, seed):
    assert read(f"{line}\nstep:9/9 train_loss:3.1 train_time:9ms\n").seed == seed


def test_a_second_training_of_another_seed():
    assert read(f"{HEAD}{RAW}{PACKED}{FINAL}seed:5\nstep:0/90 val_loss:7.0 val_bpb:4.1\n").seed == 5


@pytest.mark.parametrize(
    ("lines", "steps"),
    [
        (
            "step:6850/6652 train_loss:2.47 train_time:5ms\nstopping_early: cap train_time:6ms step:6857/6652",
            6857,
        ),
        ("step:9/9 val_loss:2.2789 train_time:596608ms step_avg:23.07ms val_bpb:1.3319", 9),
        ("stopping_early: wallclock_cap train_time:600439ms step:1075/20000\nstep:2000 alpha:mean=0.3", 1075),
        ("step:9/60 train_loss:2.1 ce:1.6 jepa:0.9 train_time:3ms", 9),
    ],
)
def test_the_last_step(lines, steps):
    assert read(f"{lines}\n{FINAL}").steps == steps


def test_a_log_that_only_evaluates():
    log = read(
        "ttt_sliding:start chunks=9\nttt_sliding:done val_loss=1.9 val_bpb=1.12\n"
        "legal_ttt_exact val_loss:1.88 val_bpb:1.1157\n"
    )
    assert (log.final.val_bpb, log.steps, log.artifact) == (1.1157, None, {})


def test_test_time_training_before_quantisation_is_no_evaluation_that_is_lacking():
    log = read(f"ttt_enabled:True\n{HEAD}ttt:start chunks=9\n{RAW}{PACKED}{FINAL}")
    assert log.final.val_bpb == 1.19 and log.lacking == []
    assert read(f"{HEAD}{RAW}{PACKED}{FINAL}ttt:start chunks=9\n").final is None
    assert read(f"ttt_enabled:True\n{HEAD}{RAW}{PACKED}{FINAL}").final.val_bpb == 1.19


PATTERNS = {
    f"{module.__name__.rpartition('.')[2]}.{name}": pattern
    for module in (log_lines, training_logs, claims)
    for name, pattern in vars(module).items()
    if isinstance(pattern, re.Pattern)
}
SEARCHED = [
    "FIGURE",
    "STRIDE",
    "EVAL_TIME",
    "TRAIN_TIME",
    "COUNTER",
    "COLOUR",
    "CAP",
    "WHOLE",
    "PREQUANT",
    "QUANTIZED",
    "NOT_FINAL",
    "RAW",
    "MANY_SEEDS",
]
PIECES = [
    " ", "a", "1", "a ", "a:", "a:1 ", "1 (", "[", "=", ".", "1.", "a_", "val_loss:", "val_loss: 1 ", "seed", "(a)",
    "step:1/", "train_time:1", "NVIDIA ", "|  0  NVIDIA x  ", "Serialized model ", "total_submission ", "final_",
    "\x1b[1;", "ttt", "a=[", "stride=1", "eval:1 ", "final", "int1", "pre_", ":", ", ", "\t", "é", "1,", "import a.",
    "class a", "e+1", "stopping_early: a step:1",
]  # fmt: skip


@pytest.mark.parametrize("name", PATTERNS)
def test_the_time_of_a_pattern_grows_as_the_line(name):
    """A pattern whose time grows as the square of the line takes seconds for 16,000 characters."""
    pattern = PATTERNS[name]
    ways = [pattern.match, pattern.fullmatch]
    if name.rpartition(".")[2] in SEARCHED:
        ways += [pattern.search, pattern.findall]
    for piece in PIECES:
        for start in ("", "a", "a:1 ", "1 "):
            line = start + piece * (16_000 // len(piece)) + "\x00"
            for find in ways:
                begin = time.process_time()
                find(line)
                assert time.process_time() - begin < 0.2, (piece, start, find)


@pytest.mark.parametrize("figure", ["9" * 4000, "1e999", "1." + "9" * 4000, "-1e300", "nan", "inf", "1" * 20])
def test_figures_of_absurd_size_are_no_error(figure):
    lines = """seed:{}\niterations:{} train_batch_tokens:{}\nnum_layers:[{}]
step:{}/{} train_loss:{} train_time:{}ms\nbudget:{}/{}\nint8:{} code:{} total:{}\nCode size: {} bytes
Serialized model int8: {} bytes\nstopping_early: wallclock_cap train_time:{}s step:{}/{}
final_int8 val_loss:{} val_bpb:{} stride:{}""".replace("{}", figure)
    log = read(f"{HEAD}{lines}\n{FINAL}")
    assert log.final.val_bpb == 1.19 and log.flags is not None and log.artifact is not None
    numbers = [v for v in (*log.config.values(), log.steps, log.cap) if isinstance(v, int | float)]
    assert all(math.isfinite(v) and abs(v) < 2**63 for v in numbers)


def test_a_log_of_a_million_lines_is_read_in_bounded_time():
    start = time.process_time()
    text = "".join(
        f"a{i} val_loss:1.0 val_bpb:{i}.0\nSize {i}: {i} bytes\nstep:{i % 2}/2 val_loss:1 val_bpb:1\n"
        for i in range(20_000)
    )
    log = read(f"{HEAD}{text}{RAW}{PACKED}{FINAL}")
    assert log.final.val_bpb == 1.19 and len(log.flags) < 3000
    assert time.process_time() - start < 10
