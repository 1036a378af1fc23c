"""tools/browser.py finds what is planted in notebooks and pages, and nothing in sound ones."""

import base64
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from support.hostile import hostile_runs
from support.runs import make_exports

from pgolf.reports import pages as report_pages

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("browser", ROOT / "tools" / "browser.py")
browser = importlib.util.module_from_spec(_spec)
sys.modules["browser"] = browser  # its dataclass looks itself up there
_spec.loader.exec_module(browser)

DATA = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
PIXEL = f"data:image/png;base64,{DATA}"
FIGURE = f"""
from IPython.display import HTML, Image, display
import base64
display(Image(base64.b64decode("{DATA}"), width=300, height=100))
display(HTML("<table><tr><th>run</th><td>control</td></tr></table>"))
"""


pytestmark = pytest.mark.slow
pytest.importorskip("pytest_playwright", reason="no browser to test in: pip install -e .[lab,browser]")


@pytest.fixture(scope="session")
def browser_type_launch_args():
    """Options of pytest-playwright's `page`: the system's browser, which reaches this machine alone."""
    pytest.importorskip("jupyterlab", reason="jupyterlab is not installed: pip install -e .[lab]")
    try:
        return {"executable_path": browser.chromium(), "args": browser.ARGUMENTS}
    except browser.BrowserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def browser_context_args():
    return {"viewport": {"width": browser.WIDTH, "height": 1000}}


def write(path: Path, *sources: str) -> Path:
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    notebook.cells = [nbformat.v4.new_markdown_cell("# A notebook"), *map(nbformat.v4.new_code_cell, sources)]
    nbformat.write(notebook, path)
    return path


def test_notebooks_in_jupyterlab(context, tmp_path):
    good = write(tmp_path / "good.ipynb", "n = 1", FIGURE, "", "assert n == 1")
    good_text = good.read_text(encoding="utf-8")
    bad = write(
        tmp_path / "bad.ipynb",
        "from IPython.display import HTML",
        """HTML('<div style="width: 90px; overflow: hidden; white-space: nowrap">a name longer than this</div>')""",
        """HTML('<p style="height: 1px">one line</p><p style="margin: -12px 0 0 4px">upon another</p>')""",
        f"""HTML('<img alt="wide" style="width: 4000px; max-width: none; height: 9px" src="{PIXEL}">')""",
        """HTML('<img alt="gone" src="no.png">')""",
        "1 / 0",
        "'never'",
    )
    seen = {one.name: one for one in browser.check_notebooks(context, [good, bad], tmp_path, timeout=60)}

    one = seen["good.ipynb"]
    assert one.findings == []
    assert (one.cells, one.figures) == (4, 1)
    assert [path.name for path in one.screenshots] == ["good.png"]
    assert all(path.stat().st_size for path in one.screenshots)
    assert good.read_text(encoding="utf-8") == good_text  # a copy ran

    found = "\n".join(seen["bad.ipynb"].findings)
    assert "cell 2: <div> 'a name longer than this': text is cut off" in found
    assert "cell 3: <p> 'one line' and cell 3: <p> 'upon another': texts overlap" in found
    assert "cell 4: <img> 'wide': the picture is wider than its place" in found
    assert "cell 5: <img> 'gone': the picture http" in found and "did not load" in found
    assert "cell 6: an error: ZeroDivisionError: division by zero" in found
    assert "1 of 7 code cells did not run" in found
    assert len(seen["bad.ipynb"].findings) == 6


PAGE = """<!DOCTYPE html><html><head><meta charset="utf-8"><title>t</title>
<style>body {{ margin: 2em; font: 14px sans-serif }}</style></head><body>{}</body></html>"""
SOUND = f"""
<h1 id="top">A page</h1><p>Text with <b>bold</b>, <i>italics</i>, x<sup>2</sup> and a <a href="#top">link</a>,
<a href="other.html#there">another</a>, <a href="https://example.org/">one that is not followed</a>.</p>
<div style="overflow-x: auto"><table style="width: 3000px"><tr><td>a</td><td>far to the right</td></tr></table></div>
<img alt="a picture" width="200" src="{PIXEL}"><img alt="a file" src="figures/one.png">
"""
PLANTED = {
    '<p style="height: 1px">one line of text</p><p style="margin-top: -10px">another upon it</p>': "texts overlap",
    '<table style="width: 3000px; background: #eee"><tr><td>x</td></tr></table>': "wider than the page",
    '<p style="white-space: nowrap">' + "word " * 400 + "</p>": "text lies beyond the window",
    '<div style="width: 50px; overflow: hidden; white-space: nowrap">cut at the side</div>': "text is cut off",
    '<p style="width: 3em; overflow-wrap: anywhere">a_long_name_in_a_column_without_room</p>': "squeezed into",
    '<img src="figures/none.png">': "did not load",
    '<img hidden src="figures/one.png">': "the picture is not visible",
    '<a href="none.html">x</a>': "the link none.html leads nowhere",
    '<a href="#nowhere">x</a>': "the link #nowhere leads nowhere",
    '<a href="other.html#nowhere">x</a>': "the link other.html#nowhere leads nowhere",
    '<script src="https://example.org/x.js"></script>': "asks the network for https://example.org/x.js",
}


