"""Exports as the public records store: step sizes by their formulas, and the search for the solver's equal loss."""

import numpy as np
import pandas as pd
import pytest
import torch

from pgolf.analysis import frontier
from pgolf.analysis.record_exports import NEAR, RECORD_EXPORTS, beside_records, solver_caps
from pgolf.reports import tables
from pgolf_core.artifact.format import read, read_model
from pgolf_core.config import RunConfig
from pgolf_core.export import export
from pgolf_core.model import GPT
from pgolf_core.quantization.calibration import calibrate

K = {  # record -> kind of matrix -> bits and k, as published
    "record 1394": {"tok_emb": (8, 20), "mlp": (6, 12.85), "attn": (6, 12.85)},
    "record 1855": {"tok_emb": (7, 14), "mlp": (6, 11.5), "attn": (6, 13)},
}


@pytest.mark.parametrize("name", RECORD_EXPORTS)
def test_a_records_export_has_its_published_steps_codec_and_residuals(name, tmp_path):
    knobs = dict(vocab_size=320, num_layers=2, model_dim=32, num_heads=2, num_kv_heads=1, train_seq_len=8)
    config = RunConfig(track="", train_batch_tokens=64, **knobs | RECORD_EXPORTS[name])
    torch.manual_seed(0)
    model = GPT(config.model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    calibration = calibrate(model, [torch.randint(320, (32, 8))], seed=5)
    state = model.state_dict()
    account = export(state, config.export, tmp_path / "file", calibration)
    stored, matrices = read_model(tmp_path / "file"), [n for n, t in state.items() if n in calibration]
    assert sorted(stored.tensors) == sorted(matrices) and set(account.codecs.values()) == {"brotli_shuffle"}
    for tensor, quantized in stored.tensors.items():
        bits, k = next(value for kind, value in K[name].items() if kind in tensor)
        top = 2 ** (bits - 1) - 1
        step = k * state[tensor].square().mean(1).sqrt() / top
        assert torch.equal(quantized.scale, step.to(torch.float16)) and quantized.q.abs().max() <= top
    assert all(t.dtype == torch.float16 for t in stored.floats.values())
    error = {n: (state[n] - stored.tensors[n].dequantize()).norm() for n in matrices}
    largest = sorted(sorted(error, key=error.get)[-3:]) if name == "record 1855" else []
    assert sorted(stored.residuals) == largest
    shapes = {kind: a.shape for kind, a in read(tmp_path / "file").arrays.items() if kind.startswith("left/")}
    assert all(shape[1] == 4 for shape in shapes.values()) and len(shapes) == len(largest)


def row(variant, bpb, size, **knobs):
    facts = dict(variant=variant, bpb=bpb, total_bytes=size, raw_bpb=2.0, text_bytes=100, bytes={"code": 1000})
    return facts | dict(block_nats=[1.0], raw_block_nats=[1.0], knobs=frontier.INT8_ZLIB_BASELINE | knobs)


@pytest.mark.parametrize(
    "better", [0.3, 0.55, 0.9, 1.3]
)  # the solver's bytes at equal loss, as a share of the record's
def test_the_search_ends_at_the_smallest_file_of_no_more_loss(better):
    """With the solver's loss as a known curve; the rows of a finished search ask for the same files again."""
    record = row("record 1394", 2.01, 50_000, **RECORD_EXPORTS["record 1394"])
    rows, caps = [row("plain", 2.0001, 100_000), record], [60_000, 20_000]
    todo = list(caps)
    while todo:
        bpb = 2 + 0.01 * (better * 50_000 / todo[0]) ** 2
        rows.append(row(f"solve {todo[0]}", bpb, todo[0], allocation="solve", cap_bytes=todo[0]))
        done = [r["knobs"].get("cap_bytes") for r in rows]
        todo = todo[1:] or [cap for cap in solver_caps(rows, caps) if cap not in done]
    assert sorted([*caps, *solver_caps(rows, caps)]) == sorted(cap for cap in done if cap) and len(rows) < 12
    (found,) = beside_records(frontier.exports(pd.DataFrame(rows))).itertuples()
    assert found.equal_bpb == pytest.approx(2 + 0.01 * better**2) if better < 1 else found.equal_bpb > 2.01
    if better < 1:
        assert better <= found.share <= NEAR * better * 1.001
    else:
        assert np.isnan(found.share) or found.share > 1
    shown = tables.format_table(beside_records(frontier.exports(pd.DataFrame(rows))), tables.RECORDS)
    assert shown["stored as"].tolist() == ["record 1394"]


def test_without_a_record_nothing_is_sought():
    rows = [row("plain", 2.0, 9000), row("solve 5000", 2.1, 5000, allocation="solve", cap_bytes=5000)]
    assert solver_caps(rows, [5000]) == [] and beside_records(frontier.exports(pd.DataFrame(rows))).empty
