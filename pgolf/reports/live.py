"""The monitor that keeps up: in a notebook beside its other cells, and on a terminal."""

import asyncio
import html
import shutil
import sys
import time
from pathlib import Path
from typing import ClassVar

from pgolf.reports import figures, monitor, text
from pgolf.reports.labels import printable
from pgolf.runs.result import RunError
from pgolf_core.config import did_you_mean

UP = "\x1b[A"  # one line up


class Watch:
    """Displays in a notebook what monitor.state says, again and again without keeping the kernel from other cells."""

    current: "ClassVar[Watch | None]" = None  # the one that keeps up; a cell that runs again begins another

    def __init__(self, root: str | Path, sweep: str = "", hours: float = 12.0, rows: int = 30):
        """The first look. Raises RunError if there is no sweep of that name."""
        self.settings, self.rows, self.shown, self.drawn = (root, sweep, hours), rows, {}, None
        self.task: asyncio.Task | None = None
        self.look()

    def look(self) -> None:
        """Display the runs as they are now, in place of what was displayed before."""
        from IPython.display import Markdown, display  # only notebooks need it

        table = monitor.state(*self.settings)
        content = {"sweeps": Markdown(monitor.overview(table)), "gpus": Markdown(monitor.gpus())}
        if self.drawn != (lines := [*table.path[table.state == "running"], table.wrote.max()]):
            figure, self.drawn = monitor.plot_live(table), lines
            content["curves"] = figures.save(figure, "", "curves") if figure else Markdown("Nothing is training.")
        content["runs"] = monitor.styled(table, self.rows)
        for name, own in content.items():
            if name in self.shown:
                self.shown[name].update(own)
            else:
                self.shown[name] = display(own, display_id=True)

    def keep_up(self, every: float, seconds: float) -> None:
        """Look again every so many seconds, for `seconds` or until stop(), whenever no cell is running."""
        if Watch.current:
            Watch.current.stop()
        Watch.current = self
        self.task = asyncio.get_running_loop().create_task(self._keep_up(every, time.monotonic() + seconds))

    def stop(self) -> None:
        """Display nothing more."""
        if self.task:
            self.task.cancel()

    async def _keep_up(self, every: float, end: float) -> None:
        while time.monotonic() + every < end:
            await asyncio.sleep(every)
            try:
                self.look()
            except (OSError, RunError):  # a folder that is gone may come back
                continue


def terminal(root: Path, name: str = "", hours: float = 12.0, every: float = 0.0) -> None:
    """Print the state of a sweep, of one run (sweep/run) or of all sweeps at work.

    every: seconds until the lines are written again, as long as something is at work; 0: once. Raises RunError.
    """
    height, (sweep, _, run) = 0, name.partition("/")
    while True:
        table = monitor.state(root, sweep, hours)
        if run and run not in set(table.run):
            raise RunError(f"{root / sweep} has no run {run}{did_you_mean(run, table.run)}")
        table = table[table.run == run] if run else table
        summary = [] if run else monitor.overview(table).replace("**", "").splitlines()
        lines = [printable(html.unescape(line.removeprefix("- "))) for line in summary]
        if len(table):
            lines += [*[""] * bool(lines), *text.columns(monitor.format_state(table)).splitlines()]
        lines = lines or [f"nothing wrote to {root} in the last {hours:g} hours"]
        if every:
            columns, most = shutil.get_terminal_size()
            lines = [line[: columns - 1].ljust(columns - 1) for line in lines[: most - 1]]
            lines += [" " * (columns - 1)] * (height - len(lines))
        print(UP * height + "\n".join(lines))
        sys.stdout.flush()
        height = len(lines)
        works = table.state.isin(("running", "stalled")) | ((table.state == "waiting") & table.sweep_runs.eq(True))
        if not every or not works.any():
            return
        time.sleep(every)
