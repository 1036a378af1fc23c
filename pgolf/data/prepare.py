"""Documents to a folder of shards with their tokenizer: streamed, on all cores, resumed after a kill.

Workers are threads: SentencePiece releases the interpreter lock while it encodes, and parsing and hashing in Python are
a twentieth of the work.
"""

import json
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pgolf.data import dataset, tokenizers, train_tokenizer
from pgolf.data.documents import START, Block, Source, first_texts
from pgolf.data.shard_writer import Encoded, SplitWriter
from pgolf.data.tokenizers import NORMALIZATION, Bytes, CaseOps, Tokenizer
from pgolf.disk import checksum, exclusive, explain_disk_errors, read_json
from pgolf.processes import in_background, interactive
from pgolf_core.files import DataError, atomic_write
from pgolf_core.shards import SHARD_TOKENS

PROGRESS = "progress.json"
PROGRESS_SECONDS = 5.0  # between two records, so the most work that a kill loses
MAX_WAITING = 1 << 26  # bytes of the source read but not written, unless a single document is larger
SPELLING = Bytes(NORMALIZATION)
TRANSFORMS = ("", "caseops")

Choice = Callable[[int, bytes], str | None]  # number and identity of a document -> "train", "val", None: left out


@dataclass(frozen=True)
class BuildRequest:
    """Options of a folder of shards; equal options of equal sources give equal bytes.

    Validation is either the first val_documents, or a val_share of all: documents whose text has a low hash, so that
    equal texts are in one split. With val_documents, training documents with the text of a validation document are left
    out and counted, unless keep_overlap. The tokenizer is the file tokenizer_path, or trained on the first
    tokenizer_documents of the source (0: all), without those for validation unless tokenizer_sees_val.
    """

    kind: str = "bpe"
    vocab_size: int = 1024
    tokenizer_path: str | Path | None = None
    documents: int = 0  # the first so many; 0: all
    val_documents: int = 0
    val_share: float = 0.0
    tokenizer_documents: int = 500_000
    tokenizer_sees_val: bool = False
    keep_overlap: bool = False
    transform: str = ""  # "caseops": capitals as operators, exactly invertible; "": normalised text
    shard_tokens: int = SHARD_TOKENS

    def __post_init__(self):
        if bool(self.val_documents) == bool(self.val_share) or not 0 <= self.val_share < 1:
            given = f"val_documents={self.val_documents} and val_share={self.val_share}"
            raise DataError(f"{given}: set either val_documents (the first so many) or val_share (a share, like 0.01)")
        if 0 < self.documents <= self.val_documents:
            left = f"no document of documents={self.documents} is left to train on"
            raise DataError(f"val_documents={self.val_documents}: {left}")
        if self.transform not in TRANSFORMS or (self.transform and self.kind == "bytes"):
            raise DataError(f"transform={self.transform}: choose caseops, with the tokenizer bpe or unigram, or none")
        if self.tokenizer_path:
            tokenizer, limit = tokenizers.load(self.tokenizer_path), train_tokenizer.MAX_VOCABULARY
            if tokenizer.vocab_size > limit:
                raise DataError(f"tokenizer_path: {self.tokenizer_path} has vocab_size > {limit}")
            if isinstance(tokenizer, CaseOps) != (self.transform == "caseops"):
                has = "has the case operators: add" if isinstance(tokenizer, CaseOps) else "has no case operators for"
                raise DataError(f"tokenizer_path: {self.tokenizer_path} {has} --transform caseops")
        else:
            train_tokenizer.check(self.kind, self.vocab_size)

    def describe(self, source: Source) -> dict:
        """`source` of dataset.json: everything that decides the content of the folder."""
        split = {"val_documents": self.val_documents, "keep_overlap": self.keep_overlap}
        split = split if self.val_documents else {"val_share": self.val_share}
        tokenizer = {"kind": self.kind, "vocab_size": self.vocab_size}
        if self.tokenizer_path:
            tokenizer = {"sha256": checksum(Path(self.tokenizer_path))}
        elif self.kind != "bytes":
            tokenizer |= {"documents": self.tokenizer_documents, "sees_val": self.tokenizer_sees_val}
        about = source.about() | {"documents_taken": self.documents} | split
        about |= {"transform": self.transform} if self.transform else {}
        return about | {"tokenizer": tokenizer, "shard_tokens": self.shard_tokens}


