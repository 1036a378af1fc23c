"""The measures of the house hold: sizes, how comments begin, which way imports go."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import check_style  # noqa: E402


def test_sizes_parameters_and_comments_are_within_their_limits():
    findings = [*check_style.size_findings(), *check_style.comment_findings(check_style.FOLDERS)]
    assert findings == []


def test_the_reference_of_knobs_is_what_the_code_says():
    spec = importlib.util.spec_from_file_location("knobs_reference", ROOT / "tools" / "knobs_reference.py")
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    assert reference.PAGE.read_text(encoding="utf-8") == reference.page(), "run python tools/knobs_reference.py"


def test_every_link_of_readme_and_docs_leads_to_a_file():
    pages = [ROOT / "README.md", ROOT / "LOG.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    links = [
        (page, link) for page in pages for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
    ]
    assert links
    assert [(page.name, link) for page, link in links if not (page.parent / link).exists()] == []


def test_imports_go_one_way_and_in_no_circle():
    script = Path(sys.executable).with_name("lint-imports")
    if not script.exists():
        pytest.skip("import-linter is not installed: pip install -e .[dev]")
    done = subprocess.run([script, "--no-logo"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_the_types_of_the_core_are_clean(tmp_path):
    pytest.importorskip("mypy", reason="pip install -e .[dev]")
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("source", "bare"),
    [
        ("# of the weights\n", [True]),
        ("x = 1  # what is left\n", [True]),
        ("# Seconds per step.\n", [False]),
        ("# A block of lines\n# of which the first counts\n", [False]),
        ("# First\n\n# Second\n", [False, False]),
        ('def f():\n    """Whoever calls."""\n', [True]),
        ("x = 1  # noqa: E501\n", []),
        ('x = "# of no comment"\n', []),
    ],
)
def test_a_comment_that_begins_with_a_connective_is_counted_once_per_block(tmp_path, source, bare):
    path = tmp_path / "module.py"
    path.write_text(source, encoding="utf-8")
    assert [comment.is_bare for comment in check_style.comments(path)] == bare


def test_a_function_is_measured_with_its_parameters(tmp_path):
    path = tmp_path / "module.py"
    path.write_text("class A:\n    def f(self, a, *, b=1):\n        pass\n", encoding="utf-8")
    assert list(check_style.functions(path)) == [("f", 2, 2, 2)]
