"""Names of run directories."""

import json

import pytest
from support.runs import make_config, make_run, write_sweep

from pgolf.disk import read_json
from pgolf.runs.directory import check_config, find_run, locked, run_name
from pgolf.runs.result import RunError, read_result, write_result
from pgolf.runs.table import load_runs
from pgolf_core.config import FIRST_DEFAULTS, ConfigError, RunConfig, digest, hash_of


def test_a_run_named_and_hashed_by_an_older_version_is_found_and_whole(tmp_path):
    """Older versions hashed every knob, so each new knob would have renamed all runs."""
    config = RunConfig(track="nano", num_layers=3)
    assert run_name(config, tmp_path / "explore") == f"nano-{config.hash}"
    made = make_run(tmp_path, "explore/nano-0123456789ab", knobs={"num_layers": 3})
    stored = read_json(made / "config.json")
    del stored["mlp_permutation"]  # a knob of a later version
    (made / "config.json").write_text(json.dumps(stored))
    of_all = digest({name: value for name, value in stored.items() if name != "allow_over_cap"})
    result = read_result(made)
    write_result(made, type(result)(**vars(result) | {"config_hash": of_all}))
    (row,) = load_runs(tmp_path).itertuples()
    assert (row.status, row.num_layers) == ("complete", 3)
    assert run_name(config, tmp_path / "explore") == made.name
    (tmp_path / "explore" / "nano-ffffffffffff").mkdir()  # holds nothing
    other = config.with_knobs(num_layers=4)
    assert run_name(other, tmp_path / "explore") == f"nano-{other.hash}"
    (made / "config.json").write_text(json.dumps(stored | {"num_layers": 4}))
    assert load_runs(tmp_path).status[0] == "damaged"


def test_a_run_begun_before_a_default_changed_goes_on_unless_it_reads_that_knob(tmp_path):
    plain, solved = RunConfig(track="nano"), RunConfig(track="nano", allocation="solve")
    for number, config in enumerate((plain, solved)):
        begun = tmp_path / f"nano-{number:012}"
        begun.mkdir()
        (begun / "config.json").write_text(json.dumps(config.model_dump() | FIRST_DEFAULTS))
    assert run_name(plain, tmp_path) == "nano-000000000000"
    with locked(tmp_path / run_name(plain, tmp_path), plain) as begun:
        assert hash_of(read_json(begun / "config.json")) == plain.hash  # its result will say the same
    assert run_name(solved, tmp_path) == f"nano-{solved.hash}"
    with pytest.raises(ConfigError, match="set calibration_tokens=65536, once its default, or name another run"):
        check_config(tmp_path / "nano-000000000001", solved)


def test_runs_of_one_sweeps_folder_have_its_name_arms_and_control(tmp_path):
    for name in ("control", "wide"):
        make_config(tmp_path, name, [2.5, 2.6], seeds=(1, 2))
    write_sweep(tmp_path, ["control", "wide"], seeds=(1, 2))
    columns = ["sweep", "run", "arm", "control"]
    assert load_runs(tmp_path / "s")[columns].equals(load_runs(tmp_path)[columns])
    assert set(load_runs(tmp_path / "s").sweep) == {"s"}


def test_a_run_is_found_by_its_name_or_folder_and_else_the_nearest_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("pgolf.runs.directory.RUNS", tmp_path)
    made = make_run(tmp_path, "s/one")
    assert find_run("s/one") == find_run(made) == find_run(str(made)) == made
    with pytest.raises(RunError, match="s/onne: no such run; did you mean s/one"):
        find_run("s/onne")