def test_pages(context, tmp_path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "one.png").write_bytes(base64.b64decode(DATA))
    (tmp_path / "other.html").write_text('<p id="there">there</p>', encoding="utf-8")
    bodies = {"sound": SOUND} | {f"planted{i}": SOUND + planted for i, planted in enumerate(PLANTED)}
    pages = [tmp_path / f"{name}.html" for name in bodies]
    for file, body in zip(pages, bodies.values(), strict=True):
        file.write_text(PAGE.format(body), encoding="utf-8")
    sound, *rest = browser.check_pages(context, pages, tmp_path)
    assert sound.findings == [] and sound.figures == 2
    assert sound.screenshots == [tmp_path / "sound.png"] and sound.screenshots[0].exists()
    for (planted, words), seen in zip(PLANTED.items(), rest, strict=True):
        assert any(words in finding for finding in seen.findings), (planted, seen.findings)
        assert len(seen.findings) <= 2, seen.findings


def test_foreign_strings_run_nothing_and_ask_for_nothing(context, tmp_path):
    hostile_runs(tmp_path / "runs")
    pages = report_pages.write_reports(tmp_path / "runs", tmp_path / "out")
    dialogs, errors = [], []
    context.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    context.on("weberror", lambda error: errors.append(str(error.error)))
    for seen in browser.check_pages(context, pages, tmp_path):
        assert [finding for finding in seen.findings if "network" in finding or "did not load" in finding] == [], seen
        assert seen.name != "frontier.html" or seen.figures >= 3  # the policy lets a page's own figures through
    assert dialogs == errors == []


def test_the_pointer_shows_a_run_and_a_click_opens_it(page, tmp_path):
    make_exports(tmp_path / "runs", "a/control", 9)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    for written in report_pages.write_reports(tmp_path / "runs", tmp_path / "out", ["frontier", "export"])[1:]:
        page.goto(written.as_uri())
        points = page.locator(".pgolf-point")
        assert points.count() == 10
        point = page.locator(".pgolf-point[aria-label*='file-03']")
        shown = "e => getComputedStyle(e, '::after').content"
        assert point.evaluate(shown) == "none"
        point.hover()
        assert "file-03" in point.evaluate(shown) and "359,000 bytes" in point.evaluate(shown)
        point.click()
        page.wait_for_url((tmp_path / "runs" / "a" / "control-lab" / "file-03").as_uri() + "/")
        assert "result.json" in page.content()
    assert all(url.startswith(("file:", "data:", "chrome:")) for url in asked), asked


def test_exit_status(browser_type_launch_args, tmp_path):
    page = tmp_path / "a.html"
    command = [sys.executable, browser.__file__, "--page", str(page), "--out", str(tmp_path)]  # no loop of pytest's

    def run(body: str, **env: str):
        page.write_text(PAGE.format(body), encoding="utf-8")
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | env)

    sound, broken = run("<p>fine</p>"), run('<img src="no.png">')
    assert (sound.returncode, broken.returncode) == (0, 1), sound.stderr + broken.stderr
    lines = [*sound.stdout.splitlines(), *broken.stdout.splitlines()]
    assert lines[0].startswith("a.html: 0 cells, 0 figures, ") and lines[0].endswith("a.png")
    assert len(lines) == 3 and lines[2].startswith("  a.html: <img>: the picture file:")
    without = run("", PGOLF_CHROMIUM="no-such-browser")
    assert without.returncode == 2 and "PGOLF_CHROMIUM=no-such-browser: no such program" in without.stderr
