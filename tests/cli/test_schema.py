"""JSON schemas: current, named by every YAML file, and as strict as the checks that they stand for."""

import json
import re
import subprocess
from functools import cache

import jsonschema
import pytest
import yaml

from pgolf.cli.main import main
from pgolf.cli.schema import FOLDER, schemas
from pgolf.machines.pod import Pod
from pgolf_core.config import ROOT, RunConfig

FIRST_LINE = re.compile(r"# yaml-language-server: \$schema=(\S+)\n")
OF_OTHER_TOOLS = {"environment.yml", "mkdocs.yml", ".pre-commit-config.yaml"}
SWEEP = jsonschema.Draft7Validator(json.loads(schemas()["sweep.json"]))


@cache
def _validator(path):
    return jsonschema.Draft7Validator(json.loads(path.read_text(encoding="utf-8")))


def test_the_committed_schemas_are_what_the_code_says():
    committed = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / FOLDER).iterdir()}
    assert committed == schemas(), "run pgolf schema"
    for text in committed.values():
        jsonschema.Draft7Validator.check_schema(json.loads(text))


def test_every_yaml_file_names_its_schema_first_and_is_valid():
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.yaml", "*.yml"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True).stdout.split()
    files = [ROOT / name for name in names if name not in OF_OTHER_TOOLS] or [*ROOT.glob("notebooks/sweeps/*.yaml")]
    assert len(files) > 40
    for file in files:
        text = file.read_text(encoding="utf-8")
        named = FIRST_LINE.match(text)
        assert named, f"{file.name}: the first line names no schema"
        checked_by = _validator((file.parent / named[1]).resolve())
        assert [error.message for error in checked_by.iter_errors(yaml.safe_load(text))] == []


@pytest.mark.parametrize(
    "content",
    [
        {"base": {"num_layer": 2}},
        {"runs": {"a": {"num_layers": 0}}},
        {"runs": {"a": {"track": "nanno"}}},
        {"grid": {"model_dim": []}},
        {"grid": {"model_dim": ["wide"]}},
        {"seeds": ["1337"]},
        {"over_cap": "train"},
        {"stages": [{"sample": {}, "train": {}}]},
        {"steps": 3},
    ],
)
def test_a_sweep_that_would_be_refused_is_marked(content):
    assert SWEEP.is_valid({"runs": {"a": None}})
    assert not SWEEP.is_valid({"runs": {"a": None}} | content)


def test_every_knob_has_its_meaning_in_the_schema():
    knobs = json.loads(schemas()["knobs.json"])["properties"]
    assert knobs.keys() == RunConfig.model_fields.keys()
    assert all(own["description"] for own in knobs.values())


def test_the_machine_file_of_the_docs_is_valid_and_a_mistyped_key_is_not():
    page = (ROOT / "docs" / "remote.md").read_text(encoding="utf-8")
    pod = yaml.safe_load(page.partition("```yaml\n")[2].partition("```")[0])
    machine = jsonschema.Draft7Validator(json.loads(schemas()["machine.json"]))
    assert Pod.model_validate(pod) and machine.is_valid(pod)
    assert not machine.is_valid(pod | {"hots": "203.0.113.7"})


def test_schemas_are_written_to_a_folder_of_ones_own(tmp_path, capsys):
    assert main(["schema", "--out", str(tmp_path / "new")]) == 0
    assert {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "new").iterdir()} == schemas()
