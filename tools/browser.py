"""Run notebooks in a real JupyterLab and open report pages in Chromium: does a reader see what they should?

    python tools/browser.py notebooks/explore.ipynb          # no names: every notebook
    python tools/browser.py --page reports/frontier.html     # report pages instead

Copies of the notebooks run, with this checkout and its runs, or those of PGOLF_RUNS. Exit status: 1 when something was
found, 2 without a browser. Needs `pip install -e .[lab,browser]` and Chromium or Chrome; PGOLF_CHROMIUM names another.
"""

import argparse
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = (Path(__file__).parent / "browser.js").read_text(encoding="utf-8")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
# No sandbox, since tests run as root in containers; no host but this one.
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"]
SETTINGS = {  # JupyterLab: every cell in the page at once, no question about news
    "notebook-extension/tracker": {"windowingMode": "none", "scrollPastEnd": False},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
OWN_FOLDERS = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_WORKSPACES_DIR")
SHOT_HEIGHT, WIDTH = 8000, 1440  # pixels; a higher page is several screenshots


class BrowserError(RuntimeError):
    """What is missing to look at a page; the message says how to get it."""


@dataclass
class Seen:
    """One notebook or page: findings, and the files of its screenshots."""

    name: str
    cells: int = 0  # code cells of a notebook
    figures: int = 0
    screenshots: list[Path] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.name}: {self.cells} cells, {self.figures} figures, {', '.join(map(str, self.screenshots))}"


def chromium() -> str:
    """Path of a Chromium or Chrome: PGOLF_CHROMIUM, else the first of NAMES on PATH. Raises BrowserError."""
    wanted = os.environ.get("PGOLF_CHROMIUM")
    for name in (wanted,) if wanted else NAMES:
        if path := shutil.which(name):
            return path
    missing = f"PGOLF_CHROMIUM={wanted}: no such program" if wanted else "no Chromium and no Chrome on PATH"
    raise BrowserError(f"{missing}; install one, or name another in PGOLF_CHROMIUM")


@contextmanager
def window() -> Iterator:
    """A playwright context, its pages WIDTH wide."""
    path = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        try:
            yield browser.new_context(viewport={"width": WIDTH, "height": 1000})
        finally:
            browser.close()


@contextmanager
def jupyter_lab(folder: Path, seconds: float = 120) -> Iterator[str]:
    """A JupyterLab with settings of its own that serves the folder; yields the address of a notebook, {name} open."""
    from pgolf.processes import kill_family

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as own:
        for name, settings in SETTINGS.items():
            path = Path(own) / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(settings), encoding="utf-8")
        environment = {name: str(Path(own) / name) for name in OWN_FOLDERS}
        environment |= {"JUPYTERLAB_SETTINGS_DIR": str(Path(own) / "settings"), "PYTHONPATH": str(ROOT)}
        token, log = secrets.token_hex(16), Path(own) / "log"
        options = {"ip": "127.0.0.1", "port": 0, "root_dir": folder, "allow_root": True, "open_browser": False}
        command = [sys.executable, "-m", "jupyterlab", f"--IdentityProvider.token={token}"]
        command += [f"--ServerApp.{name}={value}" for name, value in options.items()]
        with open(log, "wb") as output:
            server = subprocess.Popen(command, env=os.environ | environment, stdout=output, stderr=output)
        try:
            end, found = time.monotonic() + seconds, None
            while found is None and server.poll() is None and time.monotonic() < end:
                time.sleep(0.2)
                found = re.search(r"http://127\.0\.0\.1:[1-9]\d*", log.read_text(errors="replace"))
            if found is None:
                raise BrowserError(f"JupyterLab did not start: {log.read_text(errors='replace')[-500:]}")
            yield f"{found[0]}/lab/tree/{{name}}?token={token}&reset"
        finally:
            kill_family(server.pid)
            server.wait()


