"""Documents to a folder of shards with their tokenizer: streamed, on all cores, resumed after a kill.

Workers are threads: SentencePiece releases the interpreter lock while it encodes, and parsing and hashing in Python are
a twentieth of the work.
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cache
from itertools import starmap
from pathlib import Path

from sentencepiece import SentencePieceNormalizer
from tqdm import tqdm

from pgolf.data import dataset, train_tokenizer
from pgolf.data.documents import START, Block, Source, first_texts
from pgolf.data.shard_writer import Encoded, SplitWriter
from pgolf.data.tokenizers import NAMES, NORMALIZATION, Tokenizer, load, normalizer
from pgolf.disk import check_space, checksum, exclusive, explain_disk_errors, read_json
from pgolf.processes import interactive
from pgolf_core.files import DataError, atomic_write
from pgolf_core.shards import SHARD_TOKENS

PROGRESS = "progress.json"
PROGRESS_SECONDS = 5.0  # between two records, so the most work that a kill loses
MAX_WAITING = 1 << 26  # bytes of documents read but not written, unless a single one is larger
MAX_VOCABULARY = 1 << 16  # shards are uint16

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
    shard_tokens: int = SHARD_TOKENS

    def __post_init__(self):
        if bool(self.val_documents) == bool(self.val_share):
            raise DataError("validation documents: set either val_documents (the first so many) or val_share")
        if not 0 <= self.val_share < 1:
            raise DataError(f"val_share={self.val_share}: a share of the documents, like 0.01")
        if self.documents and self.val_documents >= self.documents:
            left = f"no document of documents={self.documents} is left to train on"
            raise DataError(f"val_documents={self.val_documents}: {left}")
        if self.tokenizer_path:
            tokenizer = load(self.tokenizer_path)
            if tokenizer.vocab_size > MAX_VOCABULARY or tokenizer.bos < 0:
                raise DataError(f"tokenizer_path: {self.tokenizer_path} has no BOS, or vocab_size > {MAX_VOCABULARY}")
        else:
            train_tokenizer.check(self.kind, self.vocab_size)
            if self.vocab_size > MAX_VOCABULARY:
                raise DataError(f"vocab_size={self.vocab_size}: shards hold tokens of vocab_size <= {MAX_VOCABULARY}")

    def describe(self, source: Source) -> dict:
        """`source` of dataset.json: everything that decides the content of the folder."""
        if self.tokenizer_path:
            tokenizer = {"sha256": checksum(Path(self.tokenizer_path))}
        else:
            tokenizer = {"kind": self.kind, "vocab_size": self.vocab_size}
            if self.kind != "bytes":
                tokenizer |= {"documents": self.tokenizer_documents, "sees_val": self.tokenizer_sees_val}
        split = {"val_share": self.val_share}
        if self.val_documents:
            split = {"val_documents": self.val_documents, "keep_overlap": self.keep_overlap}
        about = source.about() | {"documents_taken": self.documents} | split
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
    with explain_disk_errors(directory), exclusive(directory):
        if not _finished(directory, source, asked):
            staging = directory.with_name(f"{directory.name}.unfinished")
            record = _resume_or_start(staging, asked, source)
            choose = _choice(source, asked)
            tokenizer = _tokenizer(source, staging, request, choose)
            figures = _write_shards(source, staging, tokenizer, choose, record, workers or os.cpu_count() or 1)
            figures["train"] |= {"left_out": record["left_out"]} if request.val_documents else {}
            dataset.describe(staging, source=asked, **figures, **(about or {}))
            os.replace(staging, directory)
        (directory / PROGRESS).unlink(missing_ok=True)  # last, so that a killed build is complete or resumed
    built = dataset.Dataset.open(directory).about
    train, val = built["train"], built["val"]
    left_out = f" ({train['left_out']:,} left out: validation documents too)" if train.get("left_out") else ""
    print(
        f"{directory}: {train['tokens']:,} training tokens of {train['documents']:,} documents "
        f"({train['text_bytes']:,} bytes){left_out}, {val['tokens']:,} validation tokens of {val['documents']:,} "
        f"({val['text_bytes']:,} bytes)",
        flush=True,
    )
    return directory


def validation_texts(source: Source, asked: dict) -> Iterator[str]:
    """Texts of the validation split of a folder made from `source`; asked: `source` of its dataset.json."""
    choose = _choice(source, asked | {"keep_overlap": True})
    texts = first_texts(source, asked.get("val_documents") or asked["documents_taken"])
    return (text for number, text in enumerate(texts) if choose(number, _identity(text)) == "val")


def _finished(directory: Path, source: Source, asked: dict) -> bool:
    """True if the folder is as asked for, False if there is none. DataError if it is something else."""
    if not directory.exists():
        return False
    description = directory / dataset.DESCRIPTION
    if not description.exists():
        raise DataError(f"{directory} exists without a complete corpus; delete it or name another folder")
    found = dataset.Dataset.open(directory).about.get("source", {})
    if found != asked:
        raise DataError(f"{directory} was made otherwise: {_differences(found, asked)}; delete it or name another")
    if source.modified() > description.stat().st_mtime_ns:
        name = asked["name"]
        print(f"{directory}: {name} was written to since; delete the folder to make it of {name} as it is now")
    return True


def _differences(found: dict, asked: dict) -> str:
    names = [name for name in {**found, **asked} if found.get(name) != asked.get(name)]
    return ", ".join(f"{name} {found.get(name, 'none')} (asked: {asked.get(name, 'none')})" for name in names)


def _resume_or_start(staging: Path, asked: dict, source: Source) -> dict:
    """The last progress record of a build with the same arguments, or the first one of a new one in an empty folder."""
    for torn in staging.glob(".*.tmp"):  # left by a killed process
        torn.unlink()
    asked = asked | {"modified": source.modified()}
    if record := read_json(staging / PROGRESS):
        found = record["request"]
        if found == asked:
            if record["documents"]:
                print(f"{staging}: resuming after {record['documents']:,} documents", flush=True)
            return record
        # A touched file has another time and perhaps the same content: hours of work are not deleted for that.
        if record["documents"] and source.about().items() <= found.items():
            raise DataError(
                f"{staging}: holds {record['documents']:,} documents of another build ({_differences(found, asked)}); "
                "run that one again, which resumes it, delete this folder to start over, or name another"
            )
        print(f"{staging}: of another build ({_differences(found, asked)}); starting over", flush=True)
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir()
    start = {"request": asked, "position": START, "documents": 0, "left_out": 0, "train": {}, "val": {}}
    _write_record(staging, start)
    return start


def _write_record(staging: Path, record: dict) -> None:
    atomic_write(staging / PROGRESS, json.dumps(record))


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
    return _digest(_normalizer().normalize(text).encode())


@cache
def _normalizer() -> SentencePieceNormalizer:
    return normalizer(NORMALIZATION)


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _tokenizer(source: Source, staging: Path, request: BuildRequest, choose: Choice) -> Tokenizer:
    """The tokenizer in the folder, which is copied or trained first."""
    if own := next((staging / name for name in NAMES if (staging / name).exists()), None):
        return load(own)
    if path := request.tokenizer_path:
        return load(atomic_write(staging / NAMES[Path(path).suffix == ".json"], Path(path).read_bytes()))
    if request.kind == "bytes":
        return load(train_tokenizer.make([], staging, request.kind, request.vocab_size))
    start, failure = time.perf_counter(), None

    def texts() -> Iterator[str]:
        nonlocal failure
        number, empty = -1, True
        try:
            for number, text in enumerate(first_texts(source, request.tokenizer_documents)):
                if request.tokenizer_sees_val or choose(number, _identity(text)) == "train":
                    empty = False
                    yield text
            if empty:
                raise DataError(
                    f"{source.about()['name']}: of its first {number + 1:,} documents no document is left to train on; "
                    "set val_documents or val_share lower, or tokenizer_documents higher"
                )
        except DataError as error:  # SentencePiece would replace its message
            failure = error
            raise

    print(f"training a tokenizer, vocab_size {request.vocab_size} …", end=" ", flush=True)
    try:
        with tempfile.TemporaryDirectory() as folder:  # an interrupted trainer leaves nothing beside the shards
            kind, vocab_size = request.kind, request.vocab_size
            made = _interruptible(lambda: train_tokenizer.make(texts(), Path(folder), kind, vocab_size))
            made = atomic_write(staging / made.name, made.read_bytes())
    except DataError as error:
        raise failure or error from None
    print(f"{time.perf_counter() - start:.1f} s", flush=True)
    return load(made)


def _interruptible(function: Callable[[], Path]) -> Path:
    """The function's result, computed in a thread: Ctrl-C would otherwise wait minutes for SentencePiece."""
    future = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    while not future.done():  # Windows handles Ctrl-C only between two waits
        wait([future], timeout=0.2)
    return future.result()


