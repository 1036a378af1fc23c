import gzip
import json
import sys

import numpy as np
import pytest

from pgolf.data import documents
from pgolf.data.documents import Texts, first_texts, open_source
from pgolf_core.files import DataError

TEXTS = [
    "one",
    "",
    "zwei\n\nÄ\r\n",
    " \t ",
    "日本\u2028語",
    "x" * 300,
    'a "quoted" \\ line',
    "\x00\ufeff",
    "🐈",
    "last",
]


def rows(texts=TEXTS, field="text"):
    return "".join(json.dumps({"id": i, field: text}, ensure_ascii=i % 2 == 0) + "\n" for i, text in enumerate(texts))


def jsonl(folder):
    (folder / "a.jsonl").write_bytes(rows().encode())
    return open_source(folder / "a.jsonl")


def unpacked(folder):
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(rows().encode()))
    return open_source(folder / "a.jsonl.gz")


def parquet(folder):
    pyarrow = pytest.importorskip("pyarrow", reason="pip install pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"id": range(len(TEXTS)), "text": TEXTS})
    parquet.write_table(table, folder / "a.parquet", row_group_size=4)
    return open_source(folder / "a.parquet")


def folder_of_all(folder):
    (folder / "b").mkdir()
    (folder / "b" / "2.JSONL").write_text(rows(TEXTS[1:4]), encoding="utf-8")
    (folder / "b.jsonl").write_text(rows(TEXTS[:1]), encoding="utf-8")  # "b.jsonl" < "b/2.JSONL", on Windows too
    (folder / "c.md").write_text(TEXTS[4], encoding="utf-8")
    (folder / "d.jsonl").write_text(rows(TEXTS[5:]), encoding="utf-8")
    (folder / "empty.txt").touch()
    (folder / "blank.txt").write_text("\n \n")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / ".git").mkdir()
    (folder / ".git" / "hidden.txt").write_text("hidden")
    return open_source(folder)


def memory(folder):
    return Texts(TEXTS, "memory")


def texts_of(blocks):
    return [text for block in blocks for text in block.texts()]


@pytest.fixture(params=[1, 7, 50, 1 << 19])
def block_size(request, monkeypatch):
    monkeypatch.setattr(documents, "BLOCK_BYTES", request.param)
    monkeypatch.setattr(documents, "BLOCK_ROWS", min(request.param, 256))


@pytest.mark.parametrize("make", [jsonl, unpacked, parquet, folder_of_all, memory])
def test_every_document_from_every_position(tmp_path, make, block_size):
    source = make(tmp_path)
    blocks = list(source.blocks())
    assert texts_of(blocks) == TEXTS
    assert 0 < blocks[-1].done <= source.size
    for i, block in enumerate(blocks):
        position = tuple(json.loads(json.dumps(block.end)))  # the form in a progress record
        assert texts_of(source.blocks(position)) == texts_of(blocks[i + 1 :])
    assert list(first_texts(source, 3)) == TEXTS[:3] and list(first_texts(source)) == TEXTS


PLAIN = "\ufeff\n  \none\nstill one \r\n \t\r\n\r\n\ntwo\n\u3000\nthree\r\n\n\n\nvier ä\n"


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("auto", ["one\nstill one ", "two", "three", "vier ä"]),
        ("blank", ["one\nstill one ", "two", "three", "vier ä"]),
        ("line", ["one", "still one ", "two", "three", "vier ä"]),
        ("file", [PLAIN[1:].replace("\r\n", "\n")]),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.md"])
def test_plain_text(tmp_path, name, split, expected, block_size):
    (tmp_path / name).write_bytes(PLAIN.encode())
    source = open_source(tmp_path / name, split=split)
    assert list(first_texts(source)) == expected
    blocks = list(source.blocks())
    for i, block in enumerate(blocks):
        assert texts_of(source.blocks(block.end)) == texts_of(blocks[i + 1 :])


