"""Sources of documents: .jsonl, plain text, .html and .parquet files, folders of them, or texts in memory.

A source is read in blocks of raw documents, from its start or from the position after any block: skipping 40 GB of a
.jsonl costs nothing. Blocks are parsed by their reader, so that several threads can share that work.
"""

import gzip
import hashlib
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.util import find_spec
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

from pgolf.data.html_text import text_of
from pgolf.disk import checksum
from pgolf_core.files import DataError

PAGES = (".html", ".htm")
PLAIN = (".txt", ".md", ".rst", ".py", *PAGES)
SUFFIXES = (".jsonl", ".jsonl.gz", *PLAIN, ".parquet")
BLOCK_BYTES = 1 << 19  # smallest block, unless the source ends
LONGEST = 1 << 27  # bytes of a document, unpacked; more may be a bomb
MOST_UNPACKED = 1 << 29  # bytes of text of a .parquet file that is packed so much
MOST_TIMES = 100  # text of a .parquet file over its packed size, if it is large
BLOCK_ROWS = 256  # rows of .parquet, or texts in memory, per block
TEXT_TYPES = ("string", "large_string", "binary", "large_binary")  # .parquet columns of text have one

Position = tuple[int, int, int]  # file; offset in it: unpacked bytes, or rows of .parquet; lines before it
START = (0, 0, 0)
BLANK = re.compile(rb".*\n[ \t\r\f\v]*\n", re.DOTALL)  # everything up to the last blank line
ENDS = {  # split -> function: offset in raw bytes at which the last whole document ends, 0 if none does
    "file": lambda raw: 0,
    "blank": lambda raw: match.end() if (match := BLANK.match(raw)) else 0,
    "line": lambda raw: raw.rfind(b"\n") + 1,
}


class Block(NamedTuple):
    """Documents of a source, not yet parsed."""

    texts: Callable[[], list[str]]  # parses them; DataError naming the file and line of a malformed one
    end: Position
    done: int  # bytes of the source up to the end of this block, as Source.size counts them


@dataclass(frozen=True)
class Files:
    """Files of documents, in order."""

    root: Path  # the file, or the folder that holds all of them
    paths: tuple[Path, ...]
    field: str
    split: str
    skipped: str = ""  # number and kinds of the files in the folder that are not read
    kinds: tuple[str, ...] = ()  # further endings of plain text

    @cached_property
    def size(self) -> int:
        return sum(path.stat().st_size for path in self.paths)

    def about(self) -> dict:
        """Identity of the source: its options, and a digest of names, sizes and the first MB of each file."""
        digest = hashlib.sha256()
        for path in self.paths:
            with open(path, "rb") as f:
                first = hashlib.sha256(f.read(1 << 20)).hexdigest()
            digest.update(json.dumps([_name(path, self.root), path.stat().st_size, first]).encode())
        about = {"name": self.root.name, "files": len(self.paths), "bytes": self.size, "sha256": digest.hexdigest()}
        plain = [self._is_plain(path) for path in self.paths]
        about |= ({} if all(plain) else {"field": self.field}) | ({"split": self.split} if any(plain) else {})
        return about | ({"kinds": list(self.kinds)} if self.kinds else {})

    def _is_plain(self, path: Path) -> bool:
        return _is(path, *PLAIN, *self.kinds)

    def modified(self) -> int:
        """Last modification of a file in ns, which also shows an edit that `about` misses."""
        return max(path.stat().st_mtime_ns for path in self.paths)

    def content(self) -> list[str]:
        """sha256 of each whole file: shows whether a file with another time holds other text."""
        return [checksum(path) for path in self.paths]

    def blocks(self, begin: Position = START) -> Iterator[Block]:
        """All documents after a position."""
        before = 0  # bytes of earlier files
        for i, path in enumerate(self.paths):
            if i >= begin[0]:
                for block in self._blocks_of(path, max(begin, (i, 0, 0))):
                    yield block._replace(done=before + block.done)
            before += path.stat().st_size

    def _blocks_of(self, path: Path, at: Position) -> Iterator[Block]:
        if _is(path, ".parquet"):
            yield from _parquet_blocks(path, at, self.field)
            return
        plain = self._is_plain(path)
        parse = partial(_parse_plain, path, self.split) if plain else partial(_parse_json, path, self.field)
        split = "file" if _is(path, *PAGES) else self.split  # markup may reach over blank lines
        for raw, done in _read(path, at[1], ENDS[split if plain else "line"]):
            end = (at[0], at[1] + len(raw), at[2] + raw.count(b"\n"))
            yield Block(partial(parse, raw, at), end, done)
            at = end


