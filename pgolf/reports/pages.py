"""Report pages: notebooks/report_<page>.ipynb executed over a folder of runs, and an index that links them."""

import html
import json
import os
import re
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from string import Template
from threading import Event, Thread
from urllib.parse import quote

import nbformat
from tqdm import tqdm

from pgolf.analysis import research
from pgolf.disk import read_json
from pgolf.reports.labels import printable
from pgolf.runs.directory import RUNS
from pgolf.runs.schema import About, read_about
from pgolf.runs.table import load_runs
from pgolf.search import trials
from pgolf.sweeps.kernel_process import SharedKernel
from pgolf_core.config import ROOT
from pgolf_core.files import atomic_write

REPORTS = ROOT / "reports"
PAGES = {  # notebooks/report_<page>.ipynb: title and question
    "frontier": ("The frontier", "What is the lowest bits-per-byte that fits in N bytes?"),
    "leaderboard": ("Leaderboard", "Which legal run is the best of its kind, and how sure is that?"),
    "sweep": ("Sweeps", "What did each factor do to bits per byte and to bytes, and is it significant?"),
    "transfer": ("Transfer", "Does what an arm does at one scale hold at another?"),
    "scale": ("Scaling and forecasts", "How does a score fall with size and steps, and how early can it be forecast?"),
    "research": ("Research models", "What do generated weights, depth by token and adaptation buy, and at what cost?"),
    "repeatability": ("Repeatability", "How far apart do equal runs end, and how many seeds does a claim need?"),
    "curves": ("Training curves", "How did loss fall with steps and with seconds?"),
    "export": ("Exports of each checkpoint", "One checkpoint, every way to store it: which file scores best?"),
    "search": ("Searches", "Which configuration is the best that fits, and which knobs decide it?"),
    "imports": ("Imported logs", "What do other people's logs say, and does it agree with what was claimed?"),
}
EARLY = ("frontier", "sweep")  # drawn while runs go on
SLOWEST = ("frontier", "sweep", "curves")  # started first
AT_ONCE = 2  # pages; each is a kernel of some hundred MB
# HTML of the pages' outputs: tables, and figures with links over their points (hover).
TAGS = ["style", "table", "thead", "tbody", "tr", "th", "td", "caption", "div", "a", "img"]
ATTRIBUTES = {"*": ["class", "id", "style"], "a": ["href", "aria-label"], "img": ["alt"]}
PAGE = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))


class ReportError(RuntimeError):
    """A report that could not be drawn; the message says why."""


def write_reports(root: str | Path = RUNS, out: str | Path = REPORTS, only: Iterable[str] = PAGES) -> list[Path]:
    """Execute notebooks/report_<page>.ipynb over the runs below root; write out/<page>.html, figures/ and tables/.

    Returns out/index.html and the pages. Pages need no network and run no script. Every file is written atomically.
    figures/<page>.json lists the figures of a page: those that its next version does not have are removed, and nothing
    else. A page that fails says so, and the index is written; then ReportError names all that failed. OSError if out
    cannot be written to. An interrupt kills the kernels.
    """
    root, out = Path(root).resolve(), Path(out).resolve()
    for folder in (out / "figures", out / "tables"):
        folder.mkdir(parents=True, exist_ok=True)
        if folder.resolve() != folder:
            raise ReportError(f"{folder} leads out of {out}: remove the link, or name another --out")
        tempfile.TemporaryFile(dir=folder).close()  # a folder that is read-only ends here
    there = _pages_of(root)
    only = [page for page in only if page in there]
    waiting = iter(sorted(only, key=lambda page: page not in SLOWEST))  # the kernels share it
    written, failed, kernels, interrupted = {}, [], [], Event()

    def draw() -> None:
        with SharedKernel() as kernel:
            kernels.append(kernel)
            for page in waiting:
                try:
                    written[page] = _write_page(kernel, root, out, page, there)
                except Exception as error:  # whatever a page fails of, the others are drawn
                    if interrupted.is_set():
                        return
                    name = getattr(error, "filename", None)  # set where a disk is full
                    why = f"{name}: {error.strerror}" if name else error or type(error).__name__
                    failed.append(f"report_{page}.ipynb: {why}")
                    with suppress(OSError):
                        _write_failure(out, page, failed[-1], there)

    count = min(AT_ONCE, os.cpu_count() or 1, len(only))
    with ThreadPoolExecutor(max(count, 1)) as pool:
        drawing = [pool.submit(draw) for _ in range(count)]
        try:
            for kernel in drawing:
                kernel.result()
        except BaseException:
            interrupted.set()
            list(waiting)  # no kernel begins another page
            for kernel in kernels:
                kernel.kill()
            raise
    index = _write_index(root, out, there)
    if failed:
        raise ReportError("\n".join(failed))
    return [index, *(written[page] for page in only)]