def _write_shards(
    source: Source, staging: Path, tokenizer: Tokenizer, choose: Choice, record: dict, workers: int
) -> dict[str, dict]:
    """Write all shards, continuing after the record, which is kept up to date; returns the figures of each split."""
    wanted, shard_tokens = record["request"]["documents_taken"], record["request"]["shard_tokens"]
    number, recorded = record["documents"], time.monotonic()
    blocks = source.blocks(tuple(record["position"])) if not wanted or number < wanted else []
    results = _in_order(lambda block: _encode(block, tokenizer), blocks, workers)
    bar = tqdm(
        total=wanted or source.size, initial=number if wanted else 0, desc=staging.stem,
        unit="doc" if wanted else "B", unit_scale=True, disable=not interactive(),
        file=sys.stdout if "ipykernel" in sys.modules else sys.stderr,
    )  # fmt: skip
    with ExitStack() as stack:
        splits = [SplitWriter(staging, name, shard_tokens, record[name]) for name in dataset.SPLITS]
        for context in (*map(closing, splits), bar, closing(results)):
            stack.enter_context(context)
        for block, documents in results:
            documents = documents[: wanted - number] if wanted else documents
            if number == 0 and documents:
                _check_space(staging, source, wanted, block, documents)
            chosen = [choose(i, document.identity) for i, document in enumerate(documents, number)]
            for split in splits:
                split.add([each for each, name in zip(documents, chosen, strict=True) if name == split.name])
            number += len(documents)
            record["left_out"] += chosen.count(None)
            bar.update((number if wanted else block.done) - bar.n)
            if time.monotonic() - recorded >= PROGRESS_SECONDS:
                record |= {"position": block.end, "documents": number}
                _write_record(staging, record | {split.name: split.synced() for split in splits})
                recorded = time.monotonic()
            if wanted and number == wanted:
                break
    train, val = (split.figures for split in splits)
    if not train["documents"] or not val["documents"]:
        raise DataError(
            f"{source.about()['name']}: {number:,} documents give {train['documents']:,} for training and "
            f"{val['documents']:,} for validation, and both need some; set val_documents or val_share accordingly"
        )
    return {"train": train, "val": val}