class Texts:
    """Documents in memory."""

    def __init__(self, texts: Sequence[str], name: str):
        self.documents, self.name = texts, name
        self.size = sum(map(len, texts))  # characters, close enough for a progress bar

    def about(self) -> dict:
        digest = hashlib.sha256(json.dumps(list(self.documents)).encode())
        return {"name": self.name, "documents": len(self.documents), "sha256": digest.hexdigest()}

    def modified(self) -> int:
        return 0

    def content(self) -> list[str]:
        return []

    def blocks(self, begin: Position = START) -> Iterator[Block]:
        done = sum(map(len, self.documents[: begin[1]]))
        for i in range(begin[1], len(self.documents), BLOCK_ROWS):
            texts = self.documents[i : i + BLOCK_ROWS]
            done += sum(map(len, texts))
            yield Block(partial(list, texts), (0, i + len(texts), 0), done)


Source = Files | Texts


def open_source(path: str | Path, field: str = "text", split: str = "auto", kinds: Iterable[str] = ()) -> Files:
    """Documents of a file, or of all files below a folder in the order of their names, without hidden ones.

    field: field of a .jsonl or .parquet row that holds the text. split: a document of .txt or .md is a whole 'file',
    text between 'blank' lines, or a 'line'; 'auto' is blank for a single .txt or .md file, else file. These have no
    empty documents, and \\n as line end. Of .html its text is read. kinds: further endings of plain text. Raises
    DataError.
    """
    path, kinds = Path(path), tuple(f".{kind.lower().lstrip('.')}" for kind in kinds)
    known = (*SUFFIXES, *kinds)
    if split not in ("auto", *ENDS):
        raise DataError(f"split={split}: choose one of auto, {', '.join(ENDS)}")
    if split == "auto":
        split = "blank" if path.is_file() and _is(path, ".txt", ".md") else "file"
    below = sorted(path.rglob("*"), key=partial(_name, root=path)) if path.is_dir() else [path]
    below = [file for file in below if not file.is_dir() or file.is_symlink()]
    hidden = {file for file in below if any(part.startswith(".") for part in file.relative_to(path).parts)}
    paths = tuple(file for file in below if file not in hidden and _is(file, *known) and file.is_file())
    chosen = set(paths)
    left = Counter("hidden" if file in hidden else _kind(file) for file in below if file not in chosen)
    listed = ", ".join(f"{count:,} {kind}" for kind, count in sorted(left.items()))
    skipped = f"{left.total():,} files skipped: {listed}; --kinds reads more kinds as text" if left else ""
    files = Files(path, paths, field, split, skipped, kinds)
    if not files.paths:
        problem = "nothing to read" if path.exists() else "no such file or folder"
        raise DataError(
            f"{path}: {problem}; documents come from {', '.join(known)}, or a folder of "
            "them; `--kinds .EXT` reads another kind as text"
        )
    if any(_is(file, ".parquet") for file in files.paths) and not find_spec("pyarrow"):
        raise DataError(f"{path}: to read .parquet, pip install pyarrow")
    if not files.size:
        raise DataError(f"{path}: empty; at least one document is needed")
    return files


def first_texts(source: Source, count: int = 0) -> Iterator[str]:
    """The first documents of a source; 0: all."""
    texts = (text for block in source.blocks() for text in block.texts())
    return islice(texts, count) if count else texts


def _is(path: Path, *suffixes: str) -> bool:
    return path.name.lower().endswith(suffixes)


def _kind(path: Path) -> str:
    """Kind of a file that is not read."""
    if path.is_dir():
        return "linked folders"
    return (path.suffix.lower() or "without suffix") if path.is_file() else "not files"


def _name(path: Path, root: Path) -> str:
    """Path below the root, equal on every system."""
    return path.relative_to(root).as_posix()


def _read(path: Path, offset: int, last: Callable[[bytes], int]) -> Iterator[tuple[bytes, int]]:
    """Whole documents of a file from an offset on: raw bytes, bytes read of the file."""
    with open(path, "rb") as file, gzip.open(file) if _is(path, ".gz") else nullcontext(file) as f:
        try:
            f.seek(offset)
            raw = b""
            while more := f.read(max(BLOCK_BYTES, len(raw))):  # doubled until it holds the end of a document
                raw += more
                if end := last(raw):
                    offset += end
                    yield raw[:end], offset if f is file else file.tell()
                    raw = raw[end:]
                if len(raw) > LONGEST:
                    why = f"the document at unpacked byte {offset:,} is longer than {LONGEST:,} bytes"
                    raise DataError(f"{path}: {why}; split it, or put a line end after every document")
            if raw:
                yield raw, path.stat().st_size
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{path}: damaged after {offset:,} unpacked bytes ({error}); get it again") from None


def _decode(path: Path, raw: bytes, begin: Position) -> str:
    _, offset, lines = begin
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        line, at = lines + raw.count(b"\n", 0, error.start) + 1, offset + error.start
        raise DataError(f"{path}, line {line}, byte {at}: not UTF-8 ({error.reason}); save it as UTF-8") from None
    return text if offset else text.removeprefix("\ufeff")


