"""Open notebooks in a real JupyterLab, run them, and look: does a browser show what a researcher should see?

    python tools/browser.py notebooks/explore.ipynb          # no names: every notebook
    python tools/browser.py --page reports/frontier.html     # report pages instead
    python tools/browser.py notebooks/train.ipynb -y 'train: {knobs: {iterations: 4}}'

Copies of the notebooks run, so the files in the repository stay without outputs; their kernels import this checkout
and use its runs, or those of PGOLF_RUNS. A line for each notebook or page and one for each finding; exit status 1
when something was found, 2 when there is no browser. Screenshots go to --out. Chromium or Chrome is the system's
($PGOLF_CHROMIUM names another); playwright, which drives it, comes with `pip install -e .[browser]` and is
installed where it is missing.
"""

import argparse
import importlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
PLACES = (  # where Chrome and Edge are that no PATH leads to
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    r"C:\Program Files\Google\Chrome\Application\chrome.exe",
    r"C:\Program Files (x86)\Microsoft\Edge\Application\msedge.exe",
)
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
]  # fmt: skip
SETTINGS = {  # of JupyterLab: every cell in the page at once, no question about news
    "notebook-extension/tracker": {"windowingMode": "none", "scrollPastEnd": False},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
PIECE = 8000  # pixels of height of one screenshot; longer ones are several
OWN = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR")


class BrowserError(RuntimeError):
    """What is missing to look at a page; the message says how to get it."""


@dataclass
class Seen:
    """One notebook or page: what is wrong with it, and where its pictures are."""

    name: str
    cells: int = 0  # code cells of a notebook
    figures: int = 0
    seconds: float = 0.0
    screenshots: list[Path] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        cells = f"{self.cells} cells, " if self.cells else ""
        pictures = ", ".join(map(str, self.screenshots[:2])) + (" …" if len(self.screenshots) > 2 else "")
        return f"{self.name}: {cells}{self.figures} figures, {self.seconds:.1f} s, {pictures}"


# In the page: texts, boxes and pictures below the elements that `roots` selects. A text is seen where no ancestor
# hides it; where an ancestor scrolls it can be reached.
LOOK = r"""
([roots, width]) => {
  const found = [];
  const name = e => {
    const cell = e.closest('.jp-Notebook-cell');
    const cells = [...document.querySelectorAll('.jp-Notebook-cell')];
    const words = (e.alt || e.textContent || '').trim().replace(/\s+/g, ' ').slice(0, 50);
    return (cell ? `cell ${cells.indexOf(cell)}: ` : '') + `<${e.tagName.toLowerCase()}>` + (words && ` '${words}'`);
  };
  const chain = e => {
    const up = [];
    for (; e && e !== document.documentElement; e = e.parentElement) up.push(e);
    return up;
  };
  const scrolls = s => s.overflowX === 'auto' || s.overflowX === 'scroll';
  const shown = e => e.checkVisibility({visibilityProperty: true, opacityProperty: true});
  // The part of a box that is seen, and whether some of it is cut off where nobody can scroll to it.
  const seen = (box, e) => {
    let {left, right, top, bottom} = box, cut = false;
    for (const a of chain(e)) {
      const style = getComputedStyle(a);
      if (a === document.body || style.overflowX === 'visible') continue;
      const edge = a.getBoundingClientRect();
      if (!scrolls(style)) cut ||= right > edge.right + 1.5 || left < edge.left - 1.5;
      else cut ||= left < edge.left - a.scrollLeft - 1.5;
      left = Math.max(left, edge.left); right = Math.min(right, edge.right);
      top = Math.max(top, edge.top); bottom = Math.min(bottom, edge.bottom);
    }
    return {left, right, top, bottom, cut};
  };

  const texts = [];
  for (const root of document.querySelectorAll(roots)) {
    const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
    for (let node; node = walker.nextNode(); ) {
      const e = node.parentElement;
      if (!node.data.trim() || /^(SCRIPT|STYLE|TITLE)$/.test(e.tagName) || !shown(e)) continue;
      const floats = chain(e).some(a => /sticky|fixed/.test(getComputedStyle(a).position));
      const range = document.createRange();
      range.selectNodeContents(node);
      let cut = false, outside = false, lines = 0, widest = 0;
      for (const box of range.getClientRects()) {
        if (box.width < 2 || box.height < 2) continue;
        lines += 1;
        widest = Math.max(widest, box.width);
        const part = seen(box, e);
        cut ||= part.cut;
        outside ||= part.right > width + 1.5 || part.left < -1.5;
        if (!floats && part.right - part.left > 2 && part.bottom - part.top > 2) texts.push({...part, e});
      }
      if (cut) found.push(`${name(e)}: text is cut off at the side and cannot be scrolled to`);
      else if (outside) found.push(`${name(e)}: text lies beyond the window`);
      if (lines > 4 && widest < 60) found.push(`${name(e)}: text is squeezed into ${lines} lines of a few letters`);
    }
  }

  texts.sort((a, b) => a.top - b.top);
  const pairs = new Set();
  for (let i = 0; i < texts.length; i++) {
    for (let j = i + 1; j < texts.length && texts[j].top < texts[i].bottom; j++) {
      const [a, b] = [texts[i], texts[j]];
      if (a.e === b.e) continue;
      const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (wide > 3 && high > 0.3 * Math.min(a.bottom - a.top, b.bottom - b.top))
        pairs.add(`${name(a.e)} and ${name(b.e)}: texts overlap`);
    }
  }
  found.push(...pairs);

  const images = [...document.querySelectorAll(roots)].flatMap(root => [...root.querySelectorAll('img')]);
  for (const image of images) {
    const box = image.getBoundingClientRect();
    const area = (image.closest('.jp-OutputArea-output') || document.body).getBoundingClientRect();
    let wrong = '';
    if (!image.complete || !image.naturalWidth) wrong = `${image.src.slice(0, 80)} did not load`;
    else if (!shown(image) || !box.width || !box.height) wrong = 'is not visible';
    else if (box.right > area.right + 1 || box.left < area.left - 1) wrong = 'is wider than its place';
    if (wrong) found.push(`${name(image)}: the picture ${wrong}`);
  }

  const areas = [...document.querySelectorAll('.jp-OutputArea-child, .jp-RenderedMarkdown')].filter(shown);
  for (const [i, a] of areas.slice(0, -1).entries()) {
    const [one, two] = [a.getBoundingClientRect(), areas[i + 1].getBoundingClientRect()];
    const wide = Math.min(one.right, two.right) - Math.max(one.left, two.left);
    const high = Math.min(one.bottom, two.bottom) - Math.max(one.top, two.top);
    if (wide > 2 && high > 2 && !a.contains(areas[i + 1]))
      found.push(`${name(a)} and ${name(areas[i + 1])}: outputs overlap`);
  }
  return found;
}
"""

# A report page besides: what is wider than the window and in no box that scrolls; links; ids that they lead to.
PAGE = r"""
(width) => {
  const free = e => { for (let a = e.parentElement; a && a !== document.body; a = a.parentElement)
    if (getComputedStyle(a).overflowX !== 'visible') return false; return true; };
  const wide = [...document.body.querySelectorAll('*')].filter(e => {
    const box = e.getBoundingClientRect();
    return box.width && (box.right > width + 1.5 || box.left < -1.5) && e.checkVisibility() && free(e); });
  const inner = wide.filter(e => !wide.some(other => other !== e && e.contains(other)));
  return {
    wide: inner.map(e => `<${e.tagName.toLowerCase()}> '${e.textContent.trim().slice(0, 50)}': wider than the page, ` +
      `to ${Math.round(e.getBoundingClientRect().right)} of ${width} pixels`),
    links: [...document.querySelectorAll('a[href]')].map(a => [a.getAttribute('href'), a.href]),
    ids: [...document.querySelectorAll('[id], a[name]')].map(e => e.id || e.name),
    figures: document.images.length,
  };
}
"""

PROMPTS = (
    "() => [...document.querySelectorAll('.jp-CodeCell')].map(c => c.querySelector('.jp-InputPrompt').textContent)"
)
STATUS = "() => document.querySelector('.jp-Notebook-ExecutionIndicator')?.dataset.status"
ERRORS = r"""() => [...document.querySelectorAll('.jp-Notebook-cell')].flatMap((cell, i) =>
  [...cell.querySelectorAll('.jp-OutputArea-output')]
    .filter(o => /error/.test(o.dataset.mimeType) || /stderr/.test(o.dataset.mimeType))
    .map(o => [i, o.textContent]))"""


def chromium() -> str:
    """The path of a Chromium or Chrome: $PGOLF_CHROMIUM, PATH, the usual places. Raises BrowserError."""
    if wanted := os.environ.get("PGOLF_CHROMIUM"):
        if path := shutil.which(wanted):
            return path
        raise BrowserError(f"PGOLF_CHROMIUM={wanted}: no such program")
    for name in (*NAMES, *PLACES):
        if path := shutil.which(name):
            return path
    raise BrowserError("no Chromium and no Chrome here; install one, or name it in PGOLF_CHROMIUM")


def install() -> None:
    """playwright and JupyterLab into this environment and Chromium into a Debian or Ubuntu, where they are missing."""
    try:
        import jupyterlab  # noqa: F401
        import playwright  # noqa: F401
    except ImportError:
        if sys.prefix == sys.base_prefix and not os.environ.get("CONDA_PREFIX"):
            raise BrowserError("not in a virtual environment; run this with the Python of .venv") from None
        print("installing playwright ...", flush=True)
        _run([sys.executable, "-m", "pip", "install", "-q", "-c", "constraints.txt", "-e", ".[lab,browser]"])
        importlib.invalidate_caches()
    try:
        chromium()
    except BrowserError:
        root = getattr(os, "geteuid", lambda: 1)() == 0
        if os.environ.get("PGOLF_CHROMIUM") or not (root and shutil.which("apt-get")):
            raise
        print("installing chromium ...", flush=True)
        _run(["apt-get", "update"])
        _run(["apt-get", "install", "-y", "chromium"])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise BrowserError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()[-500:]}")