def test_a_folder_of_plain_text(tmp_path):
    (tmp_path / "b.txt").write_text("two\n\nstill two")
    (tmp_path / "a.txt").write_text("one")
    assert list(first_texts(open_source(tmp_path))) == ["one", "two\n\nstill two"]
    assert list(first_texts(open_source(tmp_path, split="blank"))) == ["one", "two", "still two"]


def test_blocks_are_small(tmp_path):
    (tmp_path / "a.jsonl").write_text(rows(["x" * 1000] * 5000), encoding="utf-8")
    sizes = np.diff([0, *(block.done for block in open_source(tmp_path / "a.jsonl").blocks())])
    assert max(sizes) <= documents.BLOCK_BYTES + 2000 and len(sizes) == -(-sum(sizes) // documents.BLOCK_BYTES)


def test_what_tells_sources_apart(tmp_path):
    source = jsonl(tmp_path)
    about, modified = source.about(), source.modified()
    assert about == jsonl(tmp_path).about() == json.loads(json.dumps(about))
    assert about.keys() == {"name", "files", "bytes", "sha256", "field"} and about["bytes"] == source.size
    (tmp_path / "a.jsonl").write_bytes(rows().replace("one", "two").encode())
    assert open_source(tmp_path / "a.jsonl").about() != about and source.modified() >= modified
    assert Texts(["a"], "x").about() != Texts(["b"], "x").about()
    (tmp_path / "a.txt").write_text("a")
    assert open_source(tmp_path / "a.txt").about()["split"] == "blank"


GOOD = b'{"text": "fine"}\n'
BAD = {
    "utf8.jsonl": (GOOD * 9 + b'{"text": "\xff"}\n', r"utf8.jsonl, line 10, byte 163: not UTF-8 .* save it as UTF-8"),
    "utf8.txt": (b"fine\n\nf\xe4in", r"utf8.txt, line 3, byte 7: not UTF-8"),
    "utf16.txt": ("fine".encode("utf-16"), r"utf16.txt, line 1, byte 0: not UTF-8"),
    "torn.jsonl": (GOOD * 9 + b'\n\n{"text": "to', r'torn.jsonl, line 12: not JSON \(.*\); a line is .*"text"'),
    "deep.jsonl": (GOOD + b"[" * 100_000, r"deep.jsonl, line 2: not JSON \("),
    "list.jsonl": (b'["text"]\n', r"list.jsonl, line 1: not a JSON object"),
    "field.jsonl": (
        GOOD * 3 + b'{"id": 1, "content": ""}',
        r"line 4: no field 'text', only 'id', 'content'; .*--field",
    ),
    "nothing.jsonl": (b"{}", r"no field 'text', only nothing"),
    "null.jsonl": (GOOD + b'{"text": null}', r"null.jsonl, line 2: 'text' is null; a document is a string"),
    "number.jsonl": (b'{"text": 3}', r"'text' is int; a document is a string"),
    "half.jsonl": (b'{"text": "\\ud83d"}', r"line 1: 'text' holds half a character \('\\ud83d'\)"),
    "torn.jsonl.gz": (gzip.compress(GOOD * 9)[:-12], r"torn.jsonl.gz: damaged after \d+ unpacked bytes"),
    "none.jsonl.gz": (b"no such thing", r"none.jsonl.gz: damaged"),
    "empty.jsonl": (b"", r"empty.jsonl: empty"),
    "what.csv": (b"text", r"what.csv: nothing to read; documents come from .jsonl, .*.parquet"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(tmp_path, name, monkeypatch):
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    for size in (16, 1 << 19):
        monkeypatch.setattr(documents, "BLOCK_BYTES", size)
        with pytest.raises(DataError, match=message):
            list(first_texts(open_source(tmp_path / name)))


def test_bad_sources(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(DataError, match="nothing to read"):
        open_source(tmp_path)
    with pytest.raises(DataError, match="split=page: choose one of auto, file, blank, line"):
        open_source(tmp_path, split="page")


def test_bad_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pip install pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["a", None], "n": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet, row 2: 'text' is null"):
        list(first_texts(open_source(tmp_path / "a.parquet")))
    with pytest.raises(DataError, match=r"no field 'body', only 'text', 'n'"):
        list(first_texts(open_source(tmp_path / "a.parquet", field="body")))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 not really PAR1")
    with pytest.raises(DataError, match=r"b.parquet: cannot be read"):
        list(first_texts(open_source(tmp_path / "b.parquet")))


def test_parquet_without_its_reader(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match=r"a.parquet: to read .parquet, pip install pyarrow"):
        open_source(tmp_path / "a.parquet")


@pytest.mark.parametrize("kind", ["rows of one long value", "pages", "one document"])
def test_a_parquet_bomb_is_refused(kind, tmp_path, monkeypatch):
    """A file of some kB unfolds without end: by a dictionary whose value all rows name, or by packed pages."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(documents, "LONGEST", 2**20)
    monkeypatch.setattr(documents, "MOST_UNPACKED", 4 * 2**20)
    long = "x" * (2**20 + (kind == "one document"))
    texts = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 1000, pyarrow.int32()), pyarrow.array([long]))
    if kind == "pages":
        texts = pyarrow.array([long] * 8)
    table = pyarrow.table({"text": texts})
    parquet.write_table(table, tmp_path / "a.parquet", compression="zstd", use_dictionary=kind != "pages")
    said = "longer than 1,048,576 bytes" if kind == "one document" else "unfolds to .*more than 100 times its"
    with pytest.raises(DataError, match=f"a.parquet: .*{said}"):
        for block in open_source(tmp_path / "a.parquet").blocks():
            assert sum(map(len, block.texts())) <= 2**20


def test_parquet_of_repeated_long_values_is_read_in_bounded_blocks(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(documents, "LONGEST", 1000)
    texts = ["a" * 400, "b" * 700, "", "c" * 1000] * 50
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    blocks = list(open_source(tmp_path / "a.parquet").blocks())
    assert [text for block in blocks for text in block.texts()] == texts
    assert max(sum(map(len, block.texts())) for block in blocks) <= 1000
    again = list(open_source(tmp_path / "a.parquet").blocks(blocks[30].end))
    assert [block.end for block in again] == [block.end for block in blocks[31:]]


PAGE = """<!doctype html><html><head><title>no</title><style>p {}</style></head><body>
<h1>One &amp; two</h1><p>A  <b>bold</b>
word.</p><script>if (a < b) {}</script><pre>  x = 1
  y</pre><ul><li>first<li>second</ul></body></html>"""


def test_of_a_page_of_html_its_text_is_a_document(tmp_path):
    (tmp_path / "a.html").write_text(PAGE, encoding="utf-8")
    assert list(first_texts(open_source(tmp_path / "a.html"))) == [
        "One & two\nA bold word.\n  x = 1\n  y\nfirst\nsecond"
    ]


def test_source_code_and_kinds_that_are_named_are_read_as_text(tmp_path):
    for name in ("a.py", "b.rst", "c.TEX", "d.bin"):
        (tmp_path / name).write_text(f"text\n\nof {name}\n", encoding="utf-8")
    plain, more = open_source(tmp_path), open_source(tmp_path, kinds=["tex", ".org"])
    assert [path.name for path in plain.paths] == ["a.py", "b.rst"] and "1 .tex" in plain.skipped
    assert list(first_texts(more)) == [f"text\n\nof {name}\n" for name in ("a.py", "b.rst", "c.TEX")]
    assert more.about()["kinds"] == [".tex", ".org"] and "kinds" not in plain.about()
    assert list(first_texts(open_source(tmp_path / "a.py"))) == ["text\n\nof a.py\n"]  # a file of code is one document
    with pytest.raises(DataError, match=r"`--kinds \.EXT` reads another kind"):
        open_source(tmp_path / "d.bin")
