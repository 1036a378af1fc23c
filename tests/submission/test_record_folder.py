"""Record folders: a clean one has no finding, and every planted flaw is named by its rule."""

import json
import re

import pytest
from support.logs import MACHINE, REFERENCE, SOURCE, TUNED, UNSCORED

from pgolf.analysis.training_logs import LogError
from pgolf.cli import main
from pgolf.submission.conditions import FAIL
from pgolf.submission.legality import sentence
from pgolf.submission.record_folder import of_folder

pytestmark = pytest.mark.usefixtures("real_scripts")
LOG = TUNED.replace("val_tokens: 40960", "val_tokens: 40540160").replace(
    "  iterations", "  ema_decay: 0.9965\n  iterations"
)
BPB = {"42": "1.07234560", "7": "1.07334560", "314": "1.07134560"}
README = """
**val_bpb: 1.0723** (mean of three)

| Seed | Steps | Post-quant bpb | **Adapted val_bpb** | Δ bpb | Artifact |
|---|---|---|---|---|---|
| 42 | 4,800 | 1.0830 | **1.07235** | -0.5 | 15,928,000 |
| 7 | 4,800 | 1.0830 | **1.07335** | -0.5 | 15,928,000 |
| 314 | 4,800 | 1.0830 | **1.07135** | -0.5 | 15,928,000 |
| **Mean** | **4,800** | 1.0830 | **1.07235** | | 15.9 MB |
"""


def log_of(seed):
    other = str(2.77 + int(seed) / 1e5)  # a curve of its own
    return (
        LOG.replace("{seed}", seed).replace("1.07234560", BPB[seed]).replace("val_loss: 2.7700", f"val_loss: {other}")
    )


@pytest.fixture
def folder(tmp_path):
    """A clean record of three seeds."""
    folder = tmp_path / "track_10min_16mb" / "record"
    folder.mkdir(parents=True)
    for seed in BPB:
        (folder / f"train_seed{seed}.log").write_text(log_of(seed))
    results = {seed: {"val_bpb": float(bpb), "artifact_bytes": 15_928_000} for seed, bpb in BPB.items()}
    claims = {"val_bpb": 1.0723456, "val_bpb_std": 0.001, "seeds": [42, 7, 314], "seed_results": results}
    claims |= {"bytes_total": 15_928_000, "track": "10min_16mb", "blurb": "3-seed mean", "ema": True}
    (folder / "submission.json").write_text(json.dumps(claims))
    (folder / "README.md").write_text(README)
    (folder / "train_gpt.py").write_bytes(b"#" * 28_000)
    return folder


