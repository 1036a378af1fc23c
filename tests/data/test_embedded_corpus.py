import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from support.corpus import small_documents

from pgolf.data import embedded_corpus, train_tokenizer
from pgolf.data.dataset import Dataset
from pgolf_core.config import ROOT
from pgolf_core.files import DataError
from pgolf_core.knobs import DataConfig
from pgolf_core.shards import read_shard, shard_paths

LONG = "This sentence is long enough, said again, and again, to count as documentation. " * 3 + "End."


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(embedded_corpus, "embedded_documents", small_documents)


# Documents


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that breaks when it is imported."""
    folder = tmp_path / "strange_package"
    (folder / "sub").mkdir(parents=True)
    (folder / "__init__.py").write_text(f'"""Package. {LONG}"""\nraise RuntimeError("imported")\n')
    (folder / "a.py").write_text(f'''
"""Short."""
class A:
    """Class.

      Indented.
    {LONG}
    """
    def f(self):
        """Method. {LONG}"""
if True:
    try: pass
    except E:
        async def g():
            def h():
                r"""Deep \\d. {LONG}"""
''')
    (folder / "sub" / "b.py").write_bytes(
        f"# coding: latin-1\r\ndef f():\r\n    '''Größe. {LONG}'''\r\ndef g():\r\n    '''Größe. {LONG}'''\r\n"
        f'def h():\r\n    """Package. {LONG}"""\r\n'.encode("latin-1")
    )
    (folder / "sub" / "none.py").write_text("x = 1\n")
    (folder / "sub" / "short.py").write_text('"""Too short."""\n')
    (folder / "sub" / "broken.py").write_text(f'"""{LONG}"""\ndef (:\n')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(embedded_corpus, "PACKAGES", ("strange_package",))


def test_documents_are_docstrings(package):
    documents = {document.name: document.text for document in embedded_corpus.embedded_documents()}
    assert documents.keys() == {"strange_package", "strange_package.a", "strange_package.sub.b"}
    expected = [f"Class.\n\n  Indented.\n{LONG}", f"Method. {LONG}", f"Deep \\d. {LONG}"]
    assert documents["strange_package.a"] == "\n\n".join(expected)
    assert "strange_package" not in sys.modules
    # Said twice, kept once: the later document, in the order of hashed names, goes without.
    everything = "\n\n".join(documents.values())
    assert everything.count("Package.") == everything.count("Größe.") == 1
    assert documents["strange_package.sub.b"].startswith("Größe.")


def test_missing_package(monkeypatch):
    monkeypatch.setattr(embedded_corpus, "PACKAGES", ("no_such_package",))
    with pytest.raises(DataError, match="pip install no_such_package"):
        embedded_corpus.embedded_documents()


def test_embedded_corpus(embedded):
    built = json.loads((embedded / "dataset.json").read_text())
    assert built["val"]["documents"] == 200 and built["train"]["documents"] > 2000
    assert built["train"]["text_bytes"] > 10_000_000 and built["val"]["text_bytes"] > 500_000
    dataset = Dataset.open(embedded, vocab_size=1024)
    for split in ("train", "val"):
        assert dataset.description[f"{split}_tokens"] == built[split]["tokens"]
        tokens = np.concatenate([read_shard(path) for path in shard_paths(embedded, split)])
        assert tokens[0] == dataset.tokenizer.bos
        assert (tokens == dataset.tokenizer.bos).sum() == built[split]["documents"]


# Tokenizer


def test_tokenizer_is_deterministic_and_takes_all_text():
    # Longer than SentencePiece reads by default, with its own mark of the unknown in it.
    texts = [*(document.text for document in small_documents()), "\u2585 " + "zebra " * 2000]
    model = train_tokenizer.train(texts, "bpe", 320)
    assert train_tokenizer.train(texts, "bpe", 320) == model
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert sp.vocab_size() == 320
    assert [sp.pad_id(), sp.bos_id(), sp.eos_id(), sp.unk_id()] == [0, 1, 2, 3]
    assert sp.encode("a zebra", out_type=str)[-1] == "▁zebra"
    assert sp.encode("日", out_type=str) == ["<0xE6>", "<0x97>", "<0xA5>"]
    assert sp.encode("zebra", out_type=str)[0][0] != "▁"


@pytest.mark.parametrize("vocab_size", [270, 60_000])
def test_impossible_vocabulary(vocab_size):
    with pytest.raises(DataError, match=f"vocab_size={vocab_size}: "):
        train_tokenizer.train((document.text for document in small_documents()), "bpe", vocab_size)


# Folders


def test_build_embedded(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(embedded_corpus, "SHARD_TOKENS", 1000)
    (tmp_path / "data.unfinished").mkdir()  # left by a killed build
    (tmp_path / "data.unfinished" / "fineweb_train_000099.bin").write_text("half")
    directory = embedded_corpus.build_embedded(320, tmp_path / "data")
    assert "training a tokenizer, vocab_size 320 …" in capsys.readouterr().out
    assert directory == tmp_path / "data"
    built = json.loads((directory / "dataset.json").read_text())
    assert built["train"]["documents"] == 60 and built["val"]["documents"] == 200
    assert not (tmp_path / "data.unfinished").exists()

    dataset = Dataset.open(directory, vocab_size=320)
    assert len(dataset.val_shards) == -(-built["val"]["tokens"] // 1000) > 1
    tokens = np.concatenate([read_shard(path) for path in dataset.val_shards])
    expected = dataset.tokenizer.encode([document.text for document in small_documents()[:200]])
    assert np.array_equal(tokens, np.concatenate(expected))

    again = embedded_corpus.build_embedded(320, tmp_path / "again")
    assert Dataset.open(again, vocab_size=320).fingerprint == dataset.fingerprint
    capsys.readouterr()
    (directory / "progress.json").write_text("{}")  # of a build that was killed after it moved the folder into place
    assert embedded_corpus.build_embedded(320, tmp_path / "data") == directory
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("kind", ["bpe", "unigram", "bytes"])
def test_other_embedded_corpora(small, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(embedded_corpus, "ROOT", tmp_path)
    vocab_size = 260 if kind == "bytes" else 300
    name = {"bpe": "sp300", "unigram": "unigram300", "bytes": "byte260"}[kind]
    directory = embedded_corpus.build_embedded(vocab_size, kind=kind)
    assert directory == tmp_path / "data" / f"embedded_{name}"
    large = embedded_corpus.build_embedded(vocab_size, kind=kind, large=True)
    assert large == tmp_path / "data" / f"embedded_large_{name}"
    built = json.loads((large / "dataset.json").read_text())
    assert built["train"]["documents"] == 100 and built["vocab_size"] == vocab_size
    assert built["versions"].keys() == {*embedded_corpus.LARGE_PACKAGES, "sentencepiece"}
    with pytest.raises(DataError, match="built for corpus=embedded_large, not embedded"):
        embedded_corpus.build_embedded(vocab_size, large, kind)
    with pytest.raises(
        DataError, match="set vocab_size=260" if kind != "bytes" else "built for vocab_size=260, not 300"
    ):
        embedded_corpus.build_embedded(300, directory, "bytes" if kind != "bytes" else "bpe")


@pytest.fixture
def built(small, tmp_path):
    """(folder, content of its dataset.json, function that writes another content)."""
    directory = embedded_corpus.build_embedded(320, tmp_path / "data")
    path = directory / "dataset.json"
    return directory, json.loads(path.read_text()), lambda content: path.write_text(json.dumps(content))


def test_a_folder_of_the_first_version_is_used(built):
    """It named neither tokenizer nor source."""
    directory, about, write = built
    write({"versions": about["versions"], "vocab_size": 320, "train": {"documents": 60}, "val": {"documents": 200}})
    assert embedded_corpus.build_embedded(320, directory) == directory


def test_a_folder_of_another_corpus_or_of_other_packages_is_refused(built):
    directory, about, write = built
    with pytest.raises(DataError, match="built for vocab_size=320, not 330"):
        embedded_corpus.build_embedded(330, directory)
    with pytest.raises(DataError, match="built for corpus=embedded, not embedded_large"):
        embedded_corpus.build_embedded(320, directory, large=True)
    write(about | {"versions": about["versions"] | {"sympy": "0.7"}})
    with pytest.raises(DataError, match=r"built from sympy 0\.7 \(now .*Delete that folder.*data_path=") as error:
        embedded_corpus.build_embedded(320, directory)
    assert str(directory) in str(error.value) and "numpy" not in str(error.value)
    assert embedded_corpus.resolve(DataConfig(data_path=str(directory)), 320) == directory
    write(about | {"vocab_size": 330})
    with pytest.raises(DataError, match="built for vocab_size=330, not 320"):
        embedded_corpus.build_embedded(320, directory)


def test_a_folder_in_the_way_is_left_alone(small, tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match=r"exists without a complete corpus; delete .*data, or"):
        embedded_corpus.build_embedded(320, tmp_path / "data")
    assert not list((tmp_path / "data").iterdir())


@pytest.mark.slow
def test_two_processes_build_once(tmp_path):
    program = """