def build(
    source: Source, directory: str | Path, request: BuildRequest, workers: int = 0, about: dict | None = None
) -> Path:
    """Folder of shards of a source, as requested; a finished folder is only checked. Raises DataError.

    Work is done in <directory>.unfinished; killed and called again with the same arguments, it ends with the same
    bytes. Neither workers (0: one per core) nor kills change them. `about` is added to dataset.json, whose
    documents_sha256 of a split is h after all of its documents, h = sha256(h + sha256(text)), from 32 zero bytes.
    """
    directory, asked = Path(directory), request.describe(source)
    if skipped := getattr(source, "skipped", ""):
        print(f"{asked['name']}: {skipped}", flush=True)
    with explain_disk_errors(directory), exclusive(directory):
        if directory.exists():
            _check_finished(directory, source, asked)
        else:
            staging = directory.with_name(f"{directory.name}.unfinished")
            record = _resume_or_start(staging, source, asked | {"modified": source.modified()})
            with _removed_if_refused(staging):
                choose = _choice(source, asked)
                tokenizer = _tokenizer(source, staging, request, choose)
                figures = _write_shards(source, staging, tokenizer, choose, record, workers or os.cpu_count() or 1)
            figures["train"] |= {"left_out": record["left_out"]} if request.val_documents else {}
            dataset.describe(staging, source=asked, **figures, **(about or {}))
            os.replace(staging, directory)
        (directory / PROGRESS).unlink(missing_ok=True)  # last, so that a killed build is complete or resumed
    built = dataset.Dataset.open(directory).about
    for split, what in (("train", "training"), ("val", "validation")):
        tokens, documents, size = (f"{built[split][name]:,}" for name in ("tokens", "documents", "text_bytes"))
        print(f"{directory}: {tokens} {what} tokens of {documents} documents ({size} bytes)", flush=True)
    if left_out := built["train"].get("left_out"):
        print(f"{directory}: {left_out:,} training documents left out: validation documents too", flush=True)
    return directory


@contextmanager
def _removed_if_refused(staging: Path) -> Iterator[None]:
    """On a DataError inside the block, remove a folder that holds no documents to resume from."""
    try:
        yield
    except DataError:
        if not (read_json(staging / PROGRESS) or {}).get("documents"):
            shutil.rmtree(staging, ignore_errors=True)
        raise


def validation_texts(source: Source, asked: dict) -> Iterator[str]:
    """Texts of the validation split of a folder made from `source`; asked: `source` of its dataset.json."""
    choose = _choice(source, asked | {"keep_overlap": True})
    texts = first_texts(source, asked.get("val_documents") or asked["documents_taken"])
    return (text for number, text in enumerate(texts) if choose(number, _identity(text)) == "val")


def _check_finished(directory: Path, source: Source, asked: dict) -> None:
    """DataError if a folder is not what is asked for."""
    found = dataset.read_about(directory).get("source", {})
    if found != asked:
        problem = f"was made otherwise: {_differences(found, asked)}" if found else "exists without a complete corpus"
        raise DataError(f"{directory} {problem}; delete {directory}, or name another folder")
    if source.modified() > (directory / dataset.DESCRIPTION).stat().st_mtime_ns:
        name = asked["name"]
        print(f"{directory}: {name} was written to since; delete the folder to make it of {name} as it is now")


def _differences(found: dict, asked: dict) -> str:
    names = [
        name for name in {**found, **asked} if (found.get(name) or 0) != (asked.get(name) or 0)
    ]  # False: as absent
    return ", ".join(f"{name} {found.get(name, 'none')} (asked: {asked.get(name, 'none')})" for name in names)