def edit(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def broken(folder):
    return {v.rule: v.found for v in of_folder(folder) if v.outcome == FAIL}


def test_a_clean_record_has_no_finding_and_is_not_called_legal(folder):
    assert broken(folder) == {}
    assert sentence(of_folder(folder)).startswith("no violation found: 14 of 15 rules hold; not tested: C1 to C4")


LOGS = "train_seed42.log"
FLAWS = [
    (LOGS, "15928000 bytes", "16000001 bytes", "size", "16,000,001 bytes are over the cap of 16,000,000 by 1"),
    ("submission.json", "15928000", "16000001", "size", "is over the cap of 16,000,000"),
    (
        "submission.json",
        '"bytes_total": 15928000',
        '"bytes_total": 15900000',
        "bytes as logged",
        "bytes_total 15,900,000",
    ),
    ("submission.json", "1.0733456", "1.0713999", "scores as logged", "seed_results 7 val_bpb 1.0713999"),
    ("submission.json", '"val_bpb": 1.0723456,', '"val_bpb": 1.0700001,', "scores as logged", "is the mean of"),
    ("submission.json", '"val_bpb_std": 0.001', '"val_bpb_std": 0.0003', "scores as logged", "val_bpb_std 0.0003"),
    ("submission.json", "[42, 7, 314]", "[42, 7, 314, 9]", "a log of every seed", "no log of seed 9"),
    ("submission.json", '"seeds"', '{"seeds"', "readable claims", "no JSON object"),
    ("README.md", "**1.07335**", "**1.07135**", "scores as logged", "adapted val_bpb 1.07135 of seed 7 in README.md"),
    (
        "README.md",
        "1.0830 | **1.07235** | |",
        "1.0830 | **1.0709** | |",
        "scores as logged",
        "mean adapted val_bpb 1.0709",
    ),
    ("README.md", "| 7 | 4,800", "| 7 | 4,900", "steps and parameters as logged", "steps 4,900 of seed 7"),
    ("README.md", "15,928,000 |\n| 314", "15,910,000 |\n| 314", "bytes as logged", "artifact 15,910,000 of seed 7"),
    ("README.md", "val_bpb: 1.0723", "val_bpb: 1.0623", "scores as logged", "val_bpb 1.0623 at the top of README.md"),
    (
        "submission.json",
        '"42": {',
        '"42": {"pre_quant_val_bpb": 1.0699, ',
        "scores as logged",
        "no such score in its log",
    ),
    (
        LOGS,
        "quantized+brotli: 15928000",
        "quantized+brotli: 15929000",
        "bytes as logged",
        "is not the file's 15,900,000",
    ),
    (LOGS, "seed: 42", "seed: 43", "a log of every seed", "no log of seed 42"),
    (LOGS, "embed_lr: 0.6", "embed_lr: 0.5", "one configuration", "embed_lr 0.5 and 0.6"),
    (LOGS, "(compressed): 28000", "(compressed): 27000", "one configuration", "code of 140,000"),
    (LOGS, "train_time: 587500ms", "train_time: 600900ms", "training clock", "600.9 s of 600 s"),
    (LOGS, "eval_time:500200ms", "eval_time:600200ms", "evaluation clock", "600.2 s of 600 s"),
    (LOGS, "total_eval_time:500.2s", "total_eval_time:700.0s", "evaluation clock", "700.0 s of 600 s"),
    (LOGS, "val_tokens: 40540160", "val_tokens: 9662464", "whole validation split", "9,662,464 tokens, 24% of"),
    (LOGS, "val_loss:2.75000000", "val_loss:3.22000000", "bytes of the published text", "divided by 175"),
]


@pytest.mark.parametrize(("file", "old", "new", "rule", "says"), FLAWS)
def test_a_flaw_is_named_by_its_rule(folder, file, old, new, rule, says):
    if rule == "one configuration" and "code" in says:
        edit(folder / file, "(uncompressed): 140000", "(uncompressed): 139000")
        says = "code of 139,000"
    edit(folder / file, old, new)
    found = broken(folder)
    assert rule in found
    assert says in found[rule]


def test_config_hashes_and_forecasts_of_our_own_seeds_are_no_second_configuration(folder):
    for seed, digest in zip(BPB, ("fd404359abb1", "136ff5a68e52", "0123456789ab"), strict=True):
        log = folder / f"train_seed{seed}.log"
        own = f"fingerprint:5138ca613ebb config:{digest}\nstep:2/20 forecast:757,7{seed} bytes (1 to 2): fits\n"
        log.write_text(own + log.read_text())
    assert broken(folder) == {}


def test_a_log_that_stops_before_its_score_is_named(folder):
    log = (folder / LOGS).read_text()
    (folder / LOGS).write_text(log[: log.index("stopping_early")])
    assert (
        f"{LOGS} has no score of the quantized file and stops at step 4800 of 20000" in broken(folder)["complete logs"]
    )
    (folder / LOGS).unlink()
    assert broken(folder) == {"a log of every seed": "no log of seed 42, which is claimed"}


def test_one_log_for_two_seeds_is_named_and_a_second_copy_of_a_log_is_not(folder):
    (folder / "train.log").write_text((folder / LOGS).read_text())
    assert broken(folder) == {}
    (folder / "train.log").unlink()
    text = (folder / LOGS).read_text()
    (folder / "train_seed7.log").write_text(text.replace("seed: 42", "seed: 7"))
    assert f"{LOGS} and train_seed7.log are logs of one training" in broken(folder)["a training per log"]


def test_a_file_name_with_another_seed_than_its_log_is_named(folder):
    (folder / "train_seed42.log").rename(folder / "train_seed99.log")
    assert broken(folder) == {"a log of every seed": "train_seed99.log is a log of seed 42"}


def test_raw_weights_under_a_claimed_average_are_named(folder):
    for seed in BPB:
        edit(folder / f"train_seed{seed}.log", "ema:applying EMA weights\n", "")
        edit(folder / f"train_seed{seed}.log", "pre-quantization post-ema", "pre-quantization")
    assert "no average was applied: raw weights were scored" in broken(folder)["averaged weights used"]


def test_a_script_larger_than_counted_is_named_and_its_readable_form_is_not(folder):
    (folder / "train_gpt.py").write_bytes(b"#" * 28_001)
    assert broken(folder) == {}  # smaller than the uncompressed code that the log counts too
    (folder / "train_gpt.py").write_bytes(b"#" * 140_000)
    assert broken(folder) == {}
    (folder / "train_gpt.py").write_bytes(b"#" * 140_001)
    assert set(broken(folder)) == {"code as counted", "size"}


def test_a_shipped_file_counts_to_the_byte(folder):
    (folder / "final.ptz").write_bytes(bytes(16_000_000 - 28_000))
    assert broken(folder) == {}
    (folder / "final.ptz").write_bytes(bytes(16_000_000 - 28_000 + 1))
    assert "final.ptz and train_gpt.py have 16,000,001 bytes on disk, over the cap by 1" in broken(folder)["size"]
    (folder / "final.ptz").write_bytes(b"weights")
    edit(folder / "submission.json", '"ema": true', f'"artifact_sha256": "{"0" * 64}"')
    assert broken(folder) == {"size": "final.ptz has not the artifact_sha256 of submission.json"}


def test_a_mean_of_more_seeds_than_are_logged_is_named(folder):
    claims = {"val_bpb": 1.07, "blurb": "3-seed mean: 1.07"}
    for file in ("README.md", "train_seed7.log", "train_seed314.log"):
        (folder / file).unlink()
    (folder / "submission.json").write_text(json.dumps(claims))
    assert "a mean of 3 seeds is claimed, and 1 is logged" in broken(folder)["a log of every seed"]


def test_seeds_whose_logs_are_missing_are_held_against_the_readme(folder):
    (folder / "train_seed7.log").unlink()
    edit(folder / "README.md", "**1.07335**", "**1.07435**")
    found = broken(folder)
    assert "val_bpb 1.0733456 of seed 7 in submission.json, and not in its row" in found["scores as logged"]
    assert found.keys() == {"a log of every seed", "scores as logged"}


def test_a_track_without_a_clock_is_not_timed(folder):
    edit(folder / LOGS, "train_time: 587500ms", "train_time: 9000000ms")
    assert set(broken(folder)) == {"training clock"}
    edit(folder / "submission.json", "10min_16mb", "non-record-16mb")
    assert broken(folder) == {}


def test_a_log_of_the_baseline_script_alone_is_read_and_its_last_steps_may_cross_the_limit(tmp_path):
    log = SOURCE + MACHINE + REFERENCE
    (tmp_path / "train.log").write_text(log)
    assert broken(tmp_path).keys() <= {"whole validation split"}  # its tokens are invented
    (tmp_path / "train.log").write_text(re.sub("600012ms", "600400ms", log))
    assert "training clock" in broken(tmp_path)


def test_an_incomplete_log_over_the_cap_is_named_for_both(tmp_path):
    (tmp_path / "train.log").write_text(UNSCORED)
    assert {"complete logs", "size"} <= broken(tmp_path).keys()


def test_an_empty_folder_is_no_record(tmp_path):
    with pytest.raises(LogError, match="neither a run nor a record"):
        of_folder(tmp_path)


def test_the_command_prints_a_table_and_writes_a_page_and_its_status_tells(folder, tmp_path, capfd):
    page = tmp_path / "legality.html"
    assert main.main(["legality", str(folder), "--html", str(page)]) == 0
    assert re.search(r"pass +size +15,928,000, 15,928,000", capfd.readouterr().out)
    edit(folder / "submission.json", "3-seed mean", "<script>")
    edit(folder / LOGS, "15928000 bytes", "16000001 bytes")
    assert main.main(["legality", str(folder), "--html", str(page)]) == 1
    assert capfd.readouterr().out.splitlines()[-2] == "not legal: size, bytes as logged"
    text = page.read_text()
    assert "over the cap of 16,000,000 by 1" in text
    assert text.count("<tr>") == 16
    assert main.main(["legality", str(tmp_path / "nothing")]) == 2
    assert "no such folder" in capfd.readouterr().err


@pytest.mark.parametrize("value", [None, "1.07", [], {}, [{"seed": 42}], {"42": 1.07}, 10**30, True])
def test_claims_of_any_type_are_read_without_an_error(folder, value):
    names = ("seeds", "seed_results", "val_bpb", "val_bpb_std", "bytes_total", "track", "artifact_sha256")
    (folder / "submission.json").write_text(json.dumps(dict.fromkeys(names, value)))
    (folder / "README.md").write_text("| Seed | val_bpb |\n|--|\n| 42 | x |\n| mean | −1.0 |\n|||\n")
    assert len(of_folder(folder)) == 15