@contextmanager
def browser(width: int) -> Iterator:
    """A playwright browser context, its window so wide."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        window = playwright.chromium.launch(executable_path=chromium(), args=ARGUMENTS)
        try:
            yield window.new_context(viewport={"width": width, "height": 1000})
        finally:
            window.close()


@contextmanager
def jupyter_lab(folder: Path) -> Iterator[tuple[str, str]]:
    """A JupyterLab that serves the folder, with settings of its own; its address and token."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as own, socket.socket() as probe:
        for name, settings in SETTINGS.items():
            path = Path(own) / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(settings), encoding="utf-8")
        environment = {name: str(Path(own) / name) for name in OWN}
        environment |= {"JUPYTERLAB_SETTINGS_DIR": str(Path(own) / "settings")}
        environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}
        probe.bind(("127.0.0.1", 0))
        port, token = probe.getsockname()[1], secrets.token_hex(16)
        probe.close()
        options = {
            "ServerApp.ip": "127.0.0.1", "ServerApp.port": port, "ServerApp.port_retries": 0,
            "ServerApp.root_dir": folder, "ServerApp.allow_root": True, "IdentityProvider.token": token,
            # Should this process be killed, neither outlives it for long.
            "MappingKernelManager.cull_idle_timeout": 600, "ServerApp.shutdown_no_activity_timeout": 900,
        }  # fmt: skip
        command = [sys.executable, "-m", "jupyterlab", "--no-browser", *(f"--{k}={v}" for k, v in options.items())]
        with open(Path(own) / "log", "w+b") as log:
            server = subprocess.Popen(
                command, env=os.environ | environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
            try:
                address = f"http://127.0.0.1:{port}"
                _wait_for(f"{address}/api?token={token}", server, Path(own) / "log")
                yield address, token
            finally:
                _end(server)


def _wait_for(address: str, server: subprocess.Popen, log: Path, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while server.poll() is None and time.monotonic() < end:
        try:
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(address, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise BrowserError(f"JupyterLab did not start: {log.read_text(errors='replace')[-500:]}")


def _end(server: subprocess.Popen) -> None:
    """The server and the kernels that it started; it is given a moment to end them itself."""
    import psutil

    family = (
        [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
        if server.poll() is None
        else []
    )
    if family:
        server.terminate()
    _, alive = psutil.wait_procs(family, timeout=10)
    for process in alive:
        process.kill()
    server.wait()


def check_notebooks(
    notebooks: Iterable[Path], out: Path, parameters: dict | None = None, width: int = 1440, timeout: float = 1800
) -> Iterator[Seen]:
    """Run each notebook in JupyterLab and look at it; parameters: of notebooks, by their names without .ipynb."""
    import nbformat
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        copies = []
        for path in notebooks:
            notebook = load_notebook_node(str(path))
            if own := (parameters or {}).get(path.stem):
                notebook = parameterize_notebook(notebook, own)
            nbformat.write(notebook, Path(folder) / path.name)
            copies.append(Path(folder) / path.name)
        with jupyter_lab(Path(folder)) as (address, token), browser(width) as context:
            for copy in copies:
                yield _notebook(context, address, token, copy, out, width, timeout)


def _notebook(context, address: str, token: str, copy: Path, out: Path, width: int, timeout: float) -> Seen:
    start, seen = time.monotonic(), Seen(copy.name)
    sources = [cell for cell in json.loads(copy.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    seen.cells = len(sources)
    page = context.new_page()
    outside = _requests(page, lambda url: url.startswith((address, "data:", "blob:", address.replace("http", "ws"))))
    page.goto(f"{address}/lab/tree/{quote(copy.name)}?token={token}&reset")
    _wait_for_kernel(context, page, address, token)
    page.locator(".lm-MenuBar-itemLabel", has_text=re.compile("^Run$")).click()
    page.locator(".lm-Menu-itemLabel", has_text=re.compile("^Run All Cells$")).click()

    end, quiet = time.monotonic() + timeout, 0
    while quiet < 4 and time.monotonic() < end:  # idle for a second: between two cells it is, for less
        page.wait_for_timeout(250)
        prompts = page.evaluate(PROMPTS)
        begun = any(prompt.strip() != "[ ]:" for prompt in prompts)
        busy = any("*" in prompt for prompt in prompts) or page.evaluate(STATUS) != "idle"
        quiet = 0 if busy or not begun else quiet + 1
    if quiet < 4:
        seen.findings.append(f"not done after {timeout:.0f} s")
    wanted = [i for i, cell in enumerate(sources) if "".join(cell["source"]).strip()]
    if missing := [i for i in wanted if not re.search(r"\d", prompts[i])]:
        seen.findings.append(f"{len(missing)} of {len(wanted)} code cells did not run")
    seen.seconds = time.monotonic() - start

    errors = page.evaluate(ERRORS)
    for i, blocks in Counter(i for i, _ in errors).items():
        if blocks > 2:
            seen.findings.append(f"cell {i}: {blocks} blocks of stderr among its lines, as a progress bar leaves them")
    for i, text in errors:
        if "Traceback" in text:
            seen.findings.append(f"cell {i}: an error: {text.strip().splitlines()[-1][:200]}")
        elif warning := re.search(r".*(Warning|WARNING).*", text):
            seen.findings.append(f"cell {i}: a warning is shown: {warning[0].strip()[:200]}")
    seen.screenshots = _shots_of_notebook(page, out / copy.stem)
    roots = ".jp-OutputArea-output, .jp-RenderedMarkdown"
    seen.findings += page.evaluate(LOOK, [roots, width])
    seen.figures = page.locator(".jp-OutputArea :is(img, canvas, .jp-RenderedSVG svg)").count()
    saved = _saved_figures(page, copy)
    if saved > seen.figures:
        seen.findings.append(f"the notebook holds {saved} figures, the page shows {seen.figures}")
    seen.findings += [f"asks the network for {url}" for url in outside]
    page.close()
    for kernel in _kernels(context, address, token):
        context.request.delete(f"{address}/api/kernels/{kernel['id']}", headers={"Authorization": f"token {token}"})
    return seen


def _kernels(context, address: str, token: str) -> list[dict]:
    return context.request.get(f"{address}/api/kernels", headers={"Authorization": f"token {token}"}).json()


def _wait_for_kernel(context, page, address: str, token: str, seconds: float = 60) -> None:
    """Until the page has a kernel: run before that, it would ask for one."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        kernels = _kernels(context, address, token)
        there = any(kernel["execution_state"] == "idle" and kernel["connections"] for kernel in kernels)
        if there and page.evaluate(STATUS) == "idle" and "Idle" in page.locator("#jp-bottom-panel").inner_text():
            return
        page.wait_for_timeout(200)
    raise BrowserError(f"no kernel after {seconds:.0f} s")


def _shots_of_notebook(page, stem: Path) -> list[Path]:
    """Scroll through, then the notebook at its full length and each of its figures."""
    scroller = page.locator(".jp-WindowedPanel-outer").first
    length = scroller.evaluate("e => e.scrollHeight")
    for top in [*range(0, length, 800), 0]:
        scroller.evaluate("(e, top) => { e.scrollTop = top; }", top)
        page.wait_for_timeout(30)
    page.wait_for_function("() => [...document.images].every(image => image.complete)", timeout=20_000)
    around = page.viewport_size["height"] - scroller.evaluate("e => e.clientHeight")
    width = page.viewport_size["width"]
    page.set_viewport_size({"width": width, "height": min(length, PIECE) + around + 20})
    page.wait_for_timeout(300)
    paths = []
    for i, top in enumerate(range(0, length, PIECE)):
        scroller.evaluate("(e, top) => { e.scrollTop = top; }", top)
        page.wait_for_timeout(200)
        paths.append(_path(stem, f"_{i + 1}" if length > PIECE else ""))
        page.screenshot(path=paths[-1])
    figures = page.locator(".jp-OutputArea img")
    for i in range(figures.count()):
        paths.append(_path(stem, f"_figure{i + 1}"))
        figures.nth(i).screenshot(path=paths[-1])
    return paths


def _path(stem: Path, suffix: str) -> Path:
    return stem.with_name(f"{stem.name}{suffix}.png")


def _saved_figures(page, copy: Path) -> int:
    """Image outputs of the notebook as JupyterLab saves it."""
    before = copy.stat().st_mtime_ns
    page.locator(".lm-MenuBar-itemLabel", has_text=re.compile("^File$")).click()
    page.locator(".lm-Menu-itemLabel", has_text=re.compile("^Save Notebook$")).click()
    end = time.monotonic() + 20
    while copy.stat().st_mtime_ns == before and time.monotonic() < end:
        page.wait_for_timeout(100)
    page.wait_for_timeout(200)
    cells = json.loads(copy.read_text(encoding="utf-8"))["cells"]
    outputs = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
    return sum(any(kind.startswith("image/") for kind in data) for data in outputs)


def check_pages(pages: Iterable[Path], out: Path, width: int = 1440) -> Iterator[Seen]:
    """Open each HTML file and look at it."""
    out.mkdir(parents=True, exist_ok=True)
    with browser(width) as context:
        for path in pages:
            start, seen = time.monotonic(), Seen(path.name)
            page = context.new_page()
            outside = _requests(page, lambda url: url.startswith(("file:", "data:", "blob:", "about:")))
            page.goto(path.resolve().as_uri(), wait_until="load")
            page.wait_for_timeout(200)
            told = page.evaluate(PAGE, width)
            seen.figures = told["figures"]
            seen.findings += page.evaluate(LOOK, ["body", width]) + told["wide"]
            seen.findings += [f"asks the network for {url}" for url in outside]
            seen.findings += [
                f"the link {written} leads nowhere"
                for written, url in told["links"]
                if _is_broken(url, path, told["ids"])
            ]
            length = page.evaluate("() => document.documentElement.scrollHeight")
            for i, top in enumerate(range(0, length, PIECE)):
                seen.screenshots.append(_path(out / path.stem, f"_{i + 1}" if length > PIECE else ""))
                clip = {"x": 0, "y": top, "width": width, "height": min(PIECE, length - top)}
                page.screenshot(path=seen.screenshots[-1], full_page=True, clip=clip)
            page.close()
            seen.seconds = time.monotonic() - start
            yield seen


def _is_broken(url: str, page: Path, ids: list[str]) -> bool:
    """Whether a link to a file or a place in one leads nowhere; others are not followed."""
    parts = urlsplit(url)
    if parts.scheme != "file":
        return False
    target = Path(urllib.request.url2pathname(parts.path))
    if not target.exists():
        return True
    place = unquote(parts.fragment)
    if not place:
        return False
    if target.resolve() != page.resolve():
        ids = re.findall(r'\bid="([^"]*)"', target.read_text(encoding="utf-8", errors="replace"))
    return place not in ids


def _requests(page, allowed) -> list[str]:
    """Addresses that the page asks for and may not; the list fills as it does."""
    asked: list[str] = []
    page.on("request", lambda request: None if allowed(request.url) else asked.append(request.url))
    return asked


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path, metavar="NOTEBOOK")
    parser.add_argument("--page", nargs="+", type=Path, default=[], metavar="FILE", help="report pages")
    parser.add_argument("--out", type=Path, default=ROOT / "reports" / "browser", metavar="FOLDER", help="screenshots")
    parser.add_argument("-y", "--parameters", default="{}", metavar="YAML", help="notebook: {name: value}")
    parser.add_argument("--width", type=int, default=1440, help="of the window, in pixels")
    parser.add_argument("--timeout", type=float, default=1800, metavar="SECONDS", help="for one notebook")
    arguments = parser.parse_args(words)
    notebooks = arguments.notebooks
    if not notebooks and not arguments.page:
        notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    if absent := [path for path in [*notebooks, *arguments.page] if not path.is_file()]:
        parser.error(f"no such file: {', '.join(map(str, absent))}")
    try:
        install()
        import yaml

        parameters = yaml.safe_load(arguments.parameters) or {}
        found = 0
        if notebooks:
            found += _say(check_notebooks(notebooks, arguments.out, parameters, arguments.width, arguments.timeout))
        if arguments.page:
            found += _say(check_pages(arguments.page, arguments.out, arguments.width))
    except BrowserError as error:
        print(f"browser: {error}", file=sys.stderr)
        return 2
    return 1 if found else 0


def _say(all_seen: Iterable[Seen]) -> int:
    """Print a line for each, and for each finding; how many findings there are."""
    count = 0
    for seen in all_seen:
        print(seen, flush=True)
        for finding in seen.findings:
            print(f"  {seen.name}: {finding}", flush=True)
        count += len(seen.findings)
    return count


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends JupyterLab too
    sys.exit(main())
