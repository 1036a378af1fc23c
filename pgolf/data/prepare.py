"""Documents → a folder of shards with their tokenizer: streamed, on every core, and gone on with where it was killed.

Workers are threads: SentencePiece lets go of the interpreter while it encodes, and what remains for Python, parsing and
hashing, is a twentieth of the work. They share one tokenizer, and end with their process however that ends.
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
from contextlib import closing
from functools import cache
from pathlib import Path

import numpy as np
from sentencepiece import SentencePieceNormalizer
from tqdm import tqdm

from pgolf.data import dataset, train_tokenizer
from pgolf.data.documents import START, Block, Source, first_texts
from pgolf.disk import check_space, checksum, exclusive, explain_disk_errors
from pgolf.processes import interactive
from pgolf_core import tokens as tokenizer
from pgolf_core.files import DataError, atomic_write
from pgolf_core.shards import HEADER_BYTES, SHARD_TOKENS, header

PROGRESS = "progress.json"
PROGRESS_SECONDS = 5.0  # between two records: as much work is lost at most
MAX_WAITING = 1 << 26  # bytes of documents that are read and not yet written, unless a single one has more
MAX_VOCABULARY = 1 << 16  # shards are uint16

Choice = Callable[[int, bytes], str | None]  # number and identity of a document -> train, val, or left out


def build(
    source: Source,
    directory: str | Path,
    *,
    kind: str = "bpe",
    vocab_size: int = 1024,
    tokenizer_path: str | Path | None = None,
    documents: int = 0,
    val_documents: int = 0,
    val_share: float = 0.0,
    tokenizer_documents: int = 500_000,
    tokenizer_sees_val: bool = False,
    keep_overlap: bool = False,
    workers: int = 0,
    shard_tokens: int = SHARD_TOKENS,
    about: dict | None = None,
) -> Path:
    """Folder of shards of the first documents of a source (0: all); nothing is done when it is there already.

    Validation: the first val_documents, or a val_share of all, those whose text has a low hash, so that equal texts
    are in one split. With val_documents, training documents whose text is a validation document's too are left out and
    counted, unless keep_overlap. The tokenizer is the one at tokenizer_path, or made of the first tokenizer_documents
    of the source (0: all), those for training, or with tokenizer_sees_val all of them. `about` goes into dataset.json.

    Work goes on in <directory>.unfinished; killed and called again with the same arguments, it ends with the same
    bytes. Neither workers (0: one a core) nor kills change them. documents_sha256 of a split is h after all of its
    documents, where h = sha256(h + sha256(text)), from 32 zeros. Raises DataError.
    """
    directory = Path(directory)
    if bool(val_documents) == bool(val_share):
        raise DataError("validation documents: set either val_documents (the first so many) or val_share")
    if not 0 <= val_share < 1:
        raise DataError(f"val_share={val_share}: a share of the documents, like 0.01")
    if documents and val_documents >= documents:
        raise DataError(f"val_documents={val_documents}: no document of documents={documents} is left to train on")
    if tokenizer_path:
        loaded = tokenizer.load(tokenizer_path)
        if loaded.vocab_size > MAX_VOCABULARY or loaded.bos < 0:
            raise DataError(f"tokenizer_path: {tokenizer_path} has no BOS, or more than {MAX_VOCABULARY} pieces")
        made_of = {"sha256": checksum(Path(tokenizer_path))}
    else:
        train_tokenizer.check(kind, vocab_size)
        if vocab_size > MAX_VOCABULARY:
            raise DataError(f"vocab_size={vocab_size}: shards hold tokens of at most {MAX_VOCABULARY} pieces")
        made_of = {"kind": kind, "vocab_size": vocab_size}
        if kind != "bytes":
            made_of |= {"documents": tokenizer_documents, "sees_val": tokenizer_sees_val}
    request = source.about() | {"documents_taken": documents}
    if val_documents:
        request |= {"val_documents": val_documents, "keep_overlap": keep_overlap}
    else:
        request |= {"val_share": val_share}
    request |= {"tokenizer": made_of, "shard_tokens": shard_tokens}

    with explain_disk_errors(directory), exclusive(directory):
        if not _finished(directory, source, request):
            staging = directory.with_name(f"{directory.name}.unfinished")
            for torn in staging.glob(".*.tmp"):  # of a process that was killed as it wrote
                torn.unlink()
            record = _record_to_go_on_from(staging, request, source)
            if not (staging / dataset.DESCRIPTION).exists() or (staging / PROGRESS).exists():
                choose = _choice(source, request)
                loaded = _tokenizer(source, staging, tokenizer_path, made_of, choose)
                splits = _write_shards(source, staging, loaded, choose, record, workers or os.cpu_count() or 1)
                figures = {split.name: split.figures() for split in splits}
                figures["train"] |= {"left_out": record["left_out"]} if val_documents else {}
                dataset.describe(staging, source=request, **figures, **(about or {}))
                (staging / PROGRESS).unlink()
            os.replace(staging, directory)
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


# What is there already


def validation_texts(source: Source, request: dict) -> Iterator[str]:
    """Of a folder's source, the texts that were made its validation split. request: `source` in its dataset.json."""
    choose = _choice(source, request | {"keep_overlap": True})
    texts = first_texts(source, request.get("val_documents") or request["documents_taken"])
    return (text for number, text in enumerate(texts) if choose(number, _identity(text)) == "val")


