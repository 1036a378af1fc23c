"""pgolf.open: a finished run by name, with everything that a notebook asks of it."""

import pytest
import torch
from support.runs import make_import

import pgolf
from pgolf.runs import directory
from pgolf.runs.result import RunError, read_result
from pgolf.studies.finished_run import open_run
from pgolf_core.config import ConfigError
from pgolf_core.evaluate import evaluate
from pgolf_core.quantization.allocation import AllocationError


@pytest.fixture
def run(finished, monkeypatch):
    monkeypatch.setattr(directory, "RUNS", finished[0].parents[1])
    return pgolf.open("sweep/run")


def test_a_run_by_name_has_its_config_result_and_curves(run, finished):
    assert run.result == finished[1] == read_result(run.directory) and run.config.hash == finished[1].config_hash
    assert run.metrics.step.max() == run.config.iterations
    with pytest.raises(RunError, match="no such run; did you mean sweep/run"):
        pgolf.open("sweep/rum")
    table = pgolf.load_runs(directory.RUNS, short=True)
    assert list(table.run) == ["run"] and table.bpb[0] == run.result.roundtrip_val_bpb and len(table.columns) == 8


def test_its_bpb_of_a_text_is_what_scoring_gives(run):
    window = run.config.eval_window
    text = run.dataset.tokenizer.decode([run.dataset.validation(window, 8 * window)[1:].tolist()])[0]
    ids = torch.from_numpy(run.dataset.tokenizer.encode([text])[0].astype("int64"))
    ids = ids[: (len(ids) - 1) // window * window + 1]
    whole = run.dataset.tokenizer.decode([ids[1:].tolist()])[0]
    again = torch.from_numpy(run.dataset.tokenizer.encode([whole])[0].astype("int64"))
    assert torch.equal(again, ids), "text of whole windows, so that both score the same tokens"
    score = evaluate(run.model(), ids, run.dataset.byte_table, run.config.eval)
    assert run.bpb(whole) == pytest.approx(score.val_bpb, rel=1e-5)
    assert run.bpb(whole, raw=True) != run.bpb(whole)


def test_a_sentence_has_bits_per_byte_and_nothing_has_not(run):
    assert 1 < run.bpb("A sentence.") < 12
    with pytest.raises(RunError, match="the text is empty"):
        run.bpb("")


def test_it_writes_text_and_stores_its_weights_in_another_way(run, tmp_path):
    assert run.generate("The name", tokens=3).startswith("The name") and len(run.generate(["a", "b"], tokens=1)) == 2
    result = run.export(tmp_path / "e", codec="ans", keep_float_max_numel=0)
    assert result.kind == "export" and result.total_bytes < run.result.total_bytes
    assert open_run(tmp_path / "e").config.codec == "ans"
    assert run.export_dir(codec="ans") != run.export_dir(codec="lzma")
    with pytest.raises(ConfigError, match="train another run"):
        run.export(tmp_path / "f", num_layers=2)
    with pytest.raises(AllocationError):
        run.export(tmp_path / "f", allocation="solve", codec="ans", cap_bytes=13_000)
    assert not (tmp_path / "f").exists()


def test_an_imported_log_has_no_weights_to_open(tmp_path):
    make_import(tmp_path, "theirs/log", 1.2, seed=1)
    with pytest.raises(RunError, match="an imported log"):
        pgolf.open(tmp_path / "theirs" / "log")
