"""Logs become runs: where they go, what is beside them, and what submission.json claims of them."""

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest
from support.logs import LEGAL_TTT, REFERENCE, SLIDING, TUNED, UNSCORED

from pgolf.analysis import records
from pgolf.analysis.training_logs import LogError
from pgolf.cli import main
from pgolf.disk import read_json
from pgolf.reports import sentences
from pgolf.runs import directory
from pgolf.runs.result import read_result
from pgolf.runs.table import load_metrics, load_runs
from pgolf_core.config import ROOT, RunConfig

LOGS = ROOT.parent / "shared" / "logs"


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(directory, "RUNS", tmp_path / "runs")
    return tmp_path / "runs"


@pytest.fixture
def record(tmp_path):
    """Write files of a record: text by path; returns its folder."""

    def write(files: dict[str, object], name: str = "2026-01-01_Some Record"):
        folder = tmp_path / name
        for path, content in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / path).write_text(text, encoding="utf-8", newline="")
        return folder

    return write


def pgolf(capfd, *words):
    """(exit status, stdout, stderr) of `pgolf import-log`."""
    status = main.main(["import-log", *map(str, words)])
    return status, *capfd.readouterr()


def remarks(log: str, submission: dict, record, root) -> list[str]:
    [imported], _ = records.import_logs([record({"train.log": log, "submission.json": submission})], None, root)
    return imported.remarks


def test_a_record_becomes_runs(capfd, record, root):
    claims = {"val_bpb": 1.2345678, "bytes_total": 15750000, "bytes_code": 50000, "step_stop": 6821}
    folder = record({"train.log": REFERENCE.replace("\n", "\r\n"), "submission.json": claims, "README.txt": "words"})
    status, out, err = pgolf(capfd, folder)
    assert (status, err) == (0, "")
    assert out.split() == ["2026-01-01_Some-Record/train", "complete", "1.23456780", "bpb", "15,750,000", "bytes"]
    run_dir = root / "2026-01-01_Some-Record" / "train"
    assert (run_dir / "log.txt").read_bytes() == (folder / "train.log").read_bytes()
    assert (run_dir / "submission.json").read_bytes() == (folder / "submission.json").read_bytes()
    facts = json.loads((run_dir / "import.json").read_text())
    assert facts["sha256"] == hashlib.sha256((folder / "train.log").read_bytes()).hexdigest()
    assert facts["source"] == str(folder / "train.log") and facts["final"] == "final_int8_zlib_roundtrip_exact"
    assert facts["metrics"][1]["val_bpb"] == 1.2345678 and facts["metrics"][1]["line"] == 28
    assert facts["sizes"][-1] == {"label": "Total submission size int8+zlib", "bytes": 15750000, "line": 26}
    assert facts["flags"] == facts["disagreements"] == []
    result = read_result(run_dir)
    assert (result.kind, result.seed, result.track) == ("import", 1337, "")
    assert (result.val_bpb, result.prequant_val_bpb, result.roundtrip_val_loss) == (1.22, 1.22, 2.06123456)
    assert result.bytes == {"weights": 15_700_000, "code": 50_000, "total": 15_750_000} and result.fits
    assert (result.cap_bytes, result.steps, result.tokens) == (16_000_000, 6821, 6821 * 524288)
    assert (result.train_seconds, result.eval_seconds, result.stopped_by) == (600.012, 1.401, "wallclock")
    assert result.protocol == "final_int8_zlib_roundtrip_exact" and result.parameters == 1234567
    (root / "s" / "ours").mkdir(parents=True)
    (root / "s" / "ours" / "config.json").write_text(json.dumps(RunConfig().model_dump()))
    row, ours = load_runs(root).to_dict("records")
    assert (row["status"], row["kind"], row["bpb"], row["flags"]) == ("complete", "import", 1.2345678, [])
    assert ours["flags"] == []
    assert row["num_heads"] == 8 and load_metrics(run_dir).val_bpb.iloc[-1] == 1.22


def test_an_unscored_log_is_an_incomplete_run(capfd, record, root):
    folder = record({"train.log": UNSCORED, "submission.json": {"val_loss": 2.0011, "val_bpb": 1.1811}})
    status, out, _ = pgolf(capfd, folder / "train.log")
    assert status == 0 and "incomplete  no final score" in out
    assert "\n    val_bpb 1.1811 in submission.json is the score before quantisation\n" in out
    [row] = load_runs(root).to_dict("records")
    assert (row["status"], row["kind"]) == ("incomplete", "import") and not (row["path"] / "result.json").exists()
    assert "the log has no score after quantisation" in row["flags"]
    assert "16,580,000 bytes are over the cap of 16,000,000" in row["flags"]


