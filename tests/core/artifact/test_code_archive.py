"""The counted code runs alone, holds nothing that does not run, and is the same bytes everywhere."""

import ast
import io
import json
import lzma
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from pgolf_core.artifact.code_archive import code_archive, reader_modules
from pgolf_core.artifact.format import unpack
from pgolf_core.artifact.minify import Module
from pgolf_core.config import RunConfig
from pgolf_core.evaluate import evaluate
from pgolf_core.export import export, load
from pgolf_core.model import GPT
from pgolf_core.quantization.calibration import Statistics
from pgolf_core.quantization.lowrank import LowRank
from pgolf_core.quantization.primitives import QuantizedTensor, RankOne
from pgolf_core.quantization.schemes.codebook import CodebookTensor
from pgolf_core.tokens import Bytes, ByteTable

TINY = dict(
    vocab_size=64, num_layers=3, model_dim=32, num_heads=4, num_kv_heads=2, train_seq_len=32, val_batch_size=128,
    train_batch_tokens=1024, keep_float_max_numel=0, embed_dim=16, num_unique_blocks=2,
)  # fmt: skip
FILES = {  # knobs of a file -> what its reader needs besides
    "absmax, rank one, n-gram cache, sliding windows": dict(
        int8_residual_rank=1, int8_residual_budget_bytes=2000, eval_cache_size=8, eval_cache_mix_weight=0.1,
        eval_stride=16,
    ),
    "fisher steps, low rank, ans": dict(
        quantizer="step:0.4:fisher", gptq=True, int8_residual_rank=2, int8_residual_bits=4, codec="ans",
        int8_residual_budget_bytes=2000, tie_embeddings=False,
    ),
    "codebook, brotli, window": dict(quantizer="codebook:32:2", codec="brotli", window_size=8),
}  # fmt: skip
READER = """
import ast
import io
import json
import lzma, sys
import torch
from pgolf_core.artifact.format import load
from pgolf_core.evaluate import evaluate
from pgolf_core.knobs import EvalConfig, ModelConfig
from pgolf_core.model import GPT
from pgolf_core.tokens import ByteTable

given = json.load(sys.stdin)
model = GPT(ModelConfig(**given["model"]))
model.load_state_dict(load(given["artifact"]))
table = ByteTable(*(torch.tensor(column) for column in given["table"]))
score = evaluate(model, torch.tensor(given["tokens"]), table, EvalConfig(**given["eval"]))
assert ByteTable.from_sentencepiece(given["tokenizer"]).base_bytes.sum() == 256
modules = sorted(name for name in sys.modules if name.split(".")[0] in ("pgolf", "pgolf_core"))
print(json.dumps([score.val_loss, score.val_bpb, modules, sys.modules["pgolf_core.model"].__file__]))
"""


def statistics(state):
    """Made-up calibration of every matrix."""
    g = torch.Generator().manual_seed(3)
    found = {}
    for name, t in state.items():
        if name.endswith(".weight"):
            inputs = torch.randn(64, t.size(1), generator=g)
            found[name] = Statistics(torch.rand(t.size(0), generator=g) + 0.1, None, inputs.T @ inputs, 64)
    return found


