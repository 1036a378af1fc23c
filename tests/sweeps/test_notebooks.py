"""Notebooks run top to bottom on a real run, and are committed without outputs."""

import re
import subprocess
import sys

import nbformat
import papermill
import pytest

from pgolf.reports import pages as report
from pgolf.runs import directory
from pgolf.runs.result import read_result
from pgolf.training.run import train
from pgolf_core.config import ROOT, RunConfig

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TINY = dict(
    track="nano", iterations=4, num_layers=1, model_dim=64, num_heads=4, num_kv_heads=2,
    train_batch_tokens=2048, train_seq_len=256, val_batch_size=2048, val_max_tokens=2048,
    roundtrip_val_max_tokens=2048, val_loss_every=2, train_log_every=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def root(embedded, tmp_path_factory):
    """A runs folder with one real run, demo/control; kernels started here see it too."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PGOLF_RUNS", str(root))
        patch.setattr(directory, "RUNS", root)
        train(RunConfig(**TINY), root / "demo" / "control")
        yield root


def outputs(notebook) -> str:
    return "\n".join(str(cell.get("outputs", "")) for cell in notebook.cells)


def test_explore(root, tmp_path):
    done = papermill.execute_notebook(
        ROOT / "notebooks" / "explore.ipynb", tmp_path / "explore.ipynb", {"sweep": "demo"}, progress_bar=False
    )
    (exported,) = (root / "explore").iterdir()
    result = read_result(exported)
    assert result.kind == "export" and result.source == "demo/control"
    assert f"{result.roundtrip_val_bpb:.4f} after" in outputs(done)
    assert outputs(done).count("image/png") >= 4


@pytest.fixture(scope="module")
def stages(root, tmp_path_factory) -> dict[str, tuple[str, int]]:
    """The notebooks of stages executed on the run of root: their outputs, and how many of them are pictures."""
    parameters = {
        "sensitivity": {"change": "step:1", "knobs": {"keep_float_max_numel": 0}},
        "residual_allocation": {"budgets": [1024]},
        "export_lab": {"steps": [0.4], "codecs": ["ans"], "shares": [], "caps": [60_000]},
    }
    found, folder = {}, tmp_path_factory.mktemp("executed")
    for name, own in parameters.items():
        own |= {"sweep": "demo", "knobs": {"calibration_tokens": 1024} | own.get("knobs", {})}
        path = ROOT / "notebooks" / f"{name}.ipynb"
        done = papermill.execute_notebook(path, folder / path.name, own, progress_bar=False)
        shown = [output.get("data", {}) for cell in done.cells for output in cell.get("outputs", [])]
        found[name] = outputs(done), sum("image/png" in data for data in shown)
    return found


def test_sensitivity(root, stages):
    text, pictures = stages["sensitivity"]
    result = read_result(root / "demo" / "sensitivity")
    assert "change=step:1" in text and f"rank correlation of {len(result.table) - 1} tensors" in text
    assert pictures == 2
    assert all(row["tensor"] in text for row in result.table)


def test_residual_allocation(root, stages):
    text, pictures = stages["residual_allocation"]
    result = read_result(root / "demo" / "residual_allocation")
    assert {row["variant"].split("-")[0].split()[0] for row in result.table} >= {"plain", "global", "LQER", "solve"}
    assert all(row["variant"] in text for row in result.table)
    assert pictures == 1


def test_export_lab(root, stages):
    text, pictures = stages["export_lab"]
    result = read_result(root / "demo" / "export_lab")
    assert all(f"{row['bpb']:.5f}" in text and f"{row['total_bytes']:,}" in text for row in result.table)
    assert "solve 60000" in text
    assert pictures == 3


def test_reports(root, stages, tmp_path):
    index, *pages = report.write_reports(root, tmp_path)
    texts = {page.stem: page.read_text(encoding="utf-8") for page in (index, *pages)}
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
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    # papermill reads a line with two = as no parameter at all, and then calls it unknown.
    assert all(line.count("=") <= 1 for line in tagged[0].source.splitlines())
