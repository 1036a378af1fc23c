"""The embedded corpus: documents made of the docstrings of installed packages, and the data folder of a run."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from tokenize import open as open_source
from typing import NamedTuple

from pgolf.data import prepare, train_tokenizer
from pgolf.data.dataset import DESCRIPTION, read_about
from pgolf.data.documents import Texts
from pgolf.disk import exclusive, explain_disk_errors
from pgolf.processes import work_on_syntax_trees
from pgolf_core.config import ROOT, did_you_mean
from pgolf_core.files import DataError
from pgolf_core.knobs import EMBEDDED, DataConfig
from pgolf_core.shards import SHARD_TOKENS

PACKAGES = ("torch", "sympy", "pandas", "networkx", "numpy", "matplotlib")
# Packages of the large corpus: every package that pyproject.toml's dependencies install under a name of its own.
LARGE_PACKAGES = (
    *PACKAGES,
    *("scipy", "pydantic", "pydantic_settings", "yaml", "tqdm", "filelock", "psutil", "papermill", "ipykernel"),
    *("nbconvert", "huggingface_hub", "safetensors", "sentencepiece"),
)
VALIDATION_DOCUMENTS = 200
MIN_DOCSTRING = 200  # characters; shorter ones are mostly one-line summaries
LARGE_MIN_TEXT = 40  # characters, large corpus; shorter texts are mostly directives for tools
# Match strings before comments, so that a # inside a string is not taken for a comment.
LEXEME = re.compile(
    r"""(?:\"\"\"(?:[^\\]|\\.)*?\"\"\"|'''(?:[^\\]|\\.)*?'''|"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'|(\#[^\n]*))""",
    re.DOTALL,
)


class Document(NamedTuple):
    name: str
    text: str


def embedded_documents(large: bool = False) -> list[Document]:
    """One document per module of PACKAGES: its docstrings, without those of an earlier document.

    large: LARGE_PACKAGES, shorter docstrings and comments too. Documents are ordered by the hash of the module name:
    the same order on every machine, and every package is spread over the whole corpus. Sources are read, not imported.
    """
    documents, seen = [], set()
    modules = _modules(LARGE_PACKAGES if large else PACKAGES)
    with work_on_syntax_trees():
        for name, path in sorted(modules, key=lambda m: (hashlib.sha256(m[0].encode()).digest(), m[1].name)):
            texts = [*_docstrings(path, LARGE_MIN_TEXT), *_comments(path)] if large else _docstrings(path)
            unseen = [text for text in dict.fromkeys(texts) if text not in seen]
            seen.update(unseen)
            if unseen:
                documents.append(Document(name, "\n\n".join(unseen)))
    return documents