def _encode(block: Block, tokenizer: Tokenizer) -> list[Encoded]:
    texts = block.texts()
    contents = [text.encode() for text in texts]
    rows = zip(map(_digest, contents), map(len, contents), tokenizer.encode(texts), map(_identity, texts), strict=True)
    return list(starmap(Encoded, rows))


def _in_order(function: Callable, blocks: Iterable[Block], workers: int) -> Iterator[tuple[Block, list[Encoded]]]:
    """Blocks with the function's results, in order; workers read a few blocks ahead."""
    pool = ThreadPoolExecutor(workers)
    waiting, size = deque(), 0
    try:
        for block in blocks:
            waiting.append((block, pool.submit(function, block)))
            size += block.size
            while len(waiting) > 2 * workers or (size > MAX_WAITING and len(waiting) > 1):
                block, future = waiting.popleft()
                yield block, future.result()
                size -= block.size
        while waiting:
            block, future = waiting.popleft()
            yield block, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _check_space(staging: Path, source: Source, wanted: int, block: Block, documents: list[Encoded]) -> None:
    """Estimate the whole folder from its first block."""
    written = 2 * sum(len(document.tokens) for document in documents)
    needed = written * source.size // max(block.done, 1)
    if wanted:
        needed = min(needed, written * wanted // len(documents))
    check_space(staging, needed, "the whole folder, judging by its first documents,")
