"""PGOLF_LOGGERS: curves arrive offline, no bit of a run changes, and a logger that fails costs no run."""

import json
import re

import pytest
from support.training import tiny, what_counts

from pgolf.runs.directory import metric_rows
from pgolf.runs.result import ARTIFACT, CHECKPOINT
from pgolf.training import loggers
from pgolf.training.resume import TrainError
from pgolf.training.run import train
from pgolf_core.scheme import ExportError

KNOBS = dict(compression_reg_weight=0.005)  # as the fixture `finished` is trained


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No test of another logger, and no account of the person who runs the tests."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_BUCKET_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))


def trained_with(names: str, finished, run_dir, monkeypatch):
    """Train as `finished` was, with these loggers; checks that every bit agrees. Rows of metrics.jsonl."""
    monkeypatch.setenv("PGOLF_LOGGERS", names)
    result = train(tiny(**KNOBS), run_dir)
    assert what_counts(result) == what_counts(finished[1])
    for file in (ARTIFACT, CHECKPOINT, "config.json"):
        assert (run_dir / file).read_bytes() == (finished[0] / file).read_bytes()
    return list(metric_rows(run_dir, most=None)), result


def test_tensorboard_gets_every_figure(finished, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows, result = trained_with("tensorboard", finished, tmp_path / "s" / "run", monkeypatch)
    events = EventAccumulator(str(tmp_path / "s" / "run" / "tensorboard")).Reload()
    for name in ("train_loss", "val_bpb", "comp_reg"):
        logged = [(e.step, e.value) for e in events.Scalars(name)]
        assert logged == [(row["step"], pytest.approx(row[name])) for row in rows if name in row] and logged
    (last,) = events.Scalars("total_bytes")
    assert (last.step, last.value) == (12, result.total_bytes)
    assert '"model_dim": 64' in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()


def test_wandb_is_offline_without_a_key_and_has_the_figures(finished, tmp_path, monkeypatch, capfd):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    _, result = trained_with("wandb", finished, tmp_path / "s" / "run", monkeypatch)
    (file,) = (tmp_path / "s" / "run" / "wandb").glob("offline-run-*/*.wandb")
    content = file.read_bytes()
    for words in (b"train_loss", b"roundtrip_val_bpb", b"compression_reg_weight", str(result.total_bytes).encode()):
        assert words in content, words
    assert wandb.run is None and "failed" not in capfd.readouterr().out


def test_trackio_keeps_the_curves_on_this_machine(finished, tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    import sqlite3

    rows, result = trained_with("trackio", finished, tmp_path / "s" / "run", monkeypatch)
    (file,) = (tmp_path / "trackio").rglob("pgolf*.db")
    with sqlite3.connect(file) as database:
        logged = [json.loads(m) for (m,) in database.execute("select metrics from metrics where run_name = 's/run'")]
    bpb = [own["val_bpb"] for own in logged if "val_bpb" in own]
    assert bpb == [row["val_bpb"] for row in rows if "val_bpb" in row] and bpb
    assert logged[-1]["total_bytes"] == result.total_bytes


def test_failing_loggers_warn_once_and_cost_nothing(finished, tmp_path, monkeypatch, capsys):
    closed = []

    def opens(run_dir, step, config):
        raise RuntimeError("no network")

    def rows(run_dir, step, config):
        return loggers.Logger(lambda row: 1 / 0, closed.append)

    def absent(run_dir, step, config):
        import no_such_logger  # noqa: F401

    monkeypatch.setattr(loggers, "LOGGERS", {"tensorboard": opens, "wandb": rows, "trackio": absent})
    trained_with("tensorboard, wandb,trackio,tensorbord", finished, tmp_path / "s" / "run", monkeypatch)
    said = re.findall("PGOLF_LOGGERS: .*", capsys.readouterr().out)
    assert said == [
        "PGOLF_LOGGERS: tensorboard failed, the run goes on without it: RuntimeError: no network",
        "PGOLF_LOGGERS: trackio is not installed: pip install pgolf[trackio] (No module named 'no_such_logger')",
        "PGOLF_LOGGERS: tensorbord: no such logger; did you mean tensorboard?",
        "PGOLF_LOGGERS: wandb failed, the run goes on without it: ZeroDivisionError: division by zero",
    ]
    assert closed == []  # left out
    assert "PGOLF_LOGGERS" not in (tmp_path / "s" / "run" / "log.txt").read_text()


def test_a_logger_is_told_whether_the_run_failed(embedded, tmp_path, monkeypatch):
    closed = []
    monkeypatch.setattr(loggers, "LOGGERS", {"wandb": lambda *_: loggers.Logger(lambda row: None, closed.append)})
    monkeypatch.setenv("PGOLF_LOGGERS", "wandb")
    with pytest.raises((TrainError, ExportError)):
        train(tiny(iterations=4, matrix_lr=1e30), tmp_path / "s" / "bad")
    train(tiny(iterations=2), tmp_path / "s" / "good")
    assert closed == [True, False]
