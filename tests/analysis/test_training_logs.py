"""Reading logs: which figures are believed, what counts as configuration, what is said to be odd."""

import itertools
import re
import time
from dataclasses import replace

import pytest
from support.logs import LEGAL_TTT, MACHINE, REFERENCE, SLIDING, SOURCE, TUNED, UNSCORED

from pgolf.analysis.training_logs import read
from pgolf_core.config import ROOT

LOGS = ROOT.parent / "shared" / "logs"


def test_the_reference_trainer():
    log = read(REFERENCE)
    score = log.final
    assert (score.label, score.val_loss, score.val_bpb) == ("final_int8_zlib_roundtrip_exact", 2.06123456, 1.2345678)
    assert log.artifact == {"codec": "int8+zlib", "weights": 15_700_000, "code": 50_000, "total": 15_750_000}
    assert (log.steps, log.iterations, log.stopped_by, log.seconds) == (6821, 20000, "wallclock", 600.012)
    assert log.rows[0] == {"step": 0, "val_loss": 6.9, "val_bpb": 4.1, "train_seconds": 0.0}
    assert log.rows[1] == {"step": 1, "train_loss": 6.91, "train_seconds": 0.044}
    assert log.validation["val_bpb"] == 1.22 and log.before_quantization is None
    assert log.protocol == "final_int8_zlib_roundtrip_exact"
    assert log.data_fingerprint == "log: words_1024.model, 99328 val tokens"
    assert log.flags == []


def test_everything_that_configures_and_nothing_else():
    assert read(REFERENCE).config == {
        "tokenizer_kind": "sentencepiece", "tokenizer_path": "./data/tokenizers/words_1024.model",
        "train_loader.dataset": "words10B", "train_loader.train_shards": 3,
        "val_loader": "shards", "val_files": "./data/words_val_*.bin", "val_tokens": 99328,
        "model_params": 1234567, "unique_layers": 9, "loops": 1, "world_size": 8, "grad_accum_steps": 1,
        "sdp_backends.cudnn": False, "sdp_backends.flash": True,
        "attention_mode": "gqa", "num_heads": 8, "num_kv_heads": 4,
        "tie_embeddings": True, "embed_lr": 0.05, "head_lr": 0.0, "quantizer": "using default int8 for all",
        "train_batch_tokens": 524288, "train_seq_len": 1024, "iterations": 20000, "warmup_steps": 2,
        "max_wallclock_seconds": 600.0, "seed": 1337,
    }  # fmt: skip
    assert read("environment:seed=5 num_layers=2\n").config == {"seed": 5, "num_layers": 2}  # a log of pgolf


def test_hyperparameters_in_a_block():
    log = read(TUNED.format(seed=42))
    assert log.config == {
        "artifact_dir": "", "compressor": "brotli", "embed_lr": 0.6, "eval_stride": 64, "iterations": 20000,
        "logfile": "logs/tuned_s42.txt", "run_id": "tuned_s42", "seed": 42, "sliding_window_enabled": False,
        "tie_embeddings": True, "tokenizer_path": "./data/tokenizers/words_8192.model", "train_batch_tokens": 786432,
        "ttt_enabled": True, "vocab_size": 8192, "train_shards": 128, "val_tokens": 40960, "model_params": 36000000,
        "gptq": "reserving 4s, effective=596000ms",
        "ttt_phased.total_docs": 50000, "ttt_phased.prefix_docs": 2000, "ttt_phased.boundaries": [666, 2000],
    }  # fmt: skip
    other = read(TUNED.format(seed=7)).config
    assert {name for name in other if other[name] != log.config[name]} == {"seed", "run_id", "logfile"}


def test_phased_ttt_is_final_and_diagnostics_are_not():
    log = read(TUNED.format(seed=42))
    assert (log.final.label, log.final.val_bpb) == ("quantized_ttt_phased", 1.0723456)
    assert log.before_quantization.val_bpb == 1.071
    assert log.artifact == {
        "codec": "quantized+brotli", "weights": 15_900_000, "code": 28_000, "total": 15_928_000,
    }  # fmt: skip
    assert log.rows[2] == {"step": 4500, "train_loss": 2.84, "train_seconds": 540.0}
    assert (log.seconds, log.final.seconds, log.flags) == (587.5, 500.2, [])


def test_a_score_that_only_repeats_another_is_named():
    log = read(SLIDING)
    said = "final_int8_zlib_roundtrip_exact only repeats final_int6_sliding_window_exact"
    assert log.flags == [said]
    assert (log.final.label, log.protocol) == (
        "final_int6_sliding_window_exact", "final_int6_sliding_window_exact, stride 64",
    )  # fmt: skip
    assert log.before_quantization.label == "DIAGNOSTIC post_ema"
    log = read(SLIDING + LEGAL_TTT)
    assert log.flags == [said]
    assert (log.final.val_bpb, log.protocol) == (1.11211122, "legal_ttt_exact, stride 64")
    assert log.config["ttt_sliding.ttt_lr"] == 0.002


