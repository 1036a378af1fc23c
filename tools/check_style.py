"""Hold the code to the house's measures: sizes, parameters, and how comments begin.

    python tools/check_style.py            # exit status 1 and a line per finding
    python tools/check_style.py --counts   # the figures behind the limits

Standard library only. A function or module that breaks a limit for a good reason is listed in ALLOWED with it.
"""

import argparse
import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Goals: 4,200, 9,000 and 9,500. The limits follow the house down; only a new feature raises them.
PACKAGE_LINES = {"pgolf_core": 6_920, "pgolf": 21_239, "tests": 19_725}
FOLDERS = [*PACKAGE_LINES, "benchmarks", "tools"]
MODULE_LINES, TEST_LINES, README_LINES = 400, 500, 180
FUNCTION_LINES, PARAMETERS = 60, 7
ALLOWED_FUNCTION_LINES = {"pgolf/training/run.py:train_loop": 90}  # the loop is one story on one screen
# A sentence that begins with one of these refers to something that the reader has to find first.
WORDS = "as at but by else from of since so than that there those to what whatever where which who whoever whom whose"
CONNECTIVES = frozenset(re.findall(r"\w+", WORDS))
CONNECTIVE_SHARE = 0.06
PRAGMA = re.compile(r"#\s*(noqa|fmt:|type:|pragma|ruff|pyright)|#!")


@dataclass(frozen=True)
class Comment:
    """The words of a comment block or docstring and where it stands."""

    path: Path
    line: int
    text: str
    docstring: bool = False

    @property
    def is_bare(self) -> bool:
        first = re.match(r"[A-Za-z]+", self.text)
        return bool(first) and first[0].lower() in CONNECTIVES


def sources(folder: str) -> list[Path]:
    return sorted(p for p in (ROOT / folder).rglob("*.py") if "__pycache__" not in p.parts)


def comments(path: Path) -> Iterator[Comment]:
    """Comments, each block of full lines counted once, and docstrings."""
    text = path.read_text(encoding="utf-8")
    previous = (0, -1)  # line and column of the comment before
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type != tokenize.COMMENT or PRAGMA.match(token.string):
            continue
        line, column = token.start
        full = not token.line[:column].strip()
        if not (full and previous == (line - 1, column)):
            yield Comment(path, line, token.string.lstrip("# "))
        previous = (line, column) if full else (0, -1)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=True)
            if docstring:
                yield Comment(path, node.body[0].lineno, docstring, docstring=True)


def functions(path: Path) -> Iterator[tuple[str, int, int, int]]:
    """Name, first line, number of lines and number of parameters (self and cls not counted) of every function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            a = node.args
            names = [arg.arg for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
            count = len([name for name in names if name not in ("self", "cls")])
            yield node.name, node.lineno, node.end_lineno - node.lineno + 1, count


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def size_findings() -> Iterator[str]:
    for folder, limit in PACKAGE_LINES.items():
        total = sum(map(lines_of, sources(folder)))
        if total > limit:
            yield f"{folder}: {total:,} lines, at most {limit:,}"
        module_limit = TEST_LINES if folder == "tests" else MODULE_LINES
        for path in sources(folder):
            name = path.relative_to(ROOT).as_posix()
            if (lines := lines_of(path)) > module_limit:
                yield f"{name}: {lines} lines, at most {module_limit}"
            for function, line, length, parameters in functions(path):
                function_limit = ALLOWED_FUNCTION_LINES.get(f"{name}:{function}", FUNCTION_LINES)
                if length > function_limit and folder != "tests":
                    yield f"{name}:{line}: {function} has {length} lines, at most {function_limit}"
                if parameters > PARAMETERS and folder != "tests":
                    yield f"{name}:{line}: {function} has {parameters} parameters, at most {PARAMETERS}"
    if (lines := lines_of(ROOT / "README.md")) > README_LINES:
        yield f"README.md: {lines} lines, at most {README_LINES}"


def comment_findings(folders: list[str]) -> Iterator[str]:
    everything = [comment for folder in folders for path in sources(folder) for comment in comments(path)]
    for kind, docstring in (("comments", False), ("docstrings", True)):
        found = [comment for comment in everything if comment.docstring == docstring]
        bare = [comment for comment in found if comment.is_bare]
        if len(bare) > CONNECTIVE_SHARE * len(found):
            yield f"{len(bare)} of {len(found)} {kind} begin with a bare connective, at most {CONNECTIVE_SHARE:.0%}"
            for comment in bare:
                place = f"{comment.path.relative_to(ROOT).as_posix()}:{comment.line}"
                yield f"  {place}: {comment.text.splitlines()[0][:70]}"


def counts() -> Iterator[str]:
    for folder in FOLDERS:
        found = [comment for path in sources(folder) for comment in comments(path)]
        total = sum(map(lines_of, sources(folder)))
        shares = []
        for kind, docstring in (("comments", False), ("docstrings", True)):
            own = [comment for comment in found if comment.docstring == docstring]
            bare = sum(comment.is_bare for comment in own)
            shares.append(f"{len(own):5,} {kind}, {bare:3} bare ({bare / len(own):5.1%})")
        yield f"{folder:12} {total:6,} lines, {', '.join(shares)}"


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", action="store_true", help="print the figures, find nothing")
    if parser.parse_args(words).counts:
        print("\n".join(counts()))
        return 0
    findings = [*size_findings(), *comment_findings(FOLDERS)]
    print("\n".join(findings) if findings else "sizes, parameters and comments are within their limits")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