def _finished(directory: Path, source: Source, request: dict) -> bool:
    """Whether the folder is what is asked for. DataError where it is something else."""
    if not directory.exists():
        return False
    if not (directory / dataset.DESCRIPTION).exists():
        raise DataError(f"{directory} is there without a complete corpus; delete it or name another folder")
    there = dataset.Dataset.open(directory).about.get("source", {})
    if there != request:
        raise DataError(f"{directory} was made otherwise: {_differences(there, request)}; delete it or name another")
    if source.modified() > (directory / dataset.DESCRIPTION).stat().st_mtime_ns:
        name = request["name"]
        print(f"{directory}: {name} was written to since; delete the folder to make it of {name} as it is now")
    return True


def _differences(there: dict, asked: dict) -> str:
    names = [name for name in {**there, **asked} if there.get(name) != asked.get(name)]
    return ", ".join(f"{name} {there.get(name, 'none')} (asked: {asked.get(name, 'none')})" for name in names)


def _record_to_go_on_from(staging: Path, request: dict, source: Source) -> dict:
    """What a build of the same request last recorded in the folder, or a first record in an empty one."""
    modified = source.modified()
    fresh = {"request": request, "modified": modified, "position": START, "done": 0, "documents": 0, "left_out": 0}
    fresh |= {"train": {}, "val": {}}
    try:
        if not (staging / PROGRESS).exists():  # killed right before the folder got its name
            complete = json.loads((staging / dataset.DESCRIPTION).read_text(encoding="utf-8"))
            record = fresh | {"request": complete.get("source")}
        else:
            record = json.loads((staging / PROGRESS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = {}
    if record:
        there, asked = record["request"] | {"modified": record["modified"]}, request | {"modified": modified}
        if there == asked:
            if record["documents"]:
                print(f"{staging}: going on after {record['documents']:,} documents", flush=True)
            return record
        changed = _differences(there, asked)
        same_source = all(there.get(name) == asked[name] for name in (*source.about(), "modified"))
        if record["documents"] and same_source:  # of a source that changed there is nothing to go on with
            raise DataError(
                f"{staging}: holds {record['documents']:,} documents of another build ({changed}); run that one again, "
                "which goes on with them, delete this folder, or name another"
            )
        print(f"{staging}: of another build ({changed}); starting anew", flush=True)
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir()
    _write_record(staging, fresh)
    return fresh


def _write_record(staging: Path, record: dict) -> None:
    atomic_write(staging / PROGRESS, json.dumps(record))


# Splits and tokenizer


def _choice(source: Source, request: dict) -> Choice:
    if "val_share" in request:
        below = int(request["val_share"] * 2**64)
        return lambda number, identity: "val" if int.from_bytes(identity[:8], "big") < below else "train"
    val_documents, held_out = request["val_documents"], set()
    if not request["keep_overlap"]:
        held_out = {_identity(text) for text in first_texts(source, val_documents)}
    return lambda number, identity: "val" if number < val_documents else None if identity in held_out else "train"


def _identity(text: str) -> bytes:
    """The same for texts that tokens spell alike, whatever tokenizer is made here."""
    return _digest(_normalizer().normalize(text).encode())


@cache
def _normalizer() -> SentencePieceNormalizer:
    return tokenizer.normalizer(tokenizer.NORMALIZATION)


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _tokenizer(
    source: Source, staging: Path, path: str | Path | None, made_of: dict, choose: Choice
) -> tokenizer.Tokenizer:
    """The tokenizer in the folder, put there first."""
    there = next((staging / name for name in tokenizer.NAMES if (staging / name).exists()), None)
    if there:
        return tokenizer.load(there)
    if path:
        name = tokenizer.NAMES[Path(path).suffix == ".json"]
        return tokenizer.load(atomic_write(staging / name, Path(path).read_bytes()))
    kind, vocab_size = made_of["kind"], made_of["vocab_size"]
    if kind == "bytes":
        return tokenizer.load(train_tokenizer.make([], staging, kind, vocab_size))
    start, seen, count, failure = time.perf_counter(), 0, 0, None

    def texts() -> Iterator[str]:
        nonlocal seen, count, failure
        try:
            for number, text in enumerate(first_texts(source, made_of["documents"])):
                seen += 1
                if made_of["sees_val"] or choose(number, _identity(text)) == "train":
                    count += 1
                    yield text
        except DataError as error:  # SentencePiece would make a message of its own of it
            failure = error
            raise
        print(f"training a tokenizer of {vocab_size} pieces on {count:,} documents …", end=" ", flush=True)

    try:
        with tempfile.TemporaryDirectory() as folder:  # whoever was interrupted may write there, not beside the shards
            made = _interruptible(lambda: train_tokenizer.make(texts(), Path(folder), kind, vocab_size))
            atomic_write(staging / made.name, made.read_bytes())
    except DataError:
        if failure:
            raise failure from None
        if not count:
            raise DataError(
                f"{source.about()['name']}: of its first {seen:,} documents no document is left to train on; set "
                "val_documents or val_share lower, or tokenizer_documents higher"
            ) from None
        raise
    print(f"{time.perf_counter() - start:.1f} s", flush=True)
    return tokenizer.load(staging / made.name)


def _interruptible(function: Callable[[], Path]) -> Path:
    """What the function gives; Ctrl-C does not wait for it, as it would for SentencePiece, which takes minutes."""
    future = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    while not future.done():  # Windows hears of Ctrl-C only between two waits
        wait([future], timeout=0.2)
    return future.result()


# Tokens


class _Split:
    """The shards of a split while they grow, and what the documents in them amount to."""

    def __init__(
        self,
        directory: Path,
        name: str,
        shard_tokens: int,
        documents: int = 0,
        text_bytes: int = 0,
        tokens: int = 0,
        documents_sha256: str = "00" * 32,
    ):
        """Begin, or go on from these figures, whatever was written after they were recorded."""
        self.directory, self.name, self.shard_tokens = directory, name, shard_tokens
        self.documents, self.text_bytes, self.tokens = documents, text_bytes, tokens
        self.chain, self.file = bytes.fromhex(documents_sha256), None
        shards, rest = divmod(tokens, shard_tokens)
        there = {int(path.stem[-6:]): path for path in directory.glob(f"fineweb_{name}_*.bin")}
        for i in range(shards + (rest > 0)):
            if i not in there or there[i].stat().st_size < HEADER_BYTES + 2 * (shard_tokens if i < shards else rest):
                raise DataError(f"{directory}: shard {i} of {name} is not what was written; delete this folder")
        for i in there.keys() - range(shards + (rest > 0)):
            there[i].unlink()
        if rest:
            self._open(shards, "rb+")
            self.file.truncate(HEADER_BYTES + 2 * rest)
            self.file.seek(0, os.SEEK_END)

    def figures(self) -> dict:
        figures = {"documents": self.documents, "text_bytes": self.text_bytes, "tokens": self.tokens}
        return figures | {"documents_sha256": self.chain.hex()}

    def add(self, digests: list[bytes], sizes: list[int], rows: list[np.ndarray]) -> None:
        """Documents: sha256 and length of their UTF-8, and their tokens."""
        if not rows:
            return
        for digest in digests:
            self.chain = _digest(self.chain + digest)
        self.documents += len(rows)
        self.text_bytes += sum(sizes)
        tokens = np.concatenate(rows).astype("<u2", copy=False)
        while len(tokens):
            shard, offset = divmod(self.tokens, self.shard_tokens)
            if not offset:
                self.close()
                self._open(shard, "wb")
            part = tokens[: self.shard_tokens - offset]
            self.file.write(part.data)
            self.tokens += len(part)
            tokens = tokens[len(part) :]

    def sync(self) -> None:
        """On disk, before a record says so."""
        if self.file:
            self.file.flush()
            os.fsync(self.file.fileno())

    def close(self) -> None:
        """The last shard's header tells of its tokens as they are; until then each is of a full shard."""
        if self.file:
            with self.file:
                self._write_header((self.tokens - 1) % self.shard_tokens + 1)
                self.sync()
            self.file = None

    def drop(self) -> None:
        """Without another word: Windows keeps files that are open from being deleted."""
        if self.file:
            self.file.close()

    def _open(self, shard: int, mode: str) -> None:
        self.file = open(self.directory / f"fineweb_{self.name}_{shard:06d}.bin", mode)  # noqa: SIM115
        self._write_header(self.shard_tokens)

    def _write_header(self, tokens: int) -> None:
        self.file.seek(0)
        self.file.write(header(tokens))


def _write_shards(
    source: Source, staging: Path, loaded: tokenizer.Tokenizer, choose: Choice, record: dict, workers: int
) -> list[_Split]:
    """All shards in the folder, from where the record says on."""
    wanted, shard_tokens = record["request"]["documents_taken"], record["request"]["shard_tokens"]
    splits = [_Split(staging, name, shard_tokens, **record[name]) for name in dataset.SPLITS]
    number, recorded = record["documents"], time.monotonic()
    blocks = source.blocks(tuple(record["position"])) if not wanted or number < wanted else []
    results = _in_order(lambda block: _encode(block, loaded), blocks, workers)
    bar = tqdm(
        total=wanted or source.size, initial=number if wanted else record["done"], desc=staging.stem,
        unit="doc" if wanted else "B", unit_scale=True, disable=not interactive(),
        file=sys.stdout if "ipykernel" in sys.modules else sys.stderr,
    )  # fmt: skip
    try:
        with closing(results), bar:
            for block, documents in results:
                if wanted:
                    documents = documents[: wanted - number]
                if number == 0 and documents:
                    _check_space(staging, source, wanted, block, documents)
                chosen = [choose(i, identity) for i, (*_, identity) in enumerate(documents, number)]
                for split in splits:
                    mine = [document for document, name in zip(documents, chosen, strict=True) if name == split.name]
                    split.add(*([document[i] for document in mine] for i in range(3)))
                number += len(documents)
                record["left_out"] += chosen.count(None)
                bar.update((number if wanted else block.done) - bar.n)
                if time.monotonic() - recorded >= PROGRESS_SECONDS:
                    for split in splits:
                        split.sync()
                    record |= {"position": block.end, "done": block.done, "documents": number}
                    _write_record(staging, record | {split.name: split.figures() for split in splits})
                    recorded = time.monotonic()
                if wanted and number == wanted:
                    break
        for split in splits:
            split.close()
    finally:
        for split in splits:
            split.drop()
    train, val = splits
    if not train.documents or not val.documents:
        raise DataError(
            f"{source.about()['name']}: {number:,} documents give {train.documents:,} for training and "
            f"{val.documents:,} for validation, and both need some; set val_documents or val_share accordingly"
        )
    return splits


Encoded = list[tuple[bytes, int, np.ndarray, bytes]]  # of a document: sha256 and length of its UTF-8, tokens, identity


def _encode(block: Block, loaded: tokenizer.Tokenizer) -> Encoded:
    texts = block.texts()
    contents = [text.encode() for text in texts]
    rows = loaded.encode(texts)
    return [
        (_digest(content), len(content), row, _identity(text))
        for text, content, row in zip(texts, contents, rows, strict=True)
    ]


def _in_order(function: Callable, blocks: Iterable[Block], workers: int) -> Iterator[tuple[Block, Encoded]]:
    """Blocks with what the function makes of them, a few of them ahead of whoever takes them."""
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


def _check_space(staging: Path, source: Source, wanted: int, block: Block, documents: Encoded) -> None:
    """All of it will be about as the first block is."""
    written = 2 * sum(len(row) for _, _, row, _ in documents)
    needed = written * source.size // max(block.done, 1)
    if wanted:
        needed = min(needed, written * wanted // len(documents))
    check_space(staging, needed, "the whole folder, judging by its first documents,")