def test_the_precise_one_of_two_scores_wherever_it_stands():
    lines = REFERENCE.splitlines()
    assert read("\n".join([*lines[:-2], lines[-1], lines[-2]]) + "\n").final.val_bpb == 1.2345678
    assert read("\n".join(lines[:-1]) + "\n").final.val_bpb == 1.2346


def test_a_stride_in_the_line_or_before_it():
    mode = "final_eval_mode:sliding_window stride:64 batch_seqs:32\nfinal_int8_zlib_roundtrip val"
    log = read(REFERENCE.replace("final_int8_zlib_roundtrip val", mode))
    assert log.protocol == "final_int8_zlib_roundtrip_exact, stride 64"
    assert log.config["final_eval_mode"] == "sliding_window"
    log = read(REFERENCE + "sliding_window_eval stride:512 sliding val_loss: 1.9556 sliding val_bpb: 1.1582\n")
    assert (log.final.val_bpb, log.protocol) == (1.1582, "sliding_window_eval, stride 512")


def test_totals_of_raw_weights_are_not_the_file():
    log = read(UNSCORED)
    assert log.artifact == {"codec": "rdquant+zstd", "weights": 16_500_000, "code": 80_000, "total": 16_580_000}
    assert read(UNSCORED[: UNSCORED.index("Serialized model rd")]).artifact == {}
    raw_last = UNSCORED + "Serialized model: 111000000 bytes\nTotal submission size: 111080000 bytes\n"
    assert read(raw_last).artifact["total"] == 16_580_000
    log = read("step:1/1 train_loss:2.0\nserialized_model_int8_zlib:654 bytes (payload:700)\n")
    assert log.artifact == {"codec": "int8+zlib", "weights": 654}
    assert "the log states no total of file and code" in log.flags
    log = read(REFERENCE.replace("size int8+zlib: 15750000", "size int8+zlib: 15750001"))
    assert log.flags == ["the total of 15,750,001 bytes is not the file's 15,700,000 and 50,000 of code"]


def test_no_score_after_quantisation_is_no_final_score():
    log = read(UNSCORED)
    assert log.final is None
    assert log.flags == [
        "16,580,000 bytes are over the cap of 16,000,000",
        "the log has no score after quantisation",
        "averaged weights were quantised, and the score before quantisation is not theirs",
    ]
    nan = REFERENCE.replace("2.06123456 val_bpb:1.23456780", "nan val_bpb:nan")
    assert read(nan).final.val_bpb == 1.2346 and "final_int8_zlib_roundtrip_exact is nan" in read(nan).flags
    nan = nan.replace("val_loss:2.0612 val_bpb:1.2346", "val_loss:nan val_bpb:nan")
    assert read(nan).final is None


@pytest.mark.parametrize(
    ("text", "stop", "word"),
    [
        (TUNED.format(seed=1), "quantized_ttt_phased", "ttt"),
        (SLIDING + LEGAL_TTT, "ttt_sliding:done", "ttt"),
        (SLIDING, "ndow val_loss", "final_int6_sliding_wi"),
    ],
)
def test_a_log_that_stops_before_an_evaluation_it_began(text, stop, word):
    log = read(text[: text.index(stop)] + ("quantized val_loss:2.80000000 val_bpb:1.09000000\n" * ("TTT" in text)))
    assert log.final is None and f"{word} was to evaluate the file, and the log has no score of it" in log.flags


@pytest.mark.parametrize("end", [-1, -4, -13, -30, -58])
def test_a_log_cut_in_a_line(end):
    """Without its end a figure may be another figure: 1.2345 of 1.23456780. At -1 only the newline is gone."""
    log = read(REFERENCE[:end])
    assert log.final.label == "final_int8_zlib_roundtrip" + "_exact" * (end == -1)
    assert log.notes == ["the log ends in the middle of a line, which is left out"] * (end != -1) == log.flags
    cut = read(REFERENCE[: REFERENCE.index("37\nwarmup_step")])
    assert "seed" not in cut.config and "iterations" in cut.config


def test_source_code_in_a_log_is_no_log():
    log, plain = read(SOURCE + MACHINE + REFERENCE), read(REFERENCE)
    assert (log.config, log.rows, log.artifact) == (plain.config, plain.rows, plain.artifact)
    assert [(s.label, s.val_bpb) for s in log.scores] == [(s.label, s.val_bpb) for s in plain.scores]
    device = {"device_name": "NVIDIA H100 80GB HBM3"}
    assert log.environment == {"python": "3.12.1", "torch": "2.11.0+cu130"} | device
    alone = read(SOURCE + MACHINE)
    assert not alone.rows and not alone.scores and not alone.config
    for line in ('    print("final_int8_zlib_roundtrip_exact val_loss:1.0 val_bpb:0.5")', "seed: int = 7"):
        assert read(f"{line}\n{REFERENCE}").config == plain.config


