"""Report pages: notebooks/report_<page>.ipynb executed over a folder of runs, and an index that links them."""

import html
import os
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from string import Template
from urllib.parse import quote

import nbformat

from pgolf.runs.directory import RUNS
from pgolf.runs.table import load_runs
from pgolf.sweeps.kernel_process import SharedKernel
from pgolf_core.config import ROOT
from pgolf_core.files import atomic_write

REPORTS = ROOT / "reports"
PAGES = {  # notebooks/report_<page>.ipynb: title and question
    "frontier": ("The frontier", "What is the lowest bits-per-byte that fits in N bytes?"),
    "leaderboard": ("Leaderboard", "Which legal run is the best of its kind, and how sure is that?"),
    "sweep": ("Sweeps", "What did each factor do to bits per byte and to bytes, and is it significant?"),
    "repeatability": ("Repeatability", "How far apart do equal runs end, and how many seeds does a claim need?"),
    "curves": ("Training curves", "How did loss fall with steps and with seconds?"),
    "export": ("Exports of each checkpoint", "One checkpoint, every way to store it: which file scores best?"),
    "imports": ("Imported logs", "What do other people's logs say, and does it agree with what was claimed?"),
}
SLOWEST = ("frontier", "sweep", "curves")  # started first
AT_ONCE = 2  # pages; each is a kernel of some hundred MB
PAGE = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))


class ReportError(RuntimeError):
    """A report that could not be drawn; the message says why."""


def write_reports(root: str | Path = RUNS, out: str | Path = REPORTS, only: Iterable[str] = PAGES) -> list[Path]:
    """Execute notebooks/report_<page>.ipynb over the runs below root; write out/<page>.html, figures/ and tables/.

    Returns out/index.html and the pages; the index is written even if pages fail. Pages need no network. Every file is
    written atomically; figures of a page's former version that this one does not have are removed. Raises ReportError
    naming all pages that failed.
    """
    waiting = iter(sorted(only, key=lambda page: page not in SLOWEST))  # the kernels share it
    written, failed = {}, []

    def draw() -> None:
        with SharedKernel() as kernel:
            for page in waiting:
                try:
                    written[page] = _write_page(kernel, Path(root).resolve(), Path(out).resolve(), page)
                except (ReportError, OSError) as error:
                    failed.append(str(error))

    count = min(AT_ONCE, os.cpu_count() or 1)
    with ThreadPoolExecutor(count) as pool:
        drawing = [pool.submit(draw) for _ in range(count)]
        try:
            for kernel in drawing:
                kernel.result()
        finally:
            list(waiting)  # after an interrupt no kernel begins another page
    index = _write_index(Path(root), Path(out))
    if failed:
        raise ReportError("\n".join(failed))
    return [index, *(written[page] for page in only)]


def _write_page(kernel: SharedKernel, root: Path, out: Path, page: str) -> Path:
    from nbconvert import HTMLExporter  # slow to import, and only reports need it

    notebook = ROOT / "notebooks" / f"report_{page}.ipynb"
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        executed = Path(folder) / "report.ipynb"
        if reason := kernel.run(notebook, executed, {"root": str(root), "out": str(out)}):
            raise ReportError(f"{notebook.name}: {reason}")
        cells = nbformat.read(executed, as_version=4)
    exporter = HTMLExporter(template_name="basic", exclude_input=True, exclude_output_prompt=True)
    body, _ = exporter.from_notebook_node(cells)
    for figure in (out / "figures").glob(f"{page}_*.png"):
        if figure.stat().st_mtime < start - 2:  # file systems round times
            figure.unlink()
    return atomic_write(out / f"{page}.html", PAGE.substitute(title=PAGES[page][0], nav=_links(page), body=body))


def _write_index(root: Path, out: Path) -> Path:
    table = load_runs(root)
    counts = ", ".join(f"{count:,} {status}" for status, count in table.status.value_counts().items()) or "none yet"
    body = [f"<h1>pgolf</h1><p>{len(table):,} runs: {counts}.</p>"]
    for page, (title, question) in PAGES.items():
        body.append(f'<h2><a href="{page}.html">{title}</a></h2><p>{question}</p>')
        for figure in sorted((out / "figures").glob(f"{page}_*.png"))[:1]:
            name = html.escape(quote(figure.name))
            body.append(f'<a href="{page}.html"><img src="figures/{name}" alt="{title}" width="560"></a>')
    return atomic_write(out / "index.html", PAGE.substitute(title="pgolf", nav=_links("index"), body="\n".join(body)))


def _links(page: str) -> str:
    titles = {"index": "All reports"} | {name: title for name, (title, _) in PAGES.items()}
    return " · ".join(title if name == page else f'<a href="{name}.html">{title}</a>' for name, title in titles.items())