def _modules(packages: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """(dotted name, source file) of every module of the packages. DataError for a package that is not installed."""
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise DataError(f"the embedded corpus needs the docstrings of {package}; pip install {package}")
        folder = Path(spec.submodule_search_locations[0])
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder.parent).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def _docstrings(path: Path, min_length: int = MIN_DOCSTRING) -> list[str]:
    """Docstrings of a file's module, classes and functions, in source order, without indentation."""
    source = path.read_bytes()
    if b'"""' not in source and b"'''" not in source:  # saves a third of the time and loses no docstring
        return []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in the packages
            tree = ast.parse(source)
    except SyntaxError:  # torch has one file in Python 3.12 syntax; its docstring is short
        return []
    texts, todo = [], [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            texts.append(ast.get_docstring(node) or "")
        for field in ("finalbody", "orelse", "cases", "handlers", "body"):  # ast.walk would visit expressions too
            todo.extend(reversed(getattr(node, field, ())))
    return [text for text in texts if len(text) > min_length]


def _comments(path: Path) -> list[str]:
    """Comments of a file, in source order, without #; adjacent lines form one text."""
    try:
        with open_source(path) as f:
            source = f.read()
    except (SyntaxError, UnicodeDecodeError):  # unknown encoding, so not a module
        return []
    blocks, end = [], 0
    for match in LEXEME.finditer(source):
        if match[1] is None:
            continue
        between = source[end : match.start()]
        if not blocks or between.strip() or between.count("\n") > 1:
            blocks.append([])
        blocks[-1].append(match[1].lstrip("#").strip())
        end = match.end()
    return [text for text in map("\n".join, blocks) if len(text) > LARGE_MIN_TEXT]


def build_embedded(
    vocab_size: int, directory: str | Path | None = None, kind: str = "bpe", large: bool = False, transform: str = ""
) -> Path:
    """Folder with shards and tokenizer of the embedded corpus; built atomically if it does not exist.

    Default folder: data/embedded_sp1024, data/embedded_large_byte260 and so on. The tokenizer is trained on the
    training documents. transform: as in BuildRequest, of text that is normalised first: all tokenizers score the same.
    Raises DataError if the folder was built from other package versions or for another tokenizer.
    """
    train_tokenizer.check(kind, vocab_size)
    name = "embedded_large" if large else "embedded"
    made = "_".join(filter(None, [name, transform, train_tokenizer.name_of(kind, vocab_size)]))
    directory = Path(directory or ROOT / "data" / made)
    packages, described = LARGE_PACKAGES if large else PACKAGES, directory / DESCRIPTION
    if not described.exists():
        with explain_disk_errors(directory), exclusive(directory):  # build() takes the same lock again
            if not described.exists():  # another process may have built it meanwhile
                print(f"embedded corpus: reading the docstrings of {', '.join(packages)} …", flush=True)
                texts = [document.text for document in embedded_documents(large)]
                texts = [prepare.SPELLING.normalize(text).replace("▁", " ") for text in texts] if transform else texts
                options = dict(val_documents=VALIDATION_DOCUMENTS, tokenizer_documents=0, shard_tokens=SHARD_TOKENS)
                request = prepare.BuildRequest(kind, vocab_size, transform=transform, **options)
                prepare.build(Texts(texts, name), directory, request, about={"versions": _versions(packages)})
    built = read_about(directory)
    source = built.get("source", {"name": "embedded", "tokenizer": {"kind": "bpe"}})  # missing in the oldest folders
    found = {"vocab_size": built["vocab_size"], "tokenizer": source["tokenizer"]["kind"], "corpus": source["name"]}
    asked = {"vocab_size": vocab_size, "tokenizer": kind, "corpus": name, "transform": transform}
    found["transform"] = source.get("transform", "")
    for key, wanted in asked.items():
        if found[key] != wanted:
            raise DataError(f"{directory}: built for {key}={found[key]}, not {wanted}")
    then, now = built["versions"], _versions(packages)
    changed = [f"{key} {then.get(key)} (now {now.get(key)})" for key in then | now if then.get(key) != now.get(key)]
    if changed:
        raise DataError(
            f"{directory} was built from {', '.join(changed)}: the installed packages give another text, and scores "
            "on the two do not compare. Delete that folder to build it again, or keep its text with "
            f"data_path={directory}"
        )
    return directory


def _versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of everything that decides the shards, without torch's '+cpu', '+cu130': equal docstrings."""
    distributions = {name: {"yaml": "pyyaml"}.get(name, name) for name in (*packages, "sentencepiece")}
    return {key: importlib.metadata.version(name).partition("+")[0] for key, name in distributions.items()}


def resolve(config: DataConfig, vocab_size: int) -> Path:
    """Folder that data_path names; an embedded corpus is built first if needed. DataError without such a folder."""
    if config.data_path in EMBEDDED:
        large, transform = config.data_path != "embedded", config.text_transform
        return build_embedded(vocab_size, kind=config.tokenizer or "bpe", large=large, transform=transform)
    directory = ROOT / config.data_path
    if not directory.is_dir():
        beside = directory.parent.iterdir() if directory.parent.is_dir() else []
        known = [*EMBEDDED, *((Path(config.data_path).parent / other.name).as_posix() for other in beside)]
        nearest = did_you_mean(config.data_path, known) or "; 'embedded' needs none"
        raise DataError(f"data_path={config.data_path}: no folder {directory}{nearest}")
    return directory
