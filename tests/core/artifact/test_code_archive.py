"""The counted code runs alone, holds nothing that does not run, and is the same bytes everywhere."""

import ast
import gc
import io
import json
import lzma
import os
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from support.options import MODEL_OPTIONS, combinations, knobs_of

from pgolf.data.tokenizers import Bytes
from pgolf_core.artifact import code_archive as packing
from pgolf_core.artifact.code_archive import code_archive, reader_modules
from pgolf_core.artifact.format import read_model
from pgolf_core.config import ROOT, RunConfig
from pgolf_core.evaluate import evaluate
from pgolf_core.export import export, load
from pgolf_core.model import GPT
from pgolf_core.quantization.calibration import Statistics
from pgolf_core.quantization.lowrank import LowRank
from pgolf_core.quantization.primitives import QuantizedTensor, RankOne
from pgolf_core.quantization.schemes.codebook import CodebookTensor
from pgolf_core.tokens import ByteTable

TINY = dict(
    vocab_size=64, num_layers=4, model_dim=32, num_heads=4, num_kv_heads=2, train_seq_len=32, val_batch_size=128,
    train_batch_tokens=1024, keep_float_max_numel=0, embed_dim=16, num_unique_blocks=2,
)  # fmt: skip
RESIDUALS = dict(int8_residual_rank=1, int8_residual_budget_bytes=2000)
FILES = [  # knobs of files that need different code of their reader
    dict(eval_cache_size=8, eval_cache_mix_weight=0.1, eval_stride=16, **RESIDUALS),
    dict(quantizer="step:0.4:fisher", gptq=True, codec="ans", int8_residual_bits=4, tie_embeddings=False, **RESIDUALS),
    dict(quantizer="codebook:32:2", codec="brotli", window_size=8, document_mask=True),
    *(knobs_of(group) for group in combinations(0, MODEL_OPTIONS, size=99)),
]
READER = """
import json, sys
import torch

for file in json.load(sys.stdin):
    sys.path.insert(0, file["code"])
    from pgolf_core.artifact.format import load
    from pgolf_core.evaluate import evaluate
    from pgolf_core.knobs import EvalConfig, ModelConfig
    from pgolf_core.model import GPT
    from pgolf_core.tokens import ByteTable
    model = GPT(ModelConfig(**file["model"]))
    model.load_state_dict(load(file["artifact"]))
    table = ByteTable(*(torch.tensor(column) for column in file["table"]))
    score = evaluate(model, torch.tensor(file["tokens"]), table, EvalConfig(**file["eval"]))
    assert ByteTable.from_sentencepiece(file["tokenizer"]).base_bytes.sum() == 256
    ours = {name: sys.modules.pop(name) for name in [*sys.modules] if name.startswith("pgolf")}
    assert all(module.__file__.startswith(file["code"]) for module in ours.values()), ours
    print(json.dumps([score.val_loss, score.val_bpb]))
assert "python_minifier" not in sys.modules
"""


def test_archive_reads_and_scores_each_kind_of_file_alone(tmp_path):
    ids = torch.arange(64)
    table = ByteTable((ids % 5 + 1).to(torch.int16), ids % 3 == 0, ids < 4)
    tokens = torch.randint(4, 64, (300,), generator=torch.Generator().manual_seed(1))
    (tmp_path / "tokenizer.json").write_text(Bytes().to_json())
    given, expected = [], []
    for i, knobs in enumerate(FILES):
        config, artifact, code = RunConfig(**TINY, **knobs), tmp_path / f"{i}.pgolf", tmp_path / f"alone{i}"
        torch.manual_seed(0)
        state = {name: t + 0.05 * torch.randn(t.shape) for name, t in GPT(config.model).state_dict().items()}
        inputs = {name: torch.randn(64, t.size(1)) for name, t in state.items() if name.endswith(".weight")}
        calibration = {n: Statistics(torch.rand(len(state[n])) + 0.1, x.T @ x, 64) for n, x in inputs.items()}
        export(state, config.export, artifact, calibration)
        unpacked = lzma.decompress(code_archive(*read_model(artifact).forms))
        with tarfile.open(fileobj=io.BytesIO(unpacked)) as archive:
            archive.extractall(code, filter="data")
        model = GPT(config.model)
        model.load_state_dict(load(artifact))
        score = evaluate(model, tokens, table, config.eval)
        expected.append([score.val_loss, score.val_bpb])
        given.append({
            "model": config.model.model_dump(), "eval": config.eval.model_dump(), "tokens": tokens.tolist(),
            "code": str(code), "artifact": str(artifact), "tokenizer": str(tmp_path / "tokenizer.json"),
            "table": [column.tolist() for column in (table.base_bytes, table.has_leading_space, table.is_boundary)],
        })  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", READER], input=json.dumps(given), capture_output=True, text=True, cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PYTHONSAFEPATH": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == expected