@pytest.mark.parametrize("kind", FILES)
def test_archive_reads_and_scores_a_file_alone(kind, tmp_path):
    config = RunConfig(**TINY, **FILES[kind])
    torch.manual_seed(0)
    state = {name: t + 0.05 * torch.randn(t.shape) for name, t in GPT(config.model).state_dict().items()}
    export(state, config.export, tmp_path / "file.pgolf", statistics(state))
    code = code_archive(*unpack((tmp_path / "file.pgolf").read_bytes()).forms)
    with tarfile.open(fileobj=io.BytesIO(lzma.decompress(code))) as archive:
        archive.extractall(tmp_path / "alone", filter="data")
    ids = torch.arange(64)
    table = ByteTable((ids % 5 + 1).to(torch.int16), ids % 3 == 0, ids < 4)
    tokens = torch.randint(4, 64, (300,), generator=torch.Generator().manual_seed(1))
    model = GPT(config.model)
    model.load_state_dict(load(tmp_path / "file.pgolf"))
    ours = evaluate(model, tokens, table, config.eval)
    (tmp_path / "tokenizer.json").write_text(Bytes().to_json())
    given = {
        "model": config.model.model_dump(), "eval": config.eval.model_dump(), "tokens": tokens.tolist(),
        "artifact": str(tmp_path / "file.pgolf"), "tokenizer": str(tmp_path / "tokenizer.json"),
        "table": [column.tolist() for column in (table.base_bytes, table.has_leading_space, table.is_boundary)],
    }  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path / 'alone')!r})\n{READER}"],
        input=json.dumps(given), capture_output=True, text=True, cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    val_loss, val_bpb, modules, where = json.loads(done.stdout)
    assert (val_loss, val_bpb) == (ours.val_loss, ours.val_bpb)
    assert Path(where).is_relative_to(tmp_path / "alone") and not any(m.startswith("pgolf.") for m in modules)


def test_archive_is_small_deterministic_and_has_no_comments_or_docstrings():
    everything = code_archive(QuantizedTensor, RankOne, LowRank, CodebookTensor)
    assert len(code_archive()) < len(everything) < 13_000
    assert code_archive() == code_archive(QuantizedTensor, RankOne)  # every reader has these two
    for text in reader_modules().values():
        assert "#" not in text
        nodes = list(ast.walk(ast.parse(text)))
        definitions = [n for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef | ast.Module)]
        assert not any(ast.get_docstring(n) for n in definitions)
        assert not any(isinstance(n, ast.arg) and n.annotation for n in nodes)


SOURCE = '''\
"""A module."""
from __future__ import annotations
import os, sys as system
from pgolf_core.files import (atomic_path,  # a comment
                              atomic_write)
from typing import TYPE_CHECKING, Annotated

if TYPE_CHECKING:
    from torch import Tensor
LIMITS: dict[str, int] = {"a": 1,
                          "b": 2}
UNUSED = system.argv
TEXT = f"{LIMITS['a'] !r:>{LIMITS['b']}} # no comment {{}}"  'next' \\
    if os.name else (-1  if not LIMITS else 2)

@decorate
class Kept(Base):
    """Docstring."""
    field: Annotated[int, Field(gt=0, description="told")] = knob(0, description='x'  "y")

    def used(self, x: Tensor, *rest: str, key: int = 3) -> dict[str, int]:
        """Docstring."""
        value: list[int] = [x]
        return atomic_write(value, ** self.rest)

    @property
    def unused(self): return 1

    def forward(self) -> None:
        "Nothing else."

def entry():
    return Kept().used(TEXT)
'''
MINIFIED = """\
from __future__ import annotations
import os
from pgolf_core.files import atomic_write
from typing import Annotated
LIMITS={"a":1,"b":2}
TEXT=f"{LIMITS['a'] !r:>{LIMITS['b']}} # no comment {{}}" 'next' if os.name else(-1 if not LIMITS else 2)
@decorate
class Kept(Base):
 field:Annotated[int,Field(gt=0)]=knob(0)
 def used(self,x,*rest,key=3):
  value=[x]
  return atomic_write(value,**self.rest)
 def forward(self):
  pass
def entry():
 return Kept().used(TEXT)
"""


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_minify_keeps_what_is_needed_and_writes_tokens_as_they_are(newline):
    """The same text from every Python version, although f-strings are other tokens from 3.12 on."""
    module, words = Module(SOURCE.replace("\n", newline)), set()
    needed = module.keep("entry", words)
    needed += module.keep_methods(words)
    assert ("files", "atomic_write") in needed and ("files", "atomic_path") not in needed
    assert module.text() == MINIFIED
    ast.parse(MINIFIED)
