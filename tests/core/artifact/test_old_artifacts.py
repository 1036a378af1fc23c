"""Artifacts written before stored forms had words: they load to the same bits and score the same.

old_artifacts/ was written by commit 5f711bf from a tiny model of random weights: one file per way to store tensors,
with the sha256 of what each decodes to and its score.
"""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from pgolf_core.artifact.format import load, pack, read, read_model
from pgolf_core.config import RunConfig
from pgolf_core.evaluate import evaluate
from pgolf_core.model import GPT
from pgolf_core.tokens import ByteTable

FOLDER = Path(__file__).parent / "old_artifacts"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())


@pytest.mark.parametrize("name", EXPECTED["files"])
def test_old_artifact_decodes_to_the_same_bits_scores_alike_and_packs_to_the_same_file(name):
    path, expected = FOLDER / f"{name}.pgolf", EXPECTED["files"][name]
    decoded = load(path)
    digest = hashlib.sha256()
    for tensor in sorted(decoded):
        t = decoded[tensor]
        digest.update(tensor.encode() + str(tuple(t.shape)).encode() + t.contiguous().numpy().tobytes())
    assert digest.hexdigest() == expected["decoded_sha256"]
    config = RunConfig(**EXPECTED["base"] | expected["knobs"])
    model = GPT(config.model)
    model.load_state_dict(decoded)
    tokens = torch.randint(4, 64, (400,), generator=torch.Generator().manual_seed(1))
    ids = torch.arange(64)
    table = ByteTable((ids % 5 + 1).to(torch.int16), ids % 3 == 0, ids < 4)
    score = evaluate(model, tokens, table, config.eval)
    assert score.val_bpb == pytest.approx(expected["val_bpb"], abs=1e-7)  # processors round sums of float32 differently
    codecs = set(read(path).codecs.values())
    assert len(codecs) > 1 or pack(read_model(path), codecs.pop()).bytes == path.read_bytes()