def test_archive_is_small_and_its_f_strings_are_quoted_alike_by_every_python():
    everything = (QuantizedTensor, RankOne, LowRank, CodebookTensor)
    assert len(code_archive()) < len(code_archive(*everything)) < 13_300
    assert code_archive() == code_archive(QuantizedTensor, RankOne)  # every reader has these two
    # Python 3.12 and later may write a string inside an f-string's braces in other quotes.
    nodes = [node for text in reader_modules(*everything).values() for node in ast.walk(ast.parse(text))]
    in_braces = [m for n in nodes if isinstance(n, ast.FormattedValue) for m in ast.walk(n.value)]
    assert in_braces and not any(isinstance(m, ast.Constant) and isinstance(m.value, str) for m in in_braces)


def test_threads_make_archives_at_the_same_time():
    """CPython 3.11's parser fails when the collector lets another thread parse in the middle of it."""
    packing._archive.cache_clear()
    packing._definitions.cache_clear()
    threshold = gc.get_threshold()
    gc.set_threshold(50)
    gc.callbacks.append(let_others := lambda *_: time.sleep(0))
    try:
        with ThreadPoolExecutor(4) as pool:
            archives = list(pool.map(code_archive, [LowRank, CodebookTensor] * 2, [RankOne, RankOne] * 2))
    finally:
        gc.callbacks.remove(let_others)
        gc.set_threshold(*threshold)
    assert archives == [code_archive(LowRank), code_archive(CodebookTensor)] * 2


def test_archive_is_the_same_bytes_from_any_process():
    program = "from pgolf_core.artifact import code_archive as c; print(c.code_archive().hex())"
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)}
    other = subprocess.check_output([sys.executable, "-c", program], env=environment, text=True)
    assert bytes.fromhex(other) == code_archive()


SOURCE = '''\
"""A module."""
from __future__ import annotations
import os, sys as system
from pgolf_core.files import (atomic_path,  # a comment
                              atomic_write)
from typing import Annotated
if TYPE_CHECKING:
    from torch import Tensor
UNUSED = system.argv
TEXT: dict[str, int] = os.name
@decorate
class Kept(Base):
    field: Annotated[int, Field(gt=0, description="told")] = knob(0, description="y")
    def used(self, tensor: Tensor, *rest: str, key: int = 3) -> dict[str, int]:
        """Docstring."""
        return atomic_write(tensor, key=key)
def unused():
    return atomic_path()
@option("extra")
class Extra:
    def backward(self):
        return atomic_path()
def entry():
    return Kept().used(TEXT) or Extra()
'''
KEPT = """\
from __future__ import annotations
import os
from pgolf_core.files import atomic_write
from typing import Annotated
TEXT=os.name
@decorate
class Kept(Base):
\tfield:Annotated[int,Field(gt=0)]=knob(0)
\tdef used(A,tensor,*B,key=3):return atomic_write(tensor,key=key)
def entry():return Kept().used(TEXT)or Extra()
"""


def test_only_definitions_that_an_entry_point_reaches_are_kept(monkeypatch):
    files = "def atomic_path(): pass\ndef atomic_write(path, key): pass\n"
    monkeypatch.setattr(packing, "SOURCES", {"mine.py": SOURCE, "files.py": files})
    monkeypatch.setattr(packing, "ENTRY_POINTS", {"mine": ("entry",)})
    kept = {name: text.strip() for name, text in reader_modules().items()}
    assert kept == {"mine": KEPT.strip(), "files": "def atomic_write(path,key):0"}
