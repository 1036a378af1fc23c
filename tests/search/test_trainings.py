"""Trials are runs of the store: refused over the cap, pruned without remains, complete ones never trained again."""

import json

import pytest
import yaml
from support.runs import make_run
from support.training import TINY

from pgolf.cli.main import main
from pgolf.runs import directory
from pgolf.runs.directory import PRUNED
from pgolf.runs.table import load_runs
from pgolf.search.driver import run_search
from pgolf.search.study import outcome_of
from pgolf.search.trainings import Trainings


class Pool:
    """A pool with one worker that trains nothing; a started run has written these validations."""

    def __init__(self, *validations):
        self.validations, self.started, self.stopped = validations, [], []

    def refresh(self):
        pass

    def has_room(self):
        return True

    def start(self, job):
        self.started.append(job)
        job.run_dir.mkdir(parents=True, exist_ok=True)
        rows = [json.dumps({"step": step, "val_bpb": bpb}) + "\n" for step, bpb in self.validations]
        (job.run_dir / "metrics.jsonl").write_text("".join(rows))
        return True

    def poll(self, job):
        return None

    def stop(self, job):
        self.stopped.append(job)


def test_a_configuration_over_the_cap_is_never_trained(search):
    sizes = search(space={"model_dim": [64, 128]}, cap=20_000, trials=4, trainings=1)
    pool = Pool()
    study = run_search(sizes, Trainings(sizes, pool), lambda line: None)
    assert pool.started == [] and len(study.trials()) == 4
    told = [outcome_of(trial) for trial in study.trials()]
    assert {outcome.state for outcome in told} == {"refused"} and all(outcome.over > 0 for outcome in told)
    runs = load_runs(directory.RUNS)
    assert set(runs.status) == {"refused"} and runs.problem.str.contains("against cap_bytes=20,000").all()
    assert study.answers() == []


def test_a_pruned_run_is_kept_as_pruned_and_nothing_of_it_is_half_written(search):
    trainings = Trainings(search(), pool := Pool((40, 3.0), (80, 2.5), (120, 2.0)))
    assert trainings.begin("a", search().config({})) is None
    assert trainings.curve("a") == [(40, 3.0), (80, 2.5)]  # nothing is saved after the last step
    run_dir = pool.started[0].run_dir
    for name in ("resume.pt", "checkpoint.safetensors", "artifact.pgolf"):
        (run_dir / name).write_bytes(b"half")
    outcome = trainings.prune("a", "3.0000 bpb at step 40, behind other trials there")
    assert (outcome.state, outcome.bpb) == ("pruned", 2.0) and pool.stopped == pool.started
    assert {path.name for path in run_dir.iterdir()} <= {"config.json", "metrics.jsonl", "error.json", ".lock"}
    (run,) = load_runs(directory.RUNS).itertuples()
    assert (run.status, run.problem) == (PRUNED.lower(), "3.0000 bpb at step 40, behind other trials there")
    again = Trainings(search(), Pool())
    assert again.begin("a", search().config({})).state == "pruned" and again.pool.started == []


def test_a_complete_run_is_the_outcome_of_its_trial_without_training(search):
    two = search(space={"num_layers": [2, 3]}, base={"num_layers": 2}, cap=1_000_000)
    make_run(directory.RUNS, "s/a", total=900_000, bpb=2.25, knobs={"num_layers": 3})
    make_run(directory.RUNS, "s/b", total=1_100_000, bpb=2.0, knobs={"num_layers": 2})
    trainings = Trainings(two, Pool())
    a, b = (trainings.begin(run, two.config({"num_layers": layers})) for run, layers in (("a", 3), ("b", 2)))
    assert (a.state, a.bpb, a.bytes) == ("complete", 2.25, 900_000) and a.over < 0
    assert b.state == "complete" and b.over == pytest.approx(0.1)


@pytest.mark.slow
def test_the_command_trains_trials_and_finalists_and_says_the_answer(tmp_path, monkeypatch, capsys, embedded):
    monkeypatch.setattr(directory, "RUNS", tmp_path / "runs")
    base = {name: value for name, value in TINY.items() if name != "track"}
    content = {
        "track": "nano", "base": base, "space": {"matrix_lr": {"low": 0.01, "high": 0.1, "log": True}},
        "enqueue": {"usual": {}}, "trainings": 2, "finalists": 1, "seeds": [1, 2],
    }  # fmt: skip
    path = tmp_path / "lr.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    assert main(["search", str(path), "--workers", "1"]) == 0
    said = capsys.readouterr().out
    assert "best of lr: " in said and "over 2 new seeds" in said
    runs = load_runs(directory.RUNS)
    assert set(runs.status) == {"complete"} and set(runs.run[runs.sweep == "lr"]) == {"usual", "trial001"}
    assert {"usual-s1", "usual-s2"} <= set(runs.run[runs.sweep == "lr-finalists"])
    assert main(["search", str(path)]) == 0 and len(load_runs(directory.RUNS)) == len(runs)
