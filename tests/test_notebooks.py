"""Notebooks run top to bottom on a real run, and are committed without outputs."""

import subprocess
import sys

import nbformat
import papermill
import pytest

from pgolf_core import frontier, runs
from pgolf_core.config import ROOT, RunConfig
from pgolf_core.train import train

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
        patch.setattr(runs, "RUNS", root)
        train(RunConfig(**TINY), root / "demo" / "control")
        yield root


def outputs(notebook) -> str:
    return "\n".join(str(cell.get("outputs", "")) for cell in notebook.cells)


def test_explore(root, tmp_path):
    done = papermill.execute_notebook(
        ROOT / "notebooks" / "explore.ipynb", tmp_path / "explore.ipynb", {"sweep": "demo"}, progress_bar=False
    )
    (exported,) = (root / "explore").iterdir()
    result = runs.read_result(exported)
    assert result.kind == "export" and result.source == "demo/control"
    assert f"{result.roundtrip_val_bpb:.4f} after" in outputs(done)
    assert outputs(done).count("image/png") >= 4


def test_report(root, tmp_path):
    page = frontier.write_report(root, tmp_path)
    text = page.read_text(encoding="utf-8")
    assert "demo/control" in text and "Training curves" in text
    assert "<script" not in text  # no network, nothing that runs


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_committed_without_outputs(path):
    keys = "metadata.papermill cell.metadata.papermill"
    subprocess.run([sys.executable, "-m", "nbstripout", "--verify", "--extra-keys", keys, str(path)], check=True)
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.cells[0].source.startswith("# ")
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    # papermill reads a line with two = as no parameter at all, and then calls it unknown.
    assert all(line.count("=") <= 1 for line in tagged[0].source.splitlines())