def _parse_json(path: Path, field: str, raw: bytes, begin: Position) -> list[str]:
    texts = []
    for line, row in enumerate(_decode(path, raw, begin).split("\n"), begin[2] + 1):
        if not row.strip():
            continue
        where = f"{path}, line {line}"
        try:
            value = json.loads(row)
        except (ValueError, RecursionError) as error:
            raise DataError(f'{where}: not JSON ({error}); a line is an object: {{"{field}": …}}') from None
        if not isinstance(value, dict):
            raise DataError(f'{where}: not a JSON object; a line is like {{"{field}": "a document"}}')
        if field not in value:
            raise DataError(f"{where}: {_only(field, value)}")
        texts.append(_checked(value[field], where, field))
    return texts


def _parse_plain(path: Path, split: str, raw: bytes, begin: Position) -> list[str]:
    text = _decode(path, raw, begin).replace("\r\n", "\n")
    if _is(path, *PAGES):
        text = text_of(text)
    if split == "file":
        return [text] if text.strip() else []
    lines = groupby(text.split("\n"), key=lambda line: bool(line.strip()))
    rows = [list(group) for filled, group in lines if filled]
    return [line for row in rows for line in row] if split == "line" else ["\n".join(row) for row in rows]


def _only(field: str, names: Iterable[str]) -> str:
    return f"no field '{field}', only {', '.join(map(repr, names)) or 'nothing'}; choose one with --field"


def _checked(text: object, where: str, field: str) -> str:
    if not isinstance(text, str):
        kind = "null" if text is None else type(text).__name__
        raise DataError(f"{where}: '{field}' is {kind}; a document is a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"half a character ({text[error.start]!a})"
        raise DataError(f"{where}: '{field}' holds {half}, which UTF-8 cannot encode") from None
    return text


def _parquet_blocks(path: Path, begin: Position, field: str) -> Iterator[Block]:
    """Offsets are rows; those before the position are read again and left out.

    A column of few long values, which rows name again and again, stays packed until a block of it is parsed.
    """
    import pyarrow.parquet

    try:
        schema = pyarrow.parquet.read_schema(path)
        if field not in schema.names:
            raise DataError(f"{path}: {_only(field, schema.names)}")
        packed = [field] if str(schema.field(field).type) in TEXT_TYPES else []
        with pyarrow.parquet.ParquetFile(path, read_dictionary=packed) as file:
            _check_pages(path, file.metadata, field)
            rows, size, at, unpacked = file.metadata.num_rows, path.stat().st_size, 0, 0
            for batch in file.iter_batches(BLOCK_ROWS, columns=[field]):
                for column, text_bytes in _bounded(path, batch.column(0), at):
                    parse = partial(_parse_column, path, field, column, at)
                    at, unpacked = at + len(column), unpacked + text_bytes
                    if unpacked > max(MOST_UNPACKED, MOST_TIMES * size):
                        raise DataError(f"{path}: unfolds to more than {MOST_TIMES} times its {size:,} bytes")
                    if at > begin[1]:
                        yield Block(parse, (begin[0], at, 0), size * at // rows)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: cannot be read ({error}); get it again") from None


def _check_pages(path: Path, metadata: object, field: str) -> None:
    """DataError if a row group is packed more than any large text can be: a page of it may fill the memory."""
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        for column in (group.column(j) for j in range(group.num_columns)):
            most = max(MOST_UNPACKED, MOST_TIMES * min(column.total_compressed_size, path.stat().st_size))
            if column.path_in_schema == field and column.total_uncompressed_size > most:
                why = f"{column.total_uncompressed_size:,} bytes in row group {i + 1}"
                raise DataError(f"{path}: '{field}' unfolds to {why}, more than {MOST_TIMES} times its packed size")


def _bounded(path: Path, column: Sequence, begin: int) -> Iterator[tuple[Sequence, int]]:
    """Slices of a column and the bytes of their text, at most LONGEST. DataError naming a longer document."""
    import pyarrow.compute as pc

    words = getattr(column, "dictionary", column)
    if str(words.type) not in TEXT_TYPES:
        yield column, 0  # no text, as its parser will say
        return
    sizes = pc.binary_length(words)
    sizes = (sizes if words is column else sizes.take(column.indices)).fill_null(0).to_pylist()
    first = total = 0
    for row, size in enumerate(sizes):
        if size > LONGEST:
            why = f"the document of row {begin + row + 1:,} is longer than {LONGEST:,} bytes"
            raise DataError(f"{path}: {why}; split it")
        if total + size > LONGEST:
            yield column.slice(first, row - first), total
            first, total = row, 0
        total += size
    yield column.slice(first), total


def _parse_column(path: Path, field: str, column: Sequence, begin: int) -> list[str]:
    rows = enumerate(column.to_pylist(), begin + 1)
    return [_checked(text, f"{path}, row {row}", field) for row, text in rows]