import sys, time
from pathlib import Path
from pgolf.data import embedded_corpus, train_tokenizer
sys.path.insert(0, "tests")
from support.corpus import small_documents

def documents(large):
    with open(sys.argv[1] + ".builds", "a") as f: f.write("x")
    time.sleep(1)
    return small_documents()

embedded_corpus.embedded_documents = documents
Path(sys.argv[1] + "." + sys.argv[2]).touch()
while not all(Path(sys.argv[1] + "." + i).exists() for i in "01"): time.sleep(0.01)
print(embedded_corpus.build_embedded(320, sys.argv[1]) / "dataset.json")
"""
    directory = tmp_path / "data"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(directory), str(i)],
            cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, encoding="utf-8",
            env=os.environ | {"PYTHONUTF8": "1"},
        )
        for i in range(2)
    ]  # fmt: skip
    for process in processes:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0 and Path(out.splitlines()[-1]).exists()
    assert (tmp_path / "data.builds").read_text() == "x"
    Dataset.open(directory, vocab_size=320)


def test_resolve(embedded, tmp_path, monkeypatch):
    assert embedded_corpus.resolve(DataConfig(data_path=str(tmp_path)), 1024) == tmp_path
    monkeypatch.setattr(embedded_corpus, "ROOT", tmp_path)
    (tmp_path / "mine").mkdir()
    assert embedded_corpus.resolve(DataConfig(data_path="mine"), 1024) == tmp_path / "mine"
    with pytest.raises(DataError, match="data_path=yours: no folder"):
        embedded_corpus.resolve(DataConfig(data_path="yours"), 1024)


def test_embedded_is_the_default(embedded):
    assert embedded_corpus.resolve(DataConfig(), 1024) == embedded == ROOT / "data" / "embedded_sp1024"