class EarlyPages:
    """The pages EARLY over the runs below root, drawn beside a sweep that goes on."""

    def __init__(self, root: Path):
        self.root, self.runs, self.next, self.thread = root, 0, 2, Thread()

    def draw(self, run: str) -> None:
        """Begin to draw, if this is the second, 16th, 128th … run that ended; later if a drawing goes on."""
        self.runs += 1
        if self.runs >= self.next and not self.thread.is_alive():
            self.next = 8 * self.runs
            self.thread = Thread(target=self._write, daemon=True)
            self.thread.start()

    def wait(self) -> None:
        """Return once no drawing goes on."""
        if self.thread.ident:
            self.thread.join()

    def _write(self) -> None:
        try:
            index, *_ = write_reports(self.root, only=EARLY)
            tqdm.write(f"{index}: first pages, of {self.runs} runs so far")
        except (ReportError, OSError) as error:  # drawn again at the end, where it counts
            tqdm.write(f"the first pages: {error}")


def _write_page(kernel: SharedKernel, root: Path, out: Path, page: str, there: list[str]) -> Path:
    from nbconvert import HTMLExporter  # slow to import, and only reports need it
    from nbconvert.preprocessors.sanitize import SanitizeHTML

    notebook = ROOT / "notebooks" / f"report_{page}.ipynb"
    with tempfile.TemporaryDirectory() as folder:
        executed = Path(folder) / "report.ipynb"
        if reason := kernel.run(notebook, executed, {"root": str(root), "out": str(out)}):
            raise ReportError(reason)
        cells = nbformat.read(executed, as_version=4)
    clean = SanitizeHTML(tags=TAGS, attributes=ATTRIBUTES, enabled=True)
    clean.styles = [*clean.styles, "left", "top"]
    cells, _ = clean.preprocess(cells, {})
    drawn = []
    for output in (output for cell in cells.cells for output in cell.get("outputs", [])):
        if "file" not in (about := output.get("metadata", {}).get("image/png", {})):
            continue
        drawn.append(about["file"])
        if "text/html" in output.data:  # no address of a picture passes the cleaning
            picture = f'<img src="data:image/png;base64,{output.data["image/png"]}"'
            output.data["text/html"] = output.data["text/html"].replace("<img", picture, 1)
    look = dict(template_name="basic", exclude_input=True, exclude_output_prompt=True, exclude_anchor_links=True)
    body, _ = HTMLExporter(**look).from_notebook_node(cells)
    for figure in set(_figures(out, page)) - set(drawn):
        with suppress(OSError):  # it is gone
            (out / "figures" / figure).unlink()
    atomic_write(out / "figures" / f"{page}.json", json.dumps({"figures": drawn}, indent=1) + "\n")
    return atomic_write(out / f"{page}.html", PAGE.substitute(title=PAGES[page][0], nav=_links(page, there), body=body))


def _pages_of(root: Path) -> list[str]:
    """PAGES that the runs below root have something for."""
    abouts = [read_about(path.parent) or About() for path in [*root.glob("sweep.json"), *root.glob("*/sweep.json")]]
    there = {
        "transfer": any(about.scale for about in abouts),
        "scale": any(about.family and not about.scale for about in abouts),
        "research": any(about.file in research.SWEEPS for about in abouts),
        "search": bool(trials.searches(root)),
    }
    return [page for page in PAGES if there.get(page, True)]


def _figures(out: Path, page: str) -> list[str]:
    """Figures in out/figures that figures/<page>.json lists."""
    listed = (read_json(out / "figures" / f"{page}.json") or {}).get("figures")
    listed = listed if isinstance(listed, list) else []
    return [name for name in listed if isinstance(name, str) and re.fullmatch(rf"{page}_[\w.-]+\.png", name)]


def _write_failure(out: Path, page: str, reason: str, there: list[str]) -> None:
    title = PAGES[page][0]
    body = f"<h1>{title}</h1><p><b>This page could not be drawn.</b> {html.escape(printable(reason))}</p>"
    atomic_write(out / f"{page}.html", PAGE.substitute(title=title, nav=_links(page, there), body=body))


def _write_index(root: Path, out: Path, there: list[str]) -> Path:
    table = load_runs(root)
    counts = ", ".join(f"{count:,} {status}" for status, count in table.status.value_counts().items()) or "none yet"
    body = [f"<h1>pgolf</h1><p>{len(table):,} runs: {counts}.</p>"]
    for page, (title, question) in PAGES.items():
        if not (out / f"{page}.html").exists():
            continue
        body.append(f'<h2><a href="{page}.html">{title}</a></h2><p>{question}</p>')
        for figure in _figures(out, page)[:1]:
            name = html.escape(quote(figure))
            body.append(f'<a href="{page}.html"><img src="figures/{name}" alt="{title}" width="560"></a>')
    return atomic_write(
        out / "index.html", PAGE.substitute(title="pgolf", nav=_links("index", there), body="\n".join(body))
    )


def _links(page: str, there: list[str]) -> str:
    titles = {"index": "All reports"} | {name: PAGES[name][0] for name in there}
    return " · ".join(title if name == page else f'<a href="{name}.html">{title}</a>' for name, title in titles.items())
