"""Where text comes from: the embedded corpus, made of docstrings that are on this machine already."""

from __future__ import annotations

import ast
import gc
import hashlib
import importlib.metadata
import importlib.util
import re
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tokenize import open as open_source
from typing import NamedTuple

from pgolf.data import prepare, train_tokenizer
from pgolf.data.dataset import DESCRIPTION, read_about
from pgolf.data.documents import Texts
from pgolf.disk import exclusive, explain_disk_errors
from pgolf_core.config import ROOT
from pgolf_core.files import DataError
from pgolf_core.knobs import EMBEDDED, DataConfig
from pgolf_core.shards import SHARD_TOKENS

PACKAGES = ("torch", "sympy", "pandas", "networkx", "numpy", "matplotlib")
# Of the large corpus: every package that pyproject.toml's dependencies install under a name of its own.
LARGE_PACKAGES = (
    *PACKAGES,
    *("scipy", "pydantic", "pydantic_settings", "yaml", "tqdm", "filelock", "psutil", "papermill", "ipykernel"),
    *("nbconvert", "huggingface_hub", "safetensors", "sentencepiece"),
)
VALIDATION_DOCUMENTS = 200
MIN_DOCSTRING = 200  # characters; shorter ones are mostly one-line summaries
LARGE_MIN_TEXT = 40  # characters, of the large corpus: shorter ones speak to tools, not to readers
# A string or a comment, so that a # inside of a string is none; in that order, which finds the outer one.
LEXEME = re.compile(
    r"""(?:\"\"\"(?:[^\\]|\\.)*?\"\"\"|'''(?:[^\\]|\\.)*?'''|"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'|(\#[^\n]*))""",
    re.DOTALL,
)


class Document(NamedTuple):
    name: str
    text: str


# The embedded corpus


def embedded_documents(large: bool = False) -> list[Document]:
    """One document a module of PACKAGES: its docstrings, each in the first document that has it.

    large: of LARGE_PACKAGES, shorter docstrings and the comments too. The order is that of the hashed module names:
    the same on every machine, and any stretch of documents holds something of every package. The packages are read,
    not imported.
    """
    documents, seen = [], set()
    collecting = gc.isenabled()
    gc.disable()  # syntax trees are millions of objects that hold no cycles: a quarter of the time saved
    try:
        modules = _modules(LARGE_PACKAGES if large else PACKAGES)
        for name, path in sorted(modules, key=lambda m: (_sha256(m[0].encode()), m[1].name)):
            texts = [*_docstrings(path, LARGE_MIN_TEXT), *_comments(path)] if large else _docstrings(path)
            fresh = [text for text in dict.fromkeys(texts) if text not in seen]
            seen.update(fresh)
            if fresh:
                documents.append(Document(name, "\n\n".join(fresh)))
    finally:
        if collecting:
            gc.enable()
    return documents


def _modules(packages: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """Dotted name and source file of every module of the packages."""
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise DataError(f"the embedded corpus is made of {package}, among others; pip install {package}")
        folder = Path(spec.submodule_search_locations[0])
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder.parent).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def _docstrings(path: Path, shortest: int = MIN_DOCSTRING) -> list[str]:
    """Docstrings of a file's module, classes and functions, in source order, cleaned of indentation."""
    source = path.read_bytes()
    if b'"""' not in source and b"'''" not in source:  # saves a third of the time, and loses no docstring
        return []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escapes in others' code
            tree = ast.parse(source)
    except SyntaxError:  # torch keeps a file in the syntax of Python 3.12; its one docstring is short
        return []
    texts, todo = [], [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) > shortest:
                texts.append(text)
        # Statements only: ast.walk would visit every expression too.
        for field in ("finalbody", "orelse", "cases", "handlers", "body"):
            below = getattr(node, field, None)
            if isinstance(below, list):
                todo.extend(reversed(below))
    return texts


