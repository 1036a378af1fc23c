"""Sweep files are checked whole before anything runs; sweeps do what is missing, survive kills, and nothing else."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest
import yaml
from support import training

from pgolf.processes import end_with_sweep
from pgolf.runs import directory
from pgolf.runs.result import ARTIFACT, RunError, read_result, write_result
from pgolf.runs.table import load_runs
from pgolf.sweeps.jobs import progress
from pgolf.sweeps.runner import chosen, is_stage_complete, missing, plan, run_sweep, said_of_knobs, stage_job
from pgolf.sweeps.sweep_file import NOTEBOOKS, SweepError, load_sweep, parameter_names, said_of_environment
from pgolf.training.forecast import ForecastError
from pgolf.training.run import train
from pgolf_core.config import RunConfig
from pgolf_core.export import load
from pgolf_core.files import atomic_write

TINY = training.TINY | dict(
    iterations=2, val_loss_every=0, val_max_tokens=1024, roundtrip_val_max_tokens=1024, calibration_tokens=512,
    keep_float_max_numel=0,
)  # fmt: skip
del TINY["track"]


@pytest.fixture
def sweeps(tmp_path, monkeypatch):
    """Write a sweep file (a mapping or YAML text) beside a runs root that holds nothing yet; its path."""
    monkeypatch.setattr(directory, "RUNS", tmp_path / "runs")

    def write(content, name="s"):
        path = tmp_path / f"{name}.yaml"
        text = content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False)
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize(
    ("name", "stages"),
    [("demo", ["sample", "export_lab"]), ("tour", ["sensitivity", "residual_allocation", "export_lab"])],
)
def test_the_demo_and_the_tour_are_sound_sweeps(name, stages):
    sweep = load_sweep(NOTEBOOKS / "sweeps" / f"{name}.yaml")
    assert sweep.name == name and sweep.baseline in sweep.runs
    assert list(sweep.stages) == stages


def test_knobs_are_resolved_for_the_kernel(sweeps, monkeypatch):
    monkeypatch.setenv("PGOLF_NUM_LAYERS", "6")
    for name, value in {"SEED": "1", "MODEL_DIM": "96", "DEVICE": "cuda", "CODEC": "x", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)  # set by something else: no knob of a sweep
    path = sweeps({"track": "nano", "base": {"model_dim": 160}, "runs": {"a": None, "b": {"num_layers": 3}}})
    a, b = plan(load_sweep(path, {"seed": "7"}))
    assert (a.config.num_layers, b.config.num_layers) == (6, 3)
    assert a.parameters | {"knobs": None} == {"sweep": "s", "run": "a", "track": "nano", "knobs": None}
    monkeypatch.setenv("NUM_LAYERS", "5")  # a kernel may find this
    assert RunConfig(track="nano", **a.parameters["knobs"]) == a.config
    assert (a.config.num_layers, a.config.model_dim, a.config.seed) == (6, 160, 7)
    assert (a.config.device, a.config.codec, a.config.world_size) == ("auto", "zlib", 1)
    taken, ignored = said_of_environment()
    assert taken == "knobs from the environment: num_layers='6'"
    assert ignored.startswith("environment: a sweep does not take CODEC, DEVICE, MODEL_DIM, SEED, WORLD_SIZE; ")
    assert a.run_dir == directory.RUNS / "s" / "a"


def test_grid_and_seeds_name_their_runs(sweeps):
    content = {"track": "nano", "grid": {"num_layers": [2, 3], "model_dim": [160, 192]}, "runs": {"control": {}}}
    content |= {"control": "control", "base": {"num_layers": 1}}
    names = ["control"] + [f"num_layers{n}-model_dim{d}" for n in (2, 3) for d in (160, 192)]
    sweep = load_sweep(sweeps(content))
    assert list(sweep.runs) == names
    assert sweep.runs["num_layers3-model_dim160"].model_dim == 160
    assert set(sweep.groups) == set(sweep.groups.values()) == set(names)
    assert sweep.changes["num_layers3-model_dim160"] == ["model_dim", "num_layers"]
    sweep = load_sweep(sweeps(content | {"seeds": [1337, 6]}))
    # Runs of the usual seed keep their name, so seeds can be added later.
    assert list(sweep.runs) == [name + suffix for name in names for suffix in ("", "-s6")]
    assert (sweep.runs["control"].seed, sweep.runs["control-s6"].seed) == (1337, 6)
    assert sweep.groups["control-s6"] == "control"
    assert list(load_sweep(sweeps(content), seeds=[6]).runs) == [name + "-s6" for name in names]


def test_names_of_a_grid_are_made_fit_for_folders(sweeps):
    sweep = load_sweep(sweeps({"track": "nano", "grid": {"quantizer": ["step:0.2", "step:0.4"]}}))
    assert list(sweep.runs) == ["quantizerstep-0.2", "quantizerstep-0.4"]


def test_repeats_have_equal_knobs(sweeps):
    sweep = load_sweep(
        sweeps({"track": "nano", "control": "base", "repeats": 2, "seeds": [1337, 2], "runs": {"base": {}}})
    )
    assert list(sweep.runs) == ["base_a", "base_b", "base-s2_a", "base-s2_b"]
    assert sweep.runs["base_a"] == sweep.runs["base_b"] and set(sweep.groups.values()) == {"base"}


def test_at_nano_scale_factors_stay_and_shapes_shrink(sweeps):
    content = {
        "track": "fixed_step", "base": {"num_heads": 8, "num_kv_heads": 4},
        "runs": {"deep": {"num_layers": 14, "model_dim": 576}, "wide": {"model_dim": 608, "window_size": 512}},
        "stages": [{"residual_allocation": {"budgets": [65536, 98304]}}],
    }  # fmt: skip
    sweep = load_sweep(sweeps(content), {"iterations": 7}, "nano")
    assert sweep.name == "s-nano" and sweep.stages == {"residual_allocation": {"budgets": [4096, 6144]}}
    deep, wide = sweep.runs["deep"], sweep.runs["wide"]
    assert (deep.num_layers, deep.model_dim, wide.num_layers, wide.model_dim) == (4, 144, 3, 152)
    assert (wide.window_size, deep.window_size) == (128, 0)
    assert (deep.track, deep.cap_bytes, deep.keep_float_max_numel, deep.iterations) == ("nano", 1_000_000, 4096, 7)
    assert deep.max_wallclock_seconds == 0
    clocked = load_sweep(sweeps(content | {"track": "roundtrip"}), None, "nano").runs["deep"]
    assert clocked.max_wallclock_seconds == 20 and clocked.iterations == 20_000
    small = sweeps({"track": "nano", "runs": {"a": {}}})
    assert load_sweep(small, None, "nano") == load_sweep(small)
    with pytest.raises(SweepError, match="have the same knobs at scale nano"):
        load_sweep(sweeps({"track": "fixed_step", "grid": {"iterations": [100, 200]}}), None, "nano")
    with pytest.raises(SweepError, match="-k seed: the sweep has seeds"):
        load_sweep(small, {"seed": 5}, seeds=[1, 2])
    with pytest.raises(SweepError, match="scale nona: no such; did you mean nano"):
        load_sweep(small, None, "nona")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"rums": {"a": {}}}, ["key rums", "did you mean runs"]),
        ({"track": "nano"}, ["no runs"]),
        ({"runs": ["a"]}, ["runs: input should be a valid dictionary, found ['a']"]),
        ({"runs": {"a": 3}}, ["runs: a: input should be a valid dictionary, found 3"]),
        ({"grid": {"num_layers": 3}}, ["grid: num_layers: input should be a valid list, found 3"]),
        ({"runs": {"a": {}}, "seeds": [1, 1.5]}, ["seeds: 1: input should be a valid integer, found 1.5"]),
        ({"runs": {"a": {}}, "repeats": 0}, ["repeats: input should be greater than or equal to 1, found 0"]),
        ({"runs": {"a": {"seed": 3}}, "seeds": [1, 2]}, ["a: sets seed"]),
        ({"runs": {"a": {}}, "control": "b"}, ["control: run b"]),
        ({"runs": {"a/b": {}, "..": {}, "nul": {}, "Com1.x": {}, "x.": {}, "": {}}},
         ["'a/b'", "'..'", "'nul'", "'Com1.x'", "'x.'", "''"]),
        ({"runs": {"a": {}}, "name": "../x"}, ["'../x'"]),
        ({"runs": {"a": {"seed": 1}, "A": {"seed": 2}}}, ["name A: used twice (as a)"]),
        ({"runs": {"sensitivity": {}}, "stages": ["sensitivity"]}, ["name sensitivity: used twice"]),
        ("runs:\n  a: {seed: 1}\n  a: {seed: 2}\n", ["line 3: a is there twice"]),
        ("runs:\n  ? [a, b]\n  : {}\n", ["line 2: a key must be text"]),
        ("runs: [", ["s.yaml"]),
        ("just words", ["a sweep is a mapping"]),
        ({"runs": {"a": {}, "b": {}, "c": {"seed": 1338}}}, ["runs a and b have the same knobs"]),
        ({"runs": {"a": {"num_layrs": 3}, "b": {"num_heads": 5}, "c": {"num_heads": 5, "seed": 2}, "d": {}}},
         ["run a: num_layrs: no such knob; did you mean num_layers?", "run b, c: num_heads=5 does not divide"]),
        ({"base": {"seed": -1}, "runs": {"a": {}}, "track": "nanoo"}, ["every run: seed=-1", "every run: track='na"]),
        ({"runs": {"a": {}}, "stages": ["sensitivty"]}, ["notebook sensitivty", "did you mean sensitivity"]),
        ({"runs": {"a": {}}, "stages": [{"sensitivity": {"token": 5, "source": "a"}}]},
         ["parameter token", "did you mean tokens", "source is given by the sweep"]),
        ({"runs": {"a": {}}, "stages": ["sensitivity", "train"]}, ["train is the first"]),
        ({"runs": {"a": {}}, "stages": [["train"]]}, ["expected a notebook's name"]),
        ({"runs": {"a": {"final_roundtrip_eval": False}, "b": {"save_raw_checkpoint": False}},
          "stages": ["sensitivity"]},
         ["run a: final_roundtrip_eval=0, and the stages", "run b: save_raw_checkpoint=0, and the stages"]),
    ],
)  # fmt: skip
def test_bad_files_are_refused_with_all_that_is_wrong(sweeps, content, says):
    path = sweeps(content)
    with pytest.raises(SweepError) as refusal:
        run_sweep(path)
    for words in says:
        assert words in str(refusal.value)
    assert str(path) in str(refusal.value)
    assert not directory.RUNS.exists()


def test_parameter_names_are_those_assigned(tmp_path):
    source = 'a = 1\nb: float | None = None  # papermill drops this one\nc = d = ""  # x = 3\nprint(a)'
    cells = [
        {"cell_type": "code", "metadata": {}, "source": "no = 1"},
        {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": source.splitlines(keepends=True)},
    ]
    (tmp_path / "n.ipynb").write_text(json.dumps({"cells": cells}), encoding="utf-8")
    assert parameter_names(tmp_path / "n.ipynb") == ["a", "b", "c", "d"]


def test_nproc_is_the_knob_world_size_of_all_runs(sweeps):
    sweep = load_sweep(sweeps({"track": "nano", "nproc": 4, "runs": {"a": {}, "b": {"seed": 2}}}))
    assert [config.world_size for config in sweep.runs.values()] == [4, 4]
    with pytest.raises(SweepError, match="world_size=3 does not divide 8"):
        load_sweep(sweeps({"track": "nano", "nproc": 3, "runs": {"a": {}}}))
    with pytest.raises(SweepError, match="nproc and world_size are the same"):
        load_sweep(sweeps({"track": "nano", "nproc": 2, "runs": {"a": {"world_size": 4}}}))
    with pytest.raises(SweepError, match="nproc is a key of the sweep"):
        load_sweep(sweeps({"track": "nano", "runs": {"a": {}}, "stages": [{"train": {"nproc": 2}}]}))


def test_progress_reads_what_a_kill_left(sweeps):
    (job,) = plan(load_sweep(sweeps({"track": "nano", "runs": {"a": {}}})))
    assert progress(job) == (0.0, "a")
    job.run_dir.mkdir(parents=True)
    rows = [{"step": 40, "val_bpb": 2.714}, {"step": 60, "train_loss": 4.1, "train_seconds": 9.0}]
    text = "\n".join(map(json.dumps, rows)) + '\n{"step": 70, "tr'
    (job.run_dir / "metrics.jsonl").write_text(text, encoding="utf-8")
    assert progress(job) == (0.95 / 2, "a 60/120 2.71 bpb")


def test_a_sweep_does_what_is_missing_and_nothing_else(embedded, sweeps, monkeypatch, tmp_path, capfd):
    # A kernelspec of the user's that names no Python of ours must not matter.
    spec = tmp_path / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    argv = [sys.executable, "-c", "raise SystemExit(3)"]
    (spec / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "x", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))

    content = {"track": "nano", "base": TINY, "stages": [{"sensitivity": {"tokens": 1024}}]}
    path = sweeps(content | {"runs": {"bad": {"matrix_lr": 1e30, "tied_embed_lr": 1e30}, "a": {}}})
    (failure,) = run_sweep(path)
    assert failure.run == "bad" and failure.log.is_file()
    assert "TrainError: validation loss is nan at step 2" in failure.reason
    home = directory.RUNS / "s"
    assert load_runs(directory.RUNS).set_index("run").status.to_dict() == {"bad": "failed", "a": "complete"}
    said = capfd.readouterr().out
    assert "bad" in said and "FAILED" in said and "stages wait" in said
    assert json.loads((home / "a" / "notebook.ipynb").read_text(encoding="utf-8"))["cells"][-1]["outputs"]

    path = sweeps(content | {"runs": {"a": {}}})
    assert missing(load_sweep(path)) == ([], ["sensitivity"])

    # A stage that was done, on this run with these parameters.
    before = (home / "a" / "result.json").stat().st_mtime_ns
    job = stage_job(load_sweep(path), "sensitivity", "a")
    done = replace(read_result(home / "a"), kind="sensitivity", source="s/a", table=[{}])
    write_result(job.run_dir, done)
    atomic_write(job.run_dir / "job.json", json.dumps({"parameters": job.parameters}))
    assert is_stage_complete(job) and missing(load_sweep(path)) == ([], []) and run_sweep(path) == []
    assert (home / "a" / "result.json").stat().st_mtime_ns == before
    with pytest.raises(RunError, match=r"made from s/a, and the best run is now s/b; delete that folder"):
        is_stage_complete(replace(job, parameters=job.parameters | {"source": "b"}))
    with pytest.raises(SweepError, match=r"sensitivity: made with parameters .*1024.*, not .*2048"):
        run_sweep(sweeps(content | {"runs": {"a": {}}, "stages": [{"sensitivity": {"tokens": 2048}}]}))

    # A directory of other knobs, a damaged one: refused, both named, before anything runs.
    (home / "torn").mkdir()
    (home / "torn" / "config.json").write_text('{"seed', encoding="utf-8")
    with pytest.raises(SweepError) as refusal:
        run_sweep(sweeps(content | {"runs": {"a": {"iterations": 5}, "torn": {"seed": 3}, "new": {"seed": 4}}}))
    assert "iterations 2 there, 5 now" in str(refusal.value) and "torn" in str(refusal.value)
    assert not (home / "new").exists()


def test_a_run_over_its_cap_is_skipped_where_the_sweep_says_so(sweeps, capfd):
    content = {"track": "nano", "base": TINY, "runs": {"wide": {"cap_bytes": 1000}}}
    with pytest.raises(ForecastError, match=r"wide: .* against cap_bytes=1,000"):
        run_sweep(sweeps(content))
    assert not (directory.RUNS / "s").exists() or load_runs(directory.RUNS).empty
    path = sweeps(content | {"over_cap": "skip"})
    for _ in range(2):
        assert run_sweep(path) == [] and missing(load_sweep(path)) == ([], [])
        (row,) = load_runs(directory.RUNS).itertuples()
        assert row.status == "refused" and "against cap_bytes=1,000" in row.problem
    assert capfd.readouterr().out.count("not trained: over its cap") == 1
    allowed = content | {"over_cap": "skip", "runs": {"wide": {"cap_bytes": 1000, "allow_over_cap": True}}}
    assert [job.name for job in missing(load_sweep(sweeps(allowed)))[0]] == ["wide"]


def start_and_wait_for_training(path, run_dir, root):
    """A sweep in a process of its own, once its run has written a resume file; with all its processes."""
    # A background job ignores SIGINT, and every process it starts inherits that.
    listen = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    listen += "from pgolf.cli.main import main; sys.exit(main(sys.argv[1:]))"
    parent = subprocess.Popen(
        [sys.executable, "-c", listen, "sweep", str(path)],
        env=os.environ | {"PGOLF_RUNS": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 300
    while not (run_dir / "resume.pt").exists():
        assert parent.poll() is None and time.monotonic() < deadline, parent.communicate()
        time.sleep(0.05)
    family = psutil.Process(parent.pid).children(recursive=True)
    assert len(family) >= 2  # kernel process and kernel
    return parent, family


LONG = TINY | dict(iterations=40, resume_every_seconds=0.1)


@pytest.mark.slow
def test_a_killed_sweep_leaves_no_process_and_goes_on(embedded, sweeps, tmp_path):
    stages = [{"sensitivity": {"tokens": 1024}}]
    path = sweeps({"track": "nano", "base": LONG, "runs": {"a": {}}, "stages": stages})
    run_dir = directory.RUNS / "s" / "a"
    parent, family = start_and_wait_for_training(path, run_dir, directory.RUNS)
    with pytest.raises(RunError, match="running already"):
        run_sweep(path)
    parent.kill()
    parent.communicate()
    _, alive = psutil.wait_procs(family, timeout=60)
    assert alive == []
    assert read_result(run_dir) is None

    assert run_sweep(path) == [] and missing(load_sweep(path)) == ([], [])
    assert read_result(run_dir).resumed == 1
    direct = train(load_sweep(path).runs["a"], tmp_path / "direct")
    assert training.what_counts(read_result(run_dir)) == training.what_counts(direct) and load(run_dir / ARTIFACT)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="a process cannot send Ctrl-C to one other alone")
def test_ctrl_c_ends_every_process_at_once(embedded, sweeps):
    path = sweeps({"track": "nano", "base": LONG, "runs": {"a": {}}})
    parent, family = start_and_wait_for_training(path, directory.RUNS / "s" / "a", directory.RUNS)
    parent.send_signal(2)
    _, err = parent.communicate(timeout=60)
    assert parent.returncode == 130 and "goes on where this one was" in err and "Traceback" not in err
    assert psutil.wait_procs(family, timeout=1)[1] == []


def test_without_a_sweep_nothing_is_watched(monkeypatch):
    monkeypatch.delenv("PGOLF_SWEEP_PID", raising=False)
    end_with_sweep()


def test_chosen_runs_are_those_named_or_of_an_entry_over_all_seeds_without_stages(sweeps):
    content = {"track": "nano", "runs": {"a": {}, "b": {"ternary_reg_weight": 0.1}}, "seeds": [1337, 2]}
    sweep = load_sweep(sweeps(content | {"stages": ["sensitivity"]}))
    assert chosen(sweep, []) == sweep and list(chosen(sweep, ["b-s2"]).runs) == ["b-s2"]
    part = chosen(sweep, ["b"])
    assert list(part.runs) == ["b", "b-s2"] and not part.stages and part.groups == sweep.groups
    with pytest.raises(SweepError, match="no such run; did you mean b-s2"):
        chosen(sweep, ["bs2"])
    (line,) = said_of_knobs(sweep)
    assert line.startswith("warning: ternary_reg_weight=0.1 has no effect, since compression") and "b, b-s2" in line
    assert said_of_knobs(chosen(sweep, ["a"])) == []


def test_a_sweep_names_the_runs_that_read_the_first_files_alone(sweeps, tmp_path):
    (tmp_path / "dataset.json").write_text('{"train": {"tokens": 8192}}', encoding="utf-8")
    base = {"data_path": str(tmp_path), "iterations": 1}
    path = sweeps({"track": "nano", "base": base, "runs": {"a": {}, "mixed": {"shuffle_sequences": 1}}})
    (said,) = said_of_knobs(load_sweep(path))
    assert said.startswith("warning: training reads 4,096 of 8,192 tokens, the first 50%") and said.endswith(": a")
