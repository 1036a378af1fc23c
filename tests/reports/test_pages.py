"""Report pages of synthetic runs, of exports, and without any run."""

import importlib.util
import os
from contextlib import nullcontext

import nbformat
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from support.runs import make_exports, make_run

from pgolf.analysis import frontier
from pgolf.reports import pages
from pgolf.runs.table import load_runs
from pgolf.sweeps.kernel_process import SharedKernel
from pgolf_core.config import ROOT
from pgolf_core.files import atomic_write

spec = importlib.util.spec_from_file_location("bench_report", ROOT / "benchmarks" / "bench_report.py")
bench_report = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench_report)

MAP = [
    dict(
        tensor=tensor, change="step:2", bpb=2.5 + rise, bytes=900 - saved, tensor_bytes=saved, delta_bpb=rise,
        delta_half=0.001,
        estimated_delta_bpb=0.8 * rise, delta_bytes=-saved, bpb_per_kb=1000 * rise / saved if saved else 0.0,
    )
    for tensor, rise, saved in [
        ("", 0.0, 0), ("blocks.0.mlp.fc.weight", 0.01, 900), ("blocks.1.mlp.fc.weight", -0.001, 900),
        ("tok_emb.weight", 0.2, 3000),
    ]
]  # fmt: skip


@pytest.fixture(scope="module")
def kernel():
    with SharedKernel() as kernel:
        yield kernel


@pytest.fixture(autouse=True)
def one_kernel_draws_all_pages(kernel, monkeypatch):
    """A kernel takes longer to start than a page to draw."""
    monkeypatch.setattr(pages, "SharedKernel", lambda: nullcontext(kernel))
    monkeypatch.setattr(pages, "AT_ONCE", 1)


def test_the_frontier_page_counts_complete_runs_and_drops_stale_figures(tmp_path):
    bench_report.make_runs(tmp_path / "runs", 40, sweeps=3)
    make_run(tmp_path / "runs", "sweep00/torn").joinpath("result.json").write_text("{")
    stale = tmp_path / "out" / "figures" / "frontier_9.png"
    atomic_write(stale, b"")
    os.utime(stale, (0, 0))
    _, page = pages.write_reports(tmp_path / "runs", tmp_path / "out", ["frontier"])
    text = page.read_text(encoding="utf-8")
    for words in ("Not complete: counted nowhere", "damaged: result.json", "over cap", "on the front"):
        assert words in text, words
    for key, _ in frontier.comparison_groups(load_runs(tmp_path / "runs")):
        assert frontier.group_title(key) in text
    drawn = {path.name: path for path in (tmp_path / "out" / "figures").iterdir()}
    assert {"frontier_1.png", "frontier_1_bytes.png", "frontier_1_curves.png"} <= drawn.keys()
    assert "frontier_9.png" not in drawn
    for path in drawn.values():
        assert plt.imread(path)[..., :3].std() > 0.05
    csv = pd.read_csv(tmp_path / "out" / "tables" / "frontier.csv")
    assert len(csv) == len(frontier.scored(load_runs(tmp_path / "runs")))
    assert not (csv.on_front & csv.over_cap).any()


def test_the_export_page_shows_fronts_and_sensitivity_maps(tmp_path):
    make_exports(tmp_path / "runs", "a/control", 50)
    stage = dict(bpb=None, total=None, source="a/control", checkpoint_sha256="a" * 64)
    make_run(tmp_path / "runs", "a/map", kind="sensitivity", table=MAP, **stage)
    make_run(tmp_path / "runs", "a/old-map", kind="sensitivity", table=[{"tensor": "", "bpb": 2.5}], **stage)
    make_run(tmp_path / "runs", "a/lab", kind="export_lab", table=[{"variant": "plain"}], **stage)
    stale, other = (tmp_path / "out" / "figures" / f"{page}_9.png" for page in ("export", "frontier"))
    for figure in (stale, other):
        atomic_write(figure, b"")
        os.utime(figure, (0, 0))
    _, page = pages.write_reports(tmp_path / "runs", tmp_path / "out", ["export"])
    text = page.read_text(encoding="utf-8")
    words = (" of 51 files, smallest first", "a/control", "file-00", "as trained", "best of the others")
    for word in (*words, "Spearman", "tok_emb.weight", "older version", "a/lab/notebook.ipynb"):
        assert word in text, word
    assert "file-41" not in text  # neither on a front nor int8 zlib
    assert not stale.exists() and other.exists()
    for name in ("export_1_a_control", "export_map_1_a_control", "export_map_1_a_control_estimates"):
        assert plt.imread(tmp_path / "out" / "figures" / f"{name}.png")[..., :3].std() > 0.05
    assert len(pd.read_csv(tmp_path / "out" / "tables" / "export.csv")) == 51


def test_every_page_without_runs_says_so(tmp_path):
    index, *written = pages.write_reports(tmp_path / "runs", tmp_path / "out")
    assert index.name == "index.html" and "0 runs: none yet" in index.read_text(encoding="utf-8")
    assert [page.stem for page in written] == list(pages.PAGES)
    texts = {page.stem: page.read_text(encoding="utf-8") for page in written}
    for name, text in texts.items():
        assert "yet" in text, name
        assert f'href="{name}.html"' in index.read_text(encoding="utf-8") and 'href="index.html"' in text
    assert "export_lab.ipynb" in texts["export"] and "no maps of a checkpoint" in texts["export"]


def test_the_kernel_that_drew_pages_and_imports_the_monitor_has_no_torch(kernel, tmp_path):
    """Importing torch takes as long as all other imports together."""
    code = "import sys\nfrom pgolf.reports import monitor\nassert 'torch' not in sys.modules"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)]), tmp_path / "in.ipynb")
    assert kernel.run(tmp_path / "in.ipynb", tmp_path / "out.ipynb", {}) is None
