"""Report pages of synthetic runs, of exports, and without any run."""

import importlib.util
import json
import os
import re
import signal
import threading
import time
from contextlib import nullcontext

import nbformat
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from support.hostile import HOSTILE, hostile_runs
from support.runs import make_exports, make_run

from pgolf.analysis import frontier
from pgolf.reports import labels, notebook, pages
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


@pytest.mark.parametrize("root", ["", "demo"])
def test_a_page_reads_sweep_json_from_the_store_and_from_the_sweep_alone(root, tmp_path):
    make_run(tmp_path, "demo/control", bpb=2.5)
    (tmp_path / "demo" / "sweep.json").write_text('{"question": "Why?"}')
    page = notebook.begin(str(tmp_path / root), "")
    assert page.about["demo"].question == "Why?" and page.folder("demo") == tmp_path / "demo"


def test_the_frontier_page_counts_complete_runs_and_drops_stale_figures(tmp_path):
    bench_report.make_runs(tmp_path / "runs", 40, sweeps=3)
    make_run(tmp_path / "runs", "sweep00/torn").joinpath("result.json").write_text("{")
    figures = tmp_path / "out" / "figures"
    stale, mine, outside = figures / "frontier_9.png", figures / "frontier_8.png", figures / ".." / "a.png"
    for figure in (stale, mine, outside):
        atomic_write(figure, b"")
    listed = ["frontier_9.png", "../a.png", "frontier_../../a.png", 3]
    atomic_write(tmp_path / "out" / "figures" / "frontier.json", json.dumps({"figures": listed}))
    _, page = pages.write_reports(tmp_path / "runs", tmp_path / "out", ["frontier"])
    text = page.read_text(encoding="utf-8")
    for words in ("Not complete: counted nowhere", "damaged: result.json", "over cap", "on the front"):
        assert words in text, words
    for key, _ in frontier.comparison_groups(load_runs(tmp_path / "runs")):
        assert frontier.group_title(key) in text
    assert mine.exists() and outside.exists() and not stale.exists()
    mine.unlink()
    drawn = {path.name: path for path in (tmp_path / "out" / "figures").glob("*.png")}
    assert {"frontier_1.png", "frontier_1_bytes.png", "frontier_1_curves.png"} <= drawn.keys()
    for path in drawn.values():
        assert plt.imread(path)[..., :3].std() > 0.05
    csv = pd.read_csv(tmp_path / "out" / "tables" / "frontier.csv")
    assert len(csv) == len(frontier.scored(load_runs(tmp_path / "runs")))
    assert not (csv.on_front & csv.over_cap).any()


def test_the_sweep_page_has_the_reference_only_beside_its_sweeps(tmp_path):
    for sweep, shown in (("mine", False), ("gridrefine_fixedstep", True)):
        make_run(tmp_path / "runs", f"{sweep}/control")
        _, page = pages.write_reports(tmp_path / "runs", tmp_path / "out", ["sweep"])
        assert ("The reference's results" in page.read_text(encoding="utf-8")) == shown


def test_the_export_page_shows_fronts_and_sensitivity_maps(tmp_path):
    make_exports(tmp_path / "runs", "a/control", 50)
    stage = dict(bpb=None, total=None, source="a/control", checkpoint_sha256="a" * 64)
    make_run(tmp_path / "runs", "a/map", kind="sensitivity", table=MAP, **stage)
    make_run(tmp_path / "runs", "a/old-map", kind="sensitivity", table=[{"tensor": "", "bpb": 2.5}], **stage)
    make_run(tmp_path / "runs", "a/lab", kind="export_lab", table=[{"variant": "plain"}], **stage)
    _, page = pages.write_reports(tmp_path / "runs", tmp_path / "out", ["export"])
    text = page.read_text(encoding="utf-8")
    words = (" of 51 files, smallest first", "a/control", "file-00", "as trained", "best of the others")
    for word in (*words, "Spearman", "tok_emb.weight", "older version", "a/lab/notebook.ipynb"):
        assert word in text, word
    assert ">file-00<" in text and ">file-41<" not in text  # neither on a front nor int8 zlib
    for name in ("export_1_a_control", "export_map_1_a_control", "export_map_1_a_control_estimates"):
        assert plt.imread(tmp_path / "out" / "figures" / f"{name}.png")[..., :3].std() > 0.05
    assert len(pd.read_csv(tmp_path / "out" / "tables" / "export.csv")) == 51