def _resume_or_start(staging: Path, source: Source, asked: dict) -> dict:
    """The last progress record of a build with the same arguments, or the first one of a new one in an empty folder.

    A touched file has another time and perhaps the same content: hours of work are not deleted for that.
    """
    record = read_json(staging / PROGRESS)
    then = record["request"] if record else {}
    touched = then != asked and then | {"modified": 0} == asked | {"modified": 0}
    if record and (then == asked or (touched and record.get("content") == source.content())):
        if record["documents"]:
            print(f"{staging}: resuming after {record['documents']:,} documents", flush=True)
        return record | {"request": asked}
    if record and record["documents"]:
        problem = f"{staging}: holds {record['documents']:,} documents of another build ({_differences(then, asked)})"
        if source.about().items() <= then.items():
            todo = "run that one again, which resumes it, delete this folder to start over, or name another"
            raise DataError(f"{problem}; {todo}")
        print(f"{problem}; starting over", flush=True)
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir()
    record = {"request": asked, "position": START, "documents": 0, "left_out": 0, "train": {}, "val": {}}
    record["content"] = source.content()
    atomic_write(staging / PROGRESS, json.dumps(record))
    return record


def _choice(source: Source, asked: dict) -> Choice:
    if "val_share" in asked:
        below = int(asked["val_share"] * 2**64)
        return lambda number, identity: "val" if int.from_bytes(identity[:8], "big") < below else "train"
    val_documents, held_out = asked["val_documents"], set()
    if not asked["keep_overlap"]:
        held_out = {_identity(text) for text in first_texts(source, val_documents)}
    return lambda number, identity: "val" if number < val_documents else None if identity in held_out else "train"


def _identity(text: str) -> bytes:
    """sha256 of the normalised text: equal for texts that the tokenizers made here spell alike."""
    return sha256(SPELLING.normalize(text).encode()).digest()


def _tokenizer(source: Source, staging: Path, request: BuildRequest, choose: Choice) -> Tokenizer:
    """The tokenizer in the folder, which is copied or trained first."""
    own = tokenizers.beside(staging)
    if not own:
        if given := request.tokenizer_path:
            is_json, content = Path(given).suffix == ".json", Path(given).read_bytes()
        else:
            is_json, content = request.kind == "bytes", _train_tokenizer(source, request, choose)
        own = atomic_write(staging / tokenizers.NAMES[is_json], content)
    return tokenizers.load(own)


def _train_tokenizer(source: Source, request: BuildRequest, choose: Choice) -> bytes:
    if request.kind == "bytes":
        return train_tokenizer.train([], request.kind, request.vocab_size)
    texts = (
        text
        for number, text in enumerate(first_texts(source, request.tokenizer_documents))
        if request.tokenizer_sees_val or choose(number, _identity(text)) == "train"
    )
    if (first := next(texts, None)) is None:
        raise DataError(
            f"{source.about()['name']}: no document of tokenizer_documents={request.tokenizer_documents} is left to "
            "train on; set val_documents or val_share lower, or tokenizer_documents higher"
        )
    print(f"training a tokenizer, vocab_size {request.vocab_size} …", end=" ", flush=True)
    start = time.perf_counter()
    options = request.kind, request.vocab_size, request.transform
    made = in_background(train_tokenizer.train, chain([first], texts), *options)
    while not made.done():  # Ctrl-C would wait minutes for SentencePiece; Windows handles it only between two waits
        wait([made], timeout=0.2)
    content = made.result()
    print(f"{time.perf_counter() - start:.1f} s", flush=True)
    return content


