"""Pages of docs/: current, complete, and a site without a dead link."""

import importlib.util
import re
import shlex
import subprocess
import sys
from html import unescape
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

from pgolf.cli.main import make_parser

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def test_the_reference_of_commands_is_what_the_parsers_say():
    spec = importlib.util.spec_from_file_location("cli_reference", ROOT / "tools" / "cli_reference.py")
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    assert reference.PAGE.read_text(encoding="utf-8") == reference.page(), "run python tools/cli_reference.py"


def test_the_page_of_notebooks_has_every_notebook_with_a_question():
    rows = re.findall(r"^\| \[([\w.]+)\]\(\S+\) \| .*\? \|$", (DOCS / "notebooks.md").read_text("utf-8"), re.MULTILINE)
    assert sorted(rows) == sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))


def test_the_index_leads_to_every_page():
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    assert [page.name for page in DOCS.glob("*.md") if f"({page.name})" not in index and page.name != "index.md"] == []


def _commands(text: str) -> list[list[str]]:
    """Words of each `pgolf` command in the code blocks of a page, without its comment."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    lines = [line.split("#")[0].strip() for kind, block in blocks if not kind for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("pgolf ")]


def test_every_command_of_the_tutorial_parses(tmp_path, monkeypatch):
    text = (DOCS / "tutorial.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    sweep = tmp_path / "notebooks" / "sweeps" / "mine.yaml"
    sweep.parent.mkdir(parents=True)
    sweep.write_text(text.partition("```yaml\n")[2].partition("```")[0], encoding="utf-8")
    assert len(_commands(text)) >= 8
    for words in _commands(text):
        assert make_parser().parse_args(words).command


def test_the_sweep_of_the_tutorial_is_valid(tmp_path):
    from pgolf.sweeps.sweep_file import load_sweep

    text = (DOCS / "tutorial.md").read_text(encoding="utf-8").partition("```yaml\n")[2].partition("```")[0]
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    assert set(load_sweep(tmp_path / "mine.yaml").runs) == {"narrow", "narrow-s1338", "wide", "wide-s1338"}
    assert yaml.safe_load(text)["base"]["data_path"] == "data/notes_sp1024"


@pytest.mark.parametrize(("page", "module"), [("search", "search.search_file"), ("sweeps", "sweeps.sweep_file")])
def test_a_page_has_the_whole_format_of_its_files(page, module):
    keys = importlib.import_module(f"pgolf.{module}").__doc__.split("\n\n")[1].strip()
    assert f"```yaml\n{keys}\n```" in (DOCS / f"{page}.md").read_text(encoding="utf-8") and yaml.safe_load(keys)


def test_the_site_builds_strictly_without_a_dead_link_or_a_foreign_request(tmp_path):
    pytest.importorskip("material", reason='pip install -e ".[docs]"')
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    dead, foreign = [], []
    for page in tmp_path.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        foreign += re.findall(r'<(?:script|img|link rel="stylesheet")[^>]+(?:src|href)="(https?:[^"]+)"', text)
        for link in re.findall(r'(?:href|src)="?([^"\s>]+)', text):
            parts = urlsplit(unescape(link))
            if parts.scheme or parts.netloc or not parts.path or page.name == "404.html":
                continue
            target = page.parent / unquote(parts.path)
            if not (target / "index.html" if target.is_dir() else target).is_file():
                dead.append((page.parent.name, link))
    assert dead == [] and foreign == []