def test_the_same_again_is_left_and_other_content_refused(capfd, record, root):
    folder = record({"train.log": REFERENCE, "submission.json": {"val_bpb": 1.2346}})
    pgolf(capfd, folder)
    run_dir = root / "2026-01-01_Some-Record" / "train"
    before = {path.name: path.stat().st_mtime_ns for path in run_dir.iterdir()}
    status, out, _ = pgolf(capfd, folder)
    assert status == 0 and out.rstrip().endswith("was imported before")
    assert {path.name: path.stat().st_mtime_ns for path in run_dir.iterdir()} == before
    (run_dir / "result.json").unlink()  # as if killed while it was written
    assert "before" not in pgolf(capfd, folder)[1] and read_result(run_dir).roundtrip_val_bpb == 1.2345678
    (folder / "submission.json").write_text("{}")
    status, _, err = pgolf(capfd, folder)
    assert status == 2 and "another submission.json" in err
    record({"train.log": TUNED.format(seed=1)})
    status, _, err = pgolf(capfd, folder)
    assert status == 2 and f"{run_dir}: another log is there" in err
    assert pgolf(capfd, folder, "--sweep", "elsewhere")[0] == 0


def test_a_run_of_ours_is_never_written_to(capfd, record, root):
    folder = record({"train.log": REFERENCE})
    run_dir = root / "s" / "train"
    run_dir.mkdir(parents=True)
    (run_dir / "config.json").write_text("{}")
    status, _, err = pgolf(capfd, folder, "--sweep", "s")
    assert status == 2 and f"{run_dir}: is no import" in err
    assert [path.name for path in run_dir.iterdir()] == ["config.json"]


def test_what_cannot_be_imported_is_one_message(capfd, record, root):
    folder = record({"notes.txt": "words", "good.log": REFERENCE})
    (folder / "binary.log").write_bytes(b"\0\1\2" + REFERENCE.encode())
    (folder / "empty").mkdir()
    for words, said in (
        ([folder / "notes.txt"], "notes.txt: not a training log: no step"),
        (
            [folder / "good.log", folder / "binary.log"],
            "binary.log: not a training log: no step and no score in it, binary, or over",
        ),
        ([folder / "empty"], "no training log in this folder"),
        ([folder / "none.log"], "none.log: cannot be read"),
        ([folder / "good.log", "--sweep", "a b"], "--sweep 'a b': cannot be a folder"),
        ([folder / "good.log", "--sweep", "con"], "--sweep 'con': cannot be a folder"),
    ):
        status, out, err = pgolf(capfd, *words)
        assert (status, out) == (2, "") and said in err and len(err.splitlines()) == 1
    assert not root.exists()
    status, out, _ = pgolf(capfd, folder)  # what is no log is passed over
    assert status == 0 and len(out.splitlines()) == 1


def test_names_of_runs(record, root, tmp_path):
    logs = {"a/train.log": SLIDING, "b/train.log": SLIDING + LEGAL_TTT, "b/seed 7.txt": REFERENCE}
    folder = record({**logs, "train.txt": UNSCORED, "submission.json": {}}, "r")
    imported, _ = records.import_logs([folder], None, root)
    assert sorted(run.run_dir.relative_to(root).as_posix() for run in imported) == [
        "r/a-train", "r/b-train", "r/seed-7", "r/train",
    ]  # fmt: skip
    alone, _ = records.import_logs([folder / "b" / "train.log"], None, root)  # one of them has the same name
    assert [(run.run_dir.name, run.again) for run in alone] == [("b-train", True)]
    others = [record({"train.log": log}, f"{name}/x") for name, log in (("p", REFERENCE), ("q", UNSCORED))]
    with pytest.raises(LogError, match="another log would be"):
        records.import_logs(others, None, root)
    plain = [record({"train.log": log}, name) for name, log in (("p1", REFERENCE), ("q1", UNSCORED))]
    imported, _ = records.import_logs(plain, "both", root)
    assert [run.run_dir.relative_to(root).as_posix() for run in imported] == ["both/p1-train", "both/q1-train"]
    below = record({"logs/seed0/train0.txt": TUNED.format(seed=0), "submission.json": {}}, "two-below")
    [run], _ = records.import_logs([below / "logs" / "seed0" / "train0.txt"], None, root)
    assert run.run_dir == root / "two-below" / "train0"
    for name in ("..", "con", "a b/c", "x" * 120, "é.", "-x"):
        assert directory.folder_name(directory.folder_name(name)) == directory.folder_name(name)