@pytest.mark.parametrize("line", ["a" + " " * 4000, "a" + " " * 100_000, "a b " * 1000, "1 (" * 1300, "a:b " * 1000])
def test_a_hostile_line_takes_no_time(line):
    """8,000 blanks once took 4.7 s: the label and the gap behind it could share them in any way."""
    start = time.process_time()
    assert read(f"{line}\n{line}\n{REFERENCE}").rows == read(REFERENCE).rows
    assert time.process_time() - start < 1


@pytest.mark.parametrize("text", [REFERENCE, TUNED.format(seed=3), SLIDING + LEGAL_TTT])
@pytest.mark.parametrize(
    "around",
    [
        "{}\r",
        "1700000000.135 {}",
        "2026-03-20 10:00:05,123 INFO {}",
        "2026-03-20T10:00:05.000Z {}",
        "[2026-03-20 10:00:05+00:00] {}",
        "\x1b[32m{}\x1b[0m",
        "  5%|#     | 5/100 [00:01<00:20]\r{}",
        "[rank0]: {}",
        "[default0]:{}\n[default1]:{}\n[default12]:step:9/10 val_loss:1.0 val_bpb:0.1",
    ],
)
def test_what_stands_around_each_line_changes_nothing(text, around):
    found, plain = read("".join(around.replace("{}", line) + "\n" for line in text.splitlines())), read(text)
    assert (found.config, found.rows) == (plain.config, plain.rows)
    assert [replace(s, line=0) for s in found.scores] == [replace(s, line=0) for s in plain.scores]
    assert [replace(s, line=0) for s in found.sizes] == [replace(s, line=0) for s in plain.sizes]
    assert (found.final.val_bpb, found.artifact, found.flags) == (plain.final.val_bpb, plain.artifact, plain.flags)


@pytest.mark.parametrize(
    ("size", "cap"),
    [
        ("budget:15270000/15900000 (15.27/15.90MB) FITS", 15_900_000),
        ("Total submission: 15270000 bytes", 16_000_000),
        ("Total submission: 15,270,000", 16_000_000),
    ],
)
def test_the_last_score_counts_whatever_its_label_and_a_size_in_a_line_of_its_own(size, cap):
    """Ternary and binary records name neither a codec nor a quantised model."""
    log = read(
        "seed:5\nstep:200/200 val_loss:3.1000 val_bpb:1.2000 train_time:90000ms\n"
        f"artifact:15.20MB ternary:60000000(13000000B) fp:2500000(2520000B) code:70000\n{size}\n"
        "final_ternary_roundtrip val_loss:3.0500 val_bpb:1.1900\ntemp_scaling optimal_T:0.90 time:400ms\n"
        "final_sliding val_loss:2.9900 val_bpb:1.1600 (stride=16, T=0.90) eval_time:400000ms\n"
    )
    assert (log.final.val_bpb, log.final.stride, log.final.seconds) == (1.16, 16, 400.0)
    assert log.artifact["total"] == 15_270_000 and log.cap == cap


def test_a_second_training_in_one_file_replaces_the_first():
    log = read(REFERENCE + UNSCORED)
    assert log.final is None and log.artifact["total"] == 16_580_000
    assert "goes back from step 6821 to 2950" in log.notes[0]
    assert [row["step"] for row in log.rows] == [0, 1, 2950]


def test_what_is_unknown_is_said():
    log = read("step:9/9 val_loss:2.0 val_bpb:1.2\nfinal_int8_zlib_roundtrip_exact val_loss:2.1 val_bpb:1.3\n")
    assert log.data_fingerprint == "log: ?, ? val tokens"
    assert any("does not tell both tokenizer and validation tokens" in flag for flag in log.flags)


@pytest.mark.skipif(not LOGS.is_dir(), reason="no ../shared/logs: logs of public records are not in the repository")
def test_logs_of_public_records():
    """All of these end with their final score, to eight digits, and with their last total; one has no such score."""
    paths = sorted(path for path in LOGS.rglob("train*") if path.suffix in (".log", ".txt"))
    logs = {f"{path.relative_to(LOGS).parts[0]}/{path.stem}": path.read_text(encoding="utf-8") for path in paths}
    for name, text in logs.items():
        log = read(text)
        scores = re.findall(r"^(?:[\d.]+ )?[A-Za-z].* val_loss:(\d\.\d{8}) val_bpb:(\d\.\d{8})", text, re.MULTILINE)
        totals = re.findall(r"Total submission size.*: (\d+) bytes", text)
        found = log.final and (log.final.val_loss, log.final.val_bpb)
        assert found == (tuple(map(float, scores[-1])) if scores else None), name
        assert log.artifact["total"] == int(totals[-1]) and bool(scores) == ("DGAttention" not in name), name
    configs = {name: read(text).config for name, text in logs.items() if name[:10] in ("2026-04-19", "2026-04-22")}
    for a, b in itertools.combinations(configs.values(), 2):  # one claims to differ by a knob; its logs do not
        assert {name for name in a.keys() | b.keys() if a.get(name) != b.get(name)} == {"seed", "run_id", "logfile"}