def _write_shards(
    source: Source, staging: Path, tokenizer: Tokenizer, choose: Choice, record: dict, workers: int
) -> dict[str, dict]:
    """Write all shards, continuing after the record, which is kept up to date; returns the figures of each split."""
    wanted, shard_tokens = record["request"]["documents_taken"], record["request"]["shard_tokens"]
    number, recorded = record["documents"], time.monotonic()
    names = [*dataset.SPLITS, dataset.SIDECAR] if isinstance(tokenizer, CaseOps) else dataset.SPLITS
    splits = [SplitWriter(staging, name, shard_tokens, record.get(name, {})) for name in names]
    encoded = _in_order(source.blocks(tuple(record["position"])), tokenizer, workers)
    bar = tqdm(
        total=wanted or source.size, initial=number if wanted else 0, desc=staging.stem,
        unit="doc" if wanted else "B", unit_scale=True, disable=not interactive(),
        file=sys.stdout if "ipykernel" in sys.modules else sys.stderr,  # a notebook shows stderr in red
    )  # fmt: skip
    with bar, closing(encoded):
        for block, future in encoded:
            documents = future.result()[: wanted - number if wanted else None]
            chosen = [choose(i, document.identity) for i, document in enumerate(documents, number)]
            for split in splits:
                of = "val" if split.name == dataset.SIDECAR else split.name
                own = [each for each, name in zip(documents, chosen, strict=True) if name == of]
                split.add(own if of == split.name else [each._replace(tokens=each.text_bytes) for each in own])
            number += len(documents)
            record["left_out"] += chosen.count(None)
            bar.update((number if wanted else block.done) - bar.n)
            if time.monotonic() - recorded >= PROGRESS_SECONDS:
                record |= {"position": block.end, "documents": number}
                record |= {split.name: split.synced() for split in splits}
                atomic_write(staging / PROGRESS, json.dumps(record))
                recorded = time.monotonic()
            if wanted and number == wanted:
                break
    train, val, *_ = [split.synced() for split in splits]
    if not train["documents"] or not val["documents"]:
        raise DataError(
            f"{source.about()['name']}: {number:,} documents give {train['documents']:,} for training and "
            f"{val['documents']:,} for validation, and both need some; set val_documents or val_share accordingly"
        )
    return {"train": train, "val": val}


def _in_order(
    blocks: Iterable[Block], tokenizer: Tokenizer, workers: int
) -> Iterator[tuple[Block, "Future[list[Encoded]]"]]:
    """Blocks with their encoded documents, in order; workers read a few blocks ahead."""
    pool, waiting = ThreadPoolExecutor(workers), deque()
    try:
        for block in blocks:
            waiting.append((block, pool.submit(_encode, block, tokenizer)))
            while len(waiting) > 2 * workers or block.done - waiting[0][0].done > MAX_WAITING:
                yield waiting.popleft()
        yield from waiting
    finally:
        pool.shutdown(cancel_futures=True)


def _encode(block: Block, tokenizer: Tokenizer) -> list[Encoded]:
    texts = block.texts()
    contents, rows = [text.encode() for text in texts], tokenizer.encode(texts)
    sizes = _proven_sizes(texts, contents, rows, tokenizer) if isinstance(tokenizer, CaseOps) else [None] * len(texts)
    return [
        Encoded(sha256(content).digest(), len(content), tokens, _identity(text), size)
        for text, content, tokens, size in zip(texts, contents, rows, sizes, strict=True)
    ]


def _proven_sizes(
    texts: list[str], contents: list[bytes], rows: list[np.ndarray], tokenizer: CaseOps
) -> list[np.ndarray]:
    """Bytes of original text of every token. DataError unless every document comes back from its tokens."""
    sizes = [tokenizer.text_bytes(tokens) for tokens in rows]
    again = tokenizer.decode([tokens.tolist() for tokens in rows])
    for text, content, back, size in zip(texts, contents, again, sizes, strict=True):
        if back != text or size.sum(dtype=np.int64) != len(content):
            at = next((i for i, pair in enumerate(zip(text, back, strict=False)) if len({*pair}) == 2), len(back))
            where = f"a document does not come back from its tokens, at “{text[max(0, at - 20) :][:40]}”"
            raise DataError(f"transform=caseops: {where}; tokenizer_path names a tokenizer that alters text: train one")
    return sizes