def test_claims_of_one_seed(record, root):
    claims = {"val_loss": 2.0612, "val_bpb": 1.23457, "bytes_total": 15750000, "bytes_code": 50000, "step_stop": 6821}
    assert remarks(REFERENCE, claims, record, root) == []
    claims |= {"val_bpb": 1.2200, "bytes_total": 15700000, "bytes_code": 49999, "step_stop": 6820}
    assert remarks(REFERENCE, claims, record, root / "2") == [
        "val_bpb 1.22 in submission.json, 1.2345678 in the log: it is the score before quantisation",
        "bytes_total 15700000 in submission.json, 15750000 in the log: it is the file without its code",
        "step_stop 6820 in submission.json, 6821 in the log",
        "bytes_code 49999 in submission.json, 50000 in the log",
    ]
    assert remarks(REFERENCE, {"val_bpb": 1.23456781}, record, root / "3") == [
        "val_bpb 1.23456781 in submission.json, 1.2345678 in the log"
    ]


def test_means_over_seeds_are_not_the_logs(record, root):
    wrong = {"val_bpb": 1.0, "bytes_total": 1, "step_stop": 1}
    for n, extra in enumerate(({"val_bpb_std": 0.1}, {"blurb": "a 3-seed mean"}, {"seeds": [1337, 2]})):
        assert remarks(REFERENCE, wrong | extra, record, root / str(n)) == []
    folder = record({"a.log": REFERENCE, "b.log": SLIDING, "submission.json": wrong})  # of which of them?
    imported, _ = records.import_logs([folder / "a.log"], None, root / "several")
    assert imported[0].remarks == []
    assert len(remarks(REFERENCE, wrong, lambda files: record(files, "one"), root / "one")) == 3


def test_claims_of_this_logs_seed(record, root):
    own = {"val_bpb": 1.23457, "val_loss": 2.06124, "artifact_bytes": 15700000, "steps": 6821}
    other = {"val_bpb": 1.5, "artifact_bytes": 1}
    claims = {"val_bpb": 1.3, "seeds": [1337, 7, 8], "seed_results": {"1337": own, "7": other}}
    folder = record({"train.log": REFERENCE, "seed7.log": REFERENCE.replace("1337", "9"), "submission.json": claims})
    imported, said = records.import_logs([folder], None, root)
    assert [run.remarks for run in imported] == [
        ["seed 9 is not among those of submission.json: 1337, 7, 8"],
        [
            "seed_results 1337 val_loss 2.06124 in submission.json, 2.06123456 in the log",
            "seed_results 1337 artifact_bytes 15700000 in submission.json, 15750000 in the log: "
            "it is the file without its code",
        ],
    ]
    assert said == ["2026-01-01_Some Record: no log of seed 7, 8, which submission.json lists"]
    _, said = records.import_logs([folder / "train.log"], None, root)  # seed7.log is in the folder all the same
    assert said == ["2026-01-01_Some Record: no log of seed 7, 8, which submission.json lists"]


@pytest.mark.parametrize("text", ["not json", "[1, 2]", '{"seed_results": 3, "seeds": 2, "val_bpb": null}'])
def test_a_submission_of_another_shape(text, record, root):
    found = remarks(REFERENCE, text, record, root)
    assert found == ([] if text.startswith("{") else ["submission.json is not readable"])


@pytest.mark.parametrize(
    "content",
    [
        REFERENCE.replace("\n", "\r\n").encode("utf-16"),  # of a Windows console
        REFERENCE.encode("utf-16-le"),
        REFERENCE.replace("\n", "\r").encode(),
        REFERENCE.encode() + b"\0\0\0\0\n",  # of a machine that crashed
        REFERENCE.encode() + b"caf\xe9 closed\n",
        REFERENCE.encode() + "ü".encode()[:1],
    ],
)
def test_encodings_and_ends_of_a_log(content, record, root):
    folder = record({"train.log": ""})
    (folder / "train.log").write_bytes(content)
    [run], _ = records.import_logs([folder], None, root)
    assert (run.bpb, run.total_bytes) == (1.2345678, 15_750_000)