def _comments(path: Path) -> list[str]:
    """Comments of a file, in source order: lines that follow each other are one text, without their #."""
    try:
        with open_source(path) as f:
            source = f.read()
    except (SyntaxError, UnicodeDecodeError):  # of no encoding that Python knows, so no module
        return []
    texts, lines, end = [], [], 0
    for found in LEXEME.finditer(source):
        if found[1] is None:
            continue
        between = source[end : found.start()]
        if between.strip() or between.count("\n") > 1:
            texts.append("\n".join(lines))
            lines = []
        lines.append(found[1].lstrip("#").strip())
        end = found.end()
    texts.append("\n".join(lines))
    return [text for text in texts if len(text) > LARGE_MIN_TEXT]


def build_embedded(
    vocab_size: int, directory: str | Path | None = None, kind: str = "bpe", large: bool = False
) -> Path:
    """Folder of shards and tokenizer of the embedded corpus; built when it is not there, whole or not at all.

    Default folder: data/embedded_sp1024, data/embedded_large_byte260 and so on. The tokenizer is made of the training
    documents. Raises DataError when the folder was built from other packages, or for another tokenizer.
    """
    train_tokenizer.check(kind, vocab_size)
    name = "embedded_large" if large else "embedded"
    directory = Path(directory or ROOT / "data" / f"{name}_{train_tokenizer.name_of(kind, vocab_size)}")
    packages = LARGE_PACKAGES if large else PACKAGES
    if not (directory / DESCRIPTION).exists():
        with explain_disk_errors(directory), exclusive(directory):  # which tokenization.build takes once more
            if not (directory / DESCRIPTION).exists():  # nobody built it while we waited
                with _saying(f"embedded corpus: reading the docstrings of {', '.join(packages)}"):
                    texts = [document.text for document in embedded_documents(large)]
                prepare.build(
                    Texts(texts, name), directory, kind=kind, vocab_size=vocab_size, shard_tokens=SHARD_TOKENS,
                    val_documents=VALIDATION_DOCUMENTS, tokenizer_documents=0, about={"versions": _versions(packages)},
                )  # fmt: skip
    built = read_about(directory)
    source = built.get("source", {"name": "embedded", "tokenizer": {"kind": "bpe"}})  # once there were no others
    there = {"vocab_size": built["vocab_size"], "tokenizer": source["tokenizer"]["kind"], "corpus": source["name"]}
    for key, asked in {"vocab_size": vocab_size, "tokenizer": kind, "corpus": name}.items():
        if there[key] != asked:
            raise DataError(f"{directory}: built for {key}={there[key]}, not {asked}")
    then, now = built["versions"], _versions(packages)
    changed = [
        f"{name} {then.get(name)} (now {now.get(name)})" for name in then | now if then.get(name) != now.get(name)
    ]
    if changed:
        raise DataError(
            f"{directory} was built from {', '.join(changed)}: the packages of now make another "
            "text, and scores on the two do not compare. Delete that folder to build it anew, "
            f"or keep its text with data_path={directory}"
        )
    return directory


def _versions(packages: Sequence[str]) -> dict[str, str]:
    """Of everything that decides the shards; torch's '+cpu' and '+cu130' have the same docstrings."""
    distributions = {name: {"yaml": "pyyaml"}.get(name, name) for name in (*packages, "sentencepiece")}
    return {name: importlib.metadata.version(found).partition("+")[0] for name, found in distributions.items()}


def resolve(config: DataConfig, vocab_size: int) -> Path:
    """Folder that data_path names; an embedded corpus is built when it is not there yet."""
    if config.data_path in EMBEDDED:
        return build_embedded(vocab_size, kind=config.tokenizer or "bpe", large=config.data_path != "embedded")
    directory = ROOT / config.data_path
    if not directory.is_dir():
        raise DataError(f"data_path={config.data_path}: no folder {directory}; 'embedded' needs none")
    return directory


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextmanager
def _saying(what: str) -> Iterator[None]:
    """Print what is being done, then its seconds on the same line."""
    start = time.perf_counter()
    print(f"{what} …", end=" ", flush=True)
    yield
    print(f"{time.perf_counter() - start:.1f} s", flush=True)
