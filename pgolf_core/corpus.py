"""Where text comes from: the embedded corpus, made of docstrings that are on this machine already."""

from __future__ import annotations

import ast
import gc
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
from filelock import FileLock

from pgolf_core.config import ROOT, DataConfig
from pgolf_core.data import DataError, load_sentencepiece, write_shard
from pgolf_core.files import write_whole

PACKAGES = ("torch", "sympy", "pandas", "networkx", "numpy", "matplotlib")
VALIDATION_DOCUMENTS = 200
MIN_DOCSTRING = 200  # characters; shorter ones are mostly one-line summaries
SHARD_TOKENS = 100_000_000
BOS = 1


class Document(NamedTuple):
    name: str
    text: str


# The embedded corpus


def embedded_documents() -> list[Document]:
    """One document a module of PACKAGES: its docstrings, each in the first document that has it.

    The order is that of the hashed module names: the same on every machine, and any stretch of documents
    holds something of every package. The packages are read, not imported.
    """
    documents, seen = [], set()
    collecting = gc.isenabled()
    gc.disable()  # syntax trees are millions of objects that hold no cycles: a quarter of the time saved
    try:
        for name, path in sorted(_modules(), key=lambda m: (_sha256(m[0].encode()), m[1].name)):
            fresh = [text for text in dict.fromkeys(_docstrings(path)) if text not in seen]
            seen.update(fresh)
            if fresh:
                documents.append(Document(name, "\n\n".join(fresh)))
    finally:
        if collecting:
            gc.enable()
    return documents


def _modules() -> Iterator[tuple[str, Path]]:
    """Dotted name and source file of every module of PACKAGES."""
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise DataError(f"the embedded corpus is made of {package}, among others; pip install {package}")
        folder = Path(spec.submodule_search_locations[0])
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder.parent).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def _docstrings(path: Path) -> list[str]:
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
            if text and len(text) > MIN_DOCSTRING:
                texts.append(text)
        # Statements only: ast.walk would visit every expression too.
        for field in ("finalbody", "orelse", "cases", "handlers", "body"):
            below = getattr(node, field, None)
            if isinstance(below, list):
                todo.extend(reversed(below))
    return texts


def build_embedded(vocab_size: int, directory: str | Path | None = None) -> Path:
    """Folder of shards and tokenizer of the embedded corpus; built when it is not there, whole or not at all.

    Default folder: data/embedded_sp<vocab_size>. Raises DataError when it was built from other packages.
    """
    directory = Path(directory or ROOT / "data" / f"embedded_sp{vocab_size}")
    if not (directory / "dataset.json").exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(directory.with_name(f"{directory.name}.lock")):
            if not (directory / "dataset.json").exists():  # nobody built it while we waited
                with _saying(f"embedded corpus: reading the docstrings of {', '.join(PACKAGES)}"):
                    documents = embedded_documents()
                train, val = documents[VALIDATION_DOCUMENTS:], documents[:VALIDATION_DOCUMENTS]
                build(train, val, vocab_size, directory, versions=_versions())
    built = json.loads((directory / "dataset.json").read_text(encoding="utf-8"))
    if built["vocab_size"] != vocab_size:
        raise DataError(f"{directory}: built for vocab_size={built['vocab_size']}, not {vocab_size}")
    then, now = built["versions"], _versions()
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


def _versions() -> dict[str, str]:
    """Of everything that decides the shards; torch's '+cpu' and '+cu130' have the same docstrings."""
    return {name: importlib.metadata.version(name).partition("+")[0] for name in (*PACKAGES, "sentencepiece")}


def resolve(config: DataConfig, vocab_size: int) -> Path:
    """Folder that data_path names; 'embedded' is built when it is not there yet."""
    if config.data_path == "embedded":
        return build_embedded(vocab_size)
    directory = ROOT / config.data_path
    if not directory.is_dir():
        raise DataError(f"data_path={config.data_path}: no folder {directory}; 'embedded' needs none")
    return directory


# From documents to shards


def build(
    train: Sequence[Document], val: Sequence[Document], vocab_size: int, directory: Path, **about: object
) -> None:
    """Make a folder of tokenizer.model, shards and dataset.json from documents; it appears when complete.

    The caller holds the folder's lock. `about` goes into dataset.json as it is.
    """
    if directory.exists():
        raise DataError(f"{directory} is there without a complete corpus; delete it or name another folder")
    unfinished = directory.with_name(f"{directory.name}.unfinished")
    if unfinished.exists():  # of a build that was killed
        shutil.rmtree(unfinished)
    unfinished.mkdir(parents=True)
    tokenizer_path = unfinished / "tokenizer.model"
    about |= {"vocab_size": vocab_size}
    with _saying(f"training a tokenizer of {vocab_size} pieces on {len(train)} documents"):
        train_tokenizer(train, tokenizer_path, vocab_size)
    for split, documents in (("train", train), ("val", val)):
        with _saying(f"writing the {split} shards"):
            tokens = tokenize(documents, tokenizer_path)
            for i, start in enumerate(range(0, len(tokens), SHARD_TOKENS)):
                write_shard(unfinished / f"fineweb_{split}_{i:06d}.bin", tokens[start : start + SHARD_TOKENS])
        about[split] = {
            "documents": len(documents),
            "text_bytes": sum(len(document.text.encode()) for document in documents),
            "tokens": len(tokens),
            "documents_sha256": _sha256(json.dumps(documents).encode()),
        }
    write_whole(unfinished / "dataset.json", json.dumps(about, indent=1))
    os.replace(unfinished, directory)
    train_size, val_size = about["train"], about["val"]
    print(
        f"{directory}: {train_size['tokens']:,} training tokens of {train_size['documents']:,} documents "
        f"({train_size['text_bytes']:,} bytes), {val_size['tokens']:,} validation tokens of "
        f"{val_size['documents']:,} ({val_size['text_bytes']:,} bytes)"
    )


def train_tokenizer(documents: Sequence[Document], path: Path, vocab_size: int) -> None:
    """Train SentencePiece BPE as the reference does and write the model; same documents, same bytes."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            # Whole documents, as they will be encoded: cut into lines, words at a line's start would be seen
            # without their space, which costs 2.4 % more tokens. U+2585 is SentencePiece's own mark for
            # unknown text, and a document with it would be left out.
            sentence_iterator=(document.text.replace("\u2585", " ") for document in documents),
            max_sentence_length=2**30,  # bytes; the default leaves out documents of more than 4192
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=0.999,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="nmt_nfkc",
            add_dummy_prefix=False,
            pad_id=0,
            bos_id=BOS,
            eos_id=2,
            unk_id=3,
            hard_vocab_limit=False,
            num_threads=2,  # fixed: the model file records it
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(f"vocab_size={vocab_size}: no such tokenizer of this text: {error}") from error
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
    if pieces != vocab_size:
        raise DataError(f"vocab_size={vocab_size}: this text gives no more than {pieces} pieces")
    write_whole(path, model.getvalue())


def tokenize(documents: Sequence[Document], tokenizer_path: Path) -> np.ndarray:
    """Tokens of all documents as one row, (n,) uint16, BOS before each."""
    sp = load_sentencepiece(tokenizer_path)
    encoded = sp.encode([document.text for document in documents], add_bos=True)
    return np.concatenate([np.array(ids, dtype=np.uint16) for ids in encoded])


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextmanager
def _saying(what: str) -> Iterator[None]:
    """Print what is being done, then its seconds on the same line."""
    start = time.perf_counter()
    print(f"{what} …", end=" ", flush=True)
    yield
    print(f"{time.perf_counter() - start:.1f} s", flush=True)
