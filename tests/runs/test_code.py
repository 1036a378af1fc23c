"""The digest of the code: what it ignores, and that reading it or a result needs neither torch nor pandas."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from pgolf.runs import code
from pgolf.runs.result import Result, RunError
from pgolf_core.config import ROOT


def test_code_digest_ignores_line_endings_and_outputs(tmp_path, monkeypatch):
    monkeypatch.setattr(code, "ROOT", tmp_path)
    (tmp_path / "notebooks").mkdir()
    path = tmp_path / "notebooks" / "n.ipynb"

    def digest(source, outputs=()):
        cell = {"cell_type": "code", "source": source, "outputs": list(outputs)}
        path.write_text(json.dumps({"cells": [cell, {"cell_type": "markdown", "source": str(outputs)}]}))
        return code.code_digest(["n.ipynb"])

    assert digest(["a\n", "b"]) == digest(["a\r\n", "b"], ["x"]) != digest(["a\n", "c"])


def test_results_and_code_are_read_without_torch_and_pandas():
    script = "import sys, pgolf.runs.result, pgolf.runs.code; print({'torch', 'pandas'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "set()"


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Both packages as small copies, loaded as they are; edit(path, text) writes a file of one."""
    for name in (
        "pgolf_core/model.py",
        *(f"pgolf/{part}" for part in code.WORKBENCH),
        "pgolf/studies",
        "pgolf/reports",
    ):
        path = tmp_path / name if name.endswith(".py") else tmp_path / name / "a.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x = 1\n")
    monkeypatch.setattr(code, "pgolf_core", SimpleNamespace(__file__=str(tmp_path / "pgolf_core" / "__init__.py")))
    monkeypatch.setattr(code, "__file__", str(tmp_path / "pgolf" / "runs" / "code.py"))
    monkeypatch.setattr(code, "LOADED", {studies: code._sources(studies) for studies in (False, True)})
    return lambda path, text: (tmp_path / path).write_text(text)


@pytest.mark.parametrize("path", ["pgolf_core/model.py", "pgolf/disk.py", "pgolf/training/a.py", "pgolf/data/a.py"])
def test_an_edit_of_what_makes_a_run_is_noticed(packages, path):
    made = Result("train", "0", 1, "nano", environment={"code": code.code_digest()})
    assert code.other_code(made) == ""
    code.check_code()
    packages(path, "x = 2\n")
    assert code.code_digest(fresh=True) != code.code_digest()
    with pytest.raises(RunError, match=r"edited after this process loaded it.*restart the kernel"):
        code.check_code()


def test_an_edited_figure_makes_no_other_run_and_an_edited_study_only_other_exports(packages):
    packages("pgolf/reports/a.py", "x = 2\n")
    code.check_code(studies=True)
    packages("pgolf/studies/a.py", "x = 2\n")
    code.check_code()
    with pytest.raises(RunError):
        code.check_code(studies=True)


def test_the_digest_covers_what_the_layers_let_training_import():
    """The contract of layers in pyproject.toml names what stands below pgolf.training."""
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition('"pgolf.training",')[2].partition("]")[0]
    below = {name.strip().removeprefix("pgolf.") for name in lines.replace('"', "").replace("|", ",").split(",")}
    assert {part.removesuffix(".py") for part in code.WORKBENCH} == (below | {"training"}) - {"", "pgolf_core"}


def test_versions_without_a_digest_are_told_apart_by_commit():
    clean, changed = {"git_commit": "ab" * 20, "git_dirty": False}, {"git_commit": "ab" * 20, "git_dirty": True}
    assert code.code_of(clean) != code.code_of(changed) and code.code_of({}) == code.code_of("torn") == ""
    assert code.short_code(code.code_of(changed)) == "commit abababab with changes"
    said = code.other_code(Result("train", "0", 1, "nano", environment=clean))
    assert said.startswith("made by commit abababab, and the code now is ")
