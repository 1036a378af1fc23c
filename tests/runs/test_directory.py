"""Names of run directories."""

import json

from support.runs import make_run

from pgolf.disk import read_json
from pgolf.runs.directory import run_name
from pgolf.runs.result import read_result, write_result
from pgolf.runs.table import load_runs
from pgolf_core.config import RunConfig, digest


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