def test_claims_in_a_mapping_of_seeds(record, root):
    claims = {"val_bpb": 1.1, "seeds": {"1337": {"val_bpb": 1.15, "bytes_total": 15750000}, "3": {"val_bpb": 1.0}}}
    imported, said = records.import_logs([record({"train.log": REFERENCE, "submission.json": claims})], None, root)
    assert imported[0].remarks == ["seed_results 1337 val_bpb 1.15 in submission.json, 1.2345678 in the log"]
    assert said == ["2026-01-01_Some Record: no log of seed 3, which submission.json lists"]


def test_a_log_of_ours_is_read_as_the_run_it_is_of(finished, root):
    run_dir, trained = finished
    [run], _ = records.import_logs([run_dir / "log.txt"], None, root)
    read = read_result(run.run_dir)
    assert run.status == "complete" and read.roundtrip_val_bpb == pytest.approx(trained.roundtrip_val_bpb, abs=1e-8)
    for name in ("total_bytes", "cap_bytes", "steps", "parameters", "stopped_by"):
        assert getattr(read, name) == getattr(trained, name), name
    assert read.bytes["code"] == trained.bytes["code"] and run.remarks == []
    assert read.data_fingerprint.endswith(trained.data_fingerprint[:12])
    config = read_json(run.run_dir / "config.json")
    assert config["params"] == trained.parameters and "forecast" not in config


@pytest.mark.skipif(not LOGS.is_dir(), reason="no ../shared/logs: logs of public records are not in the repository")
def test_public_records(root):
    imported, said = records.import_logs([LOGS], None, root)
    of = {f"{run.run_dir.parent.name[11:]}/{run.run_dir.name}": run for run in imported}
    unscored = [name for name, run in of.items() if run.status == "incomplete"]
    assert len(unscored) == 1 and unscored[0].startswith("DGAttention")
    assert any("is the score before quantisation" in remark for remark in of[unscored[0]].remarks)
    [hessian] = [run for name, run in of.items() if "Hessian" in name]
    assert "over the cap" in hessian.remarks[0] and "the file without its code" in hessian.remarks[1]
    table = load_runs(root)
    assert len(table) == len(imported) and set(table.kind) == {"import"}
    assert said and all(run.again for run in records.import_logs([LOGS], None, root)[0])


def test_one_bad_log_is_a_remark_and_the_others_are_imported(record, root, monkeypatch):
    folder = record({"good.log": REFERENCE, "torn.log": SLIDING, "submission.json": {"val_bpb": 1.2346}})
    os.mkfifo(folder / "fifo.log")
    (folder / "endless.log").symlink_to("/dev/zero")
    (folder / "gone.log").symlink_to("/nowhere")
    read_bytes = Path.read_bytes

    def torn(path):
        if path.name == "torn.log":
            raise OSError(errno.EIO, "Input/output error")
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", torn)
    [run], said = records.import_logs([folder], None, root)
    assert run.bpb == 1.2345678 and said == [f"{folder / 'torn.log'}: cannot be read: Input/output error"]
    for name in ("fifo", "endless"):
        with pytest.raises(LogError, match="no regular file"):
            records.import_logs([folder / f"{name}.log"], None, root)
    (folder / "submission.json").unlink()
    (folder / "submission.json").touch()
    os.truncate(folder / "submission.json", 20 * 2**30)
    [run], _ = records.import_logs([folder], "again", root)
    assert run.remarks == ["submission.json is not readable"]


@pytest.mark.parametrize("flags", [None, 3, "text", {"a": 1}, [None, 1, ["x"], "kept"]])
def test_an_import_of_wrong_types_costs_no_page(flags, record, root):
    records.import_logs([record({"train.log": REFERENCE})], None, root)
    [path] = root.rglob("import.json")
    path.write_text(json.dumps(read_json(path) | {"flags": flags, "disagreements": flags}))
    table = load_runs(root)
    kept = ["kept"] * isinstance(flags, list)
    assert table["flags"][0] == kept and len(sentences.remarks(table)) == 2 * len(kept)


def test_a_seed_in_the_name_of_a_file_whose_log_names_none(record, root):
    text, claims = REFERENCE.replace("seed:1337\n", ""), {"seeds": {"42": {"val_bpb": 1.2346}}}
    [run], said = records.import_logs([record({"train_seed42.log": text, "submission.json": claims})], None, root)
    assert (read_result(run.run_dir).seed, said) == (42, [])
    assert run.remarks == ["the log names no seed; it is that of the file's name"]
    [run], _ = records.import_logs([record({"x_seed42.log": REFERENCE}, "other")], None, root)
    assert read_result(run.run_dir).seed == 1337
