"""A report notebook's runs, and how it shows texts, tables and figures and leaves them on disk."""

import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import quote

import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import Markdown, display
from matplotlib.figure import Figure

from pgolf.reports import figures, hover
from pgolf.reports.labels import md
from pgolf.runs.directory import RUNS
from pgolf.runs.schema import About, read_about
from pgolf.runs.table import load_runs
from pgolf_core.config import ROOT
from pgolf_core.files import atomic_write

OPENED = ("notebook.ipynb", "log.txt", "result.json")  # the first that a run has


@dataclass(frozen=True)
class Page:
    """The runs that a page is about, and the folder for its figures/ and tables/; None: only shown."""

    root: Path
    out: Path | None
    runs: pd.DataFrame

    @cached_property
    def about(self) -> dict[str, About]:
        """What sweep.json says of each sweep with runs, by name."""
        return {sweep: read_about(self.folder(sweep)) or About() for sweep in sorted(set(self.runs.sweep))}

    def folder(self, sweep: str) -> Path:
        """The folder of a sweep: root itself on the pages of one sweep, else below root."""
        return self.root if (self.root / "sweep.json").exists() else self.root / sweep

    def show(self, *content) -> None:
        """Display Markdown texts, whose HTML is escaped but for `md`'s entities, and tables; '' is left out."""
        for one in content:
            if not isinstance(one, str):
                display(one)
            elif one:
                display(Markdown(re.sub(r"&(?!#\d+;)", "&amp;", one).replace("<", "&lt;")))

    def heading(self, text: str, level: int = 2) -> None:
        self.show(f"{'#' * level} {md(text or 'runs without a sweep')}")

    def figure(self, figure: Figure, *name, points: pd.DataFrame | None = None) -> None:
        """Display a figure and write it as figures/<name>.png, its parts cut to 60 characters and joined by _.

        points: of `hover`; each becomes a link to its run, whose text the pointer shows.
        """
        picture = figures.save(figure, self.out, "_".join(re.sub(r"[^\w.-]", "_", str(part))[:60] for part in name))
        if points is None:
            display(picture)
            return
        data, about = picture._repr_mimebundle_()
        # A browser lists a folder; JupyterLab opens files alone.
        opened = [
            path if self.out else next(filter(Path.is_file, map(path.joinpath, OPENED)), path) for path in points.path
        ]
        data["text/html"] = hover.over(figure, data["image/png"], points.assign(href=list(map(self.href, opened))))
        display(data, metadata=about, raw=True)

    def csv(self, name: str, rows: pd.DataFrame | list[pd.DataFrame]) -> None:
        rows = rows if isinstance(rows, pd.DataFrame) else pd.concat(rows) if rows else pd.DataFrame()
        if self.out:
            atomic_write(
                self.out / "tables" / f"{name}.csv",
                rows.to_csv(index=False, lineterminator="\n").encode(errors="backslashreplace"),
            )

    def none_yet(self, found, what: str, how: str) -> None:
        """Say that there are none yet, and how to make some, unless some were found."""
        if not len(found):
            self.show(f"**There are no {what} in {md(os.path.relpath(self.root, ROOT))} yet.** {how}")

    def href(self, path: Path) -> str:
        """The address of a file or folder; relative, unless it lies on another drive than the page."""
        here, path = (self.out or Path.cwd()).resolve(), path.resolve()
        if path.drive != here.drive:
            return path.as_uri()
        return quote(os.fsencode(Path(os.path.relpath(path, here)).as_posix())) + "/" * path.is_dir()

    def links(self, runs: pd.DataFrame) -> str:
        """Markdown links to the executed notebooks of runs."""
        links = [f"[{md(r.sweep)}/{md(r.run)}]({self.href(r.path / 'notebook.ipynb')})" for r in runs.itertuples()]
        return ", ".join(links)


def begin(root: str, out: str) -> Page:
    """A report notebook's first call: sets the style of figures and loads the runs. root: '' = runs/."""
    plt.rcParams.update(figures.STYLE)
    folder = Path(root or RUNS)
    return Page(folder, Path(out) if out else None, load_runs(folder))