def test_every_page_without_runs_says_so(tmp_path):
    index, *written = pages.write_reports(tmp_path / "runs", tmp_path / "out")
    assert index.name == "index.html" and "0 runs: none yet" in index.read_text(encoding="utf-8")
    assert [page.stem for page in written] == [
        page for page in pages.PAGES if page not in ("transfer", "scale", "research", "search")
    ]
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


def test_a_failed_page_says_so_and_costs_no_other(kernel, tmp_path, monkeypatch):
    run = kernel.run
    why = "TypeError: expected <class 'str'>, not <script>alert(1)</script>"
    fails = lambda notebook, *more: why if "curves" in notebook.name else run(notebook, *more)  # noqa: E731
    monkeypatch.setattr(kernel, "run", fails)
    with pytest.raises(pages.ReportError, match=r"report_curves.ipynb: TypeError: expected <class 'str'>"):
        pages.write_reports(tmp_path / "runs", tmp_path / "out", ["curves", "imports"])
    text = (tmp_path / "out" / "curves.html").read_text(encoding="utf-8")
    assert "could not be drawn" in text and "expected &lt;class &#x27;str&#x27;&gt;" in text and "<script" not in text
    assert (tmp_path / "out" / "imports.html").exists() and (tmp_path / "out" / "index.html").exists()


def test_a_report_follows_no_link_out_of_its_folder(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "figures").symlink_to(tmp_path / "mine", target_is_directory=True)
    with pytest.raises(pages.ReportError, match="leads out of"):
        pages.write_reports(tmp_path / "runs", tmp_path / "out")
    assert list((tmp_path / "mine").iterdir()) == []


def test_an_interrupt_ends_pages_at_once(tmp_path, monkeypatch):
    code = f"open({str(tmp_path / 'begun')!r}, 'w').close(); import time; time.sleep(60)"
    cells = [nbformat.v4.new_code_cell("", metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell(code)]
    about = {"kernelspec": {"name": "python3", "display_name": "", "language": "python"}}
    (tmp_path / "notebooks").mkdir()
    nbformat.write(
        nbformat.v4.new_notebook(cells=cells, metadata=about), tmp_path / "notebooks" / "report_curves.ipynb"
    )
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    monkeypatch.setattr(pages, "SharedKernel", SharedKernel)
    at = []

    def interrupt() -> None:
        while not (tmp_path / "begun").exists():
            time.sleep(0.05)
        at.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        pages.write_reports(tmp_path / "runs", tmp_path / "out", ["curves"])
    assert time.monotonic() - at[0] < 10
    assert not list((tmp_path / "out").glob("*.html"))


@pytest.mark.slow
def test_foreign_strings_are_text_in_every_page(tmp_path):
    hostile_runs(tmp_path / "runs")
    written = pages.write_reports(tmp_path / "runs", tmp_path / "out")
    for page in written:
        text = page.read_text(encoding="utf-8")
        assert re.findall(r"<(?:script|class|b>|img[^>]*(?:\sonerror=|src=.http))", text.split("<nav>")[1]) == [], page
        assert set(re.findall(r'href="([a-z]+):', text)) == set(), page
        assert "default-src 'none'" in text
    assert "expected &lt;class 'str'&gt;" in (tmp_path / "out" / "imports.html").read_text(encoding="utf-8")


def test_md_shows_any_text_as_it_is():
    from nbconvert.filters import markdown2html

    for text in HOSTILE:
        html = str(markdown2html(labels.md(text)))
        assert re.findall(r"<(?!/?p>)", html) == [], html