def check_notebooks(context, notebooks: Iterable[Path], out: Path, timeout: float = 1800) -> Iterator[Seen]:
    """Run a copy of each notebook in JupyterLab and look at it; timeout: seconds for one."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, jupyter_lab(Path(folder)) as address:
        for path in notebooks:
            cells = json.loads(Path(shutil.copy(path, folder)).read_text(encoding="utf-8"))["cells"]
            sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
            seen = Seen(path.name, cells=len(sources))
            look = _new_page(context, ("http://127.0.0.1", "ws://127.0.0.1", "data:", "blob:"), seen)
            look.goto(address.format(name=quote(path.name)))
            prompts = _run_all(look, timeout, seen)
            wanted = [i for i, source in enumerate(sources) if source.strip()]
            if missing := [i for i in wanted if not re.search(r"\d", prompts[i])]:
                seen.findings.append(f"{len(missing)} of {len(wanted)} code cells did not run")
            seen.findings += look.evaluate("pgolfErrors()")
            seen.screenshots = _notebook_shots(look, out / path.stem)
            seen.findings += look.evaluate(f"pgolfLook('.jp-OutputArea-output, .jp-RenderedMarkdown', {WIDTH})")
            seen.figures = look.locator(".jp-OutputArea :is(img, canvas, .jp-RenderedSVG svg)").count()
            look.close()
            yield seen


def _run_all(page, timeout: float, seen: Seen) -> list[str]:
    """Run all cells once the kernel is idle and wait until it is again; the prompts of the code cells."""
    page.wait_for_function("() => document.querySelector('#jp-bottom-panel')?.innerText.includes('Idle')")
    page.evaluate(SCRIPT + "; Object.assign(window, {pgolfLook, pgolfPrompts, pgolfStatus, pgolfErrors})")
    page.locator(".lm-MenuBar-itemLabel", has_text=re.compile("^Run$")).click()
    page.locator(".lm-Menu-itemLabel", has_text=re.compile("^Run All Cells$")).click()
    end, quiet, prompts = time.monotonic() + timeout, 0, []
    while quiet < 4 and time.monotonic() < end:  # idle for a second: between two cells it is idle for less
        page.wait_for_timeout(250)
        prompts = page.evaluate("pgolfPrompts()")
        begun = any(prompt.strip() != "[ ]:" for prompt in prompts)
        busy = any("*" in prompt for prompt in prompts) or page.evaluate("pgolfStatus()") != "idle"
        quiet = 0 if busy or not begun else quiet + 1
    if quiet < 4:
        seen.findings.append(f"not done after {timeout:.0f} s")
    return prompts


def _notebook_shots(page, stem: Path) -> list[Path]:
    """The notebook at its full length."""
    scroller = page.locator(".jp-WindowedPanel-outer").first
    length = scroller.evaluate("e => e.scrollHeight")
    around = page.viewport_size["height"] - scroller.evaluate("e => e.clientHeight")
    page.set_viewport_size({"width": WIDTH, "height": min(length, SHOT_HEIGHT) + around + 20})
    page.wait_for_function("() => [...document.images].every(image => image.complete)", timeout=20_000)

    def shoot(path: Path, top: int) -> None:
        scroller.evaluate("(e, top) => { e.scrollTop = top; }", top)
        page.wait_for_timeout(200)
        page.screenshot(path=path)

    return _shots(stem, length, shoot)


def _shots(stem: Path, length: int, shoot: Callable[[Path, int], None]) -> list[Path]:
    """Screenshots that cover `length` pixels, numbered if there are several; shoot(path, top) takes one."""
    tops = range(0, length, SHOT_HEIGHT)
    paths = [stem.with_name(f"{stem.name}{f'_{i + 1}' if len(tops) > 1 else ''}.png") for i in range(len(tops))]
    for path, top in zip(paths, tops, strict=True):
        shoot(path, top)
    return paths


def check_pages(context, files: Iterable[Path], out: Path) -> Iterator[Seen]:
    """Open each HTML file and look at it."""
    for path in files:
        seen = Seen(path.name)
        look = _new_page(context, ("file:", "data:", "blob:", "about:"), seen)
        look.goto(path.resolve().as_uri(), wait_until="load")
        look.evaluate(SCRIPT + "; Object.assign(window, {pgolfLook, pgolfPage})")
        about = look.evaluate(f"pgolfPage({WIDTH})")
        seen.figures = about["figures"]
        seen.findings += look.evaluate(f"pgolfLook('body', {WIDTH})") + about["wide"]
        broken = [written for written, url in about["links"] if _is_broken(url, path, about["ids"])]
        seen.findings += [f"the link {written} leads nowhere" for written in broken]
        length = look.evaluate("document.documentElement.scrollHeight")

        def shoot(path: Path, top: int, look=look, length: int = length) -> None:
            clip = {"x": 0, "y": top, "width": WIDTH, "height": min(SHOT_HEIGHT, length - top)}
            look.screenshot(path=path, full_page=True, clip=clip)

        seen.screenshots = _shots(out / path.stem, length, shoot)
        look.close()
        yield seen


def _is_broken(url: str, page: Path, ids: list[str]) -> bool:
    """Whether a link to a file, or to a place in one, leads nowhere; other links are not followed."""
    parts = urlsplit(url)
    if parts.scheme != "file":
        return False
    target, place = Path(urllib.request.url2pathname(parts.path)), unquote(parts.fragment)
    if not target.exists():
        return True
    if place and target.resolve() != page.resolve():
        ids = re.findall(r'\bid="([^"]*)"', target.read_text(encoding="utf-8", errors="replace"))
    return bool(place) and place not in ids


def _new_page(context, allowed: tuple[str, ...], seen: Seen):
    """Another page of the same window; a request for an address that begins otherwise is a finding."""
    new = context.new_page()

    def note(request) -> None:
        if not request.url.startswith(allowed):
            seen.findings.append(f"asks the network for {request.url}")

    new.on("request", note)
    return new


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path, metavar="NOTEBOOK")
    parser.add_argument("--page", nargs="+", type=Path, default=[], metavar="FILE", help="report pages")
    parser.add_argument("--out", type=Path, default=ROOT / "reports" / "browser", metavar="FOLDER", help="screenshots")
    arguments = parser.parse_args(words)
    committed = sorted(set((ROOT / "notebooks").glob("*.ipynb")) - {ROOT / "notebooks" / "colab.ipynb"})  # it installs
    notebooks = arguments.notebooks or ([] if arguments.page else committed)
    if absent := [path for path in [*notebooks, *arguments.page] if not path.is_file()]:
        parser.error(f"no such file: {', '.join(map(str, absent))}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    try:
        found = 0
        with window() as context:
            pages = check_pages(context, arguments.page, arguments.out)
            for seen in chain(check_notebooks(context, notebooks, arguments.out) if notebooks else (), pages):
                print(seen, *(f"  {seen.name}: {finding}" for finding in seen.findings), sep="\n", flush=True)
                found += len(seen.findings)
    except BrowserError as error:
        print(f"browser: {error}", file=sys.stderr)
        return 2
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
