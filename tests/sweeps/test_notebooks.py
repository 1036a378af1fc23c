"""Notebooks run top to bottom on a real run, and are committed without outputs."""

import re
import subprocess
import sys

import nbformat
import pytest
from support.training import tiny

from pgolf.reports import pages as report
from pgolf.runs import directory
from pgolf.runs.result import read_result
from pgolf.sweeps.kernel_process import SharedKernel
from pgolf.training.run import train
from pgolf_core.config import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PARAMETERS = {
    "explore": {},
    "sensitivity": {"change": "step:1", "knobs": {"keep_float_max_numel": 0, "calibration_tokens": 512}},
    "sample": {"prompts": ["The"], "tokens": 5},
    "residual_allocation": {"budgets": [1024], "knobs": {"calibration_tokens": 512}},
    "export_lab": {
        "steps": [0.4], "codecs": ["ans"], "shares": [], "caps": [25_000], "knobs": {"calibration_tokens": 512},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def root(embedded, tmp_path_factory):
    """A runs folder with one real run, demo/control; kernels started here see it too."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PGOLF_RUNS", str(root))
        patch.setattr(directory, "RUNS", root)
        knobs = dict(model_dim=16, iterations=2, val_max_tokens=1024, roundtrip_val_max_tokens=1024)
        train(tiny(**knobs), root / "demo" / "control")
        yield root


@pytest.fixture(scope="module")
def execute(root, tmp_path_factory):
    """Execute a notebook on demo/control, once: its outputs, and how many of them are pictures."""
    folder, found = tmp_path_factory.mktemp("executed"), {}

    def execute(name: str) -> tuple[str, int]:
        if name not in found:
            path = folder / f"{name}.ipynb"
            assert process.run(ROOT / "notebooks" / path.name, path, {"sweep": "demo"} | PARAMETERS[name]) is None
            shown = [output for cell in nbformat.read(path, 4).cells for output in cell.get("outputs", [])]
            found[name] = str(shown), sum("image/png" in output.get("data", {}) for output in shown)
        return found[name]

    with SharedKernel() as process:
        yield execute


def test_explore(root, execute):
    text, pictures = execute("explore")
    result = read_result(root / "explore" / "demo-control-weight_quantization_bits=6")
    assert result.kind == "export" and result.source == "demo/control"
    assert f"{result.roundtrip_val_bpb:.4f} after" in text and pictures == 4


SHOWN = {  # stage: texts that its notebook shows of its result's table, and how many pictures
    "sensitivity": (lambda row: [row["tensor"]], ["change=step:1", "rank correlation of"], 2),
    "sample": (lambda row: row["text"].split()[:1], [], 0),
    "residual_allocation": (lambda row: [row["variant"]], ["plain", "global-1024", "LQER-1024"], 1),
    "export_lab": (lambda row: [f"{row['bpb']:.5f}", f"{row['total_bytes']:,}"], ["solve 25000"], 3),
}


@pytest.mark.parametrize(
    "name",
    [
        "sensitivity",
        "sample",
        *(pytest.param(slow, marks=pytest.mark.slow) for slow in ("residual_allocation", "export_lab")),
    ],
)
def test_a_stage_shows_its_whole_table(root, execute, name):
    text, pictures = execute(name)
    of_row, words, expected = SHOWN[name]
    table = read_result(root / "demo" / name).table
    assert all(shown in text for row in table for shown in of_row(row)) and all(word in text for word in words)
    assert pictures == expected


@pytest.mark.slow
def test_reports(root, execute, tmp_path):
    for name in ("sensitivity", "export_lab"):
        execute(name)
    texts = {page.stem: page.read_text(encoding="utf-8") for page in report.write_reports(root, tmp_path)}
    assert all("<script" not in text for text in texts.values())  # no network, nothing that runs
    assert all("demo/control" in texts[page] for page in ("leaderboard", "export"))
    assert re.search(">(demo/)?control<", texts["frontier"])  # the sweep is named where there are several
    assert "baseline run" in texts["frontier"]
    assert "step-0.4-gptq-fisher" in texts["export"] and "best of the others" in texts["export"]
    assert "Spearman" in texts["export"] and "Training curves" in texts["curves"]
    assert "the seed noise is not known" in texts["repeatability"]


def test_notebooks_are_committed_without_outputs():
    words = ["nbstripout", "--verify", "--extra-keys", "metadata.papermill cell.metadata.papermill"]
    subprocess.run([sys.executable, "-m", *words, *map(str, NOTEBOOKS)], check=True)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_begins_with_its_title_and_has_parameters(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.cells[0].source.startswith("# ")
    (tagged,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    # papermill reads a line with two = as no parameter at all, and then calls it unknown.
    assert all(line.count("=") <= 1 for line in tagged.source.splitlines())
