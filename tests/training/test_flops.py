"""Operations of a step, held to torch's own count of the matrix products, and to the mask's pairs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pgolf.training import flops
from pgolf_core.config import RunConfig
from pgolf_core.layers import attention
from pgolf_core.layers.attention import window_mask
from pgolf_core.model import GPT

SHAPE = dict(track="nano", train_seq_len=64, train_batch_tokens=512, model_dim=96, num_heads=4, num_kv_heads=2)


@pytest.mark.parametrize(
    "knobs",
    [
        {}, dict(num_layers=4, num_unique_blocks=2), dict(embed_dim=32), dict(tie_embeddings=False), dict(mlp_mult=3),
        dict(attn_gate="dense"), dict(attn_gate="sparse"), dict(bigram_vocab_size=9, bigram_dim=20),
        dict(ve_last=1, ve_dim=20), dict(loop_extra=2), dict(smear_gate="v2", parallel_from=9),
        dict(weights="basis", weight_bases=2, weight_rank=3, weight_row_scale=True),
        dict(weights="random", weight_rank=2),
    ],
    ids=str,
)  # fmt: skip
def test_products_are_counted_as_torch_does(knobs, monkeypatch):
    monkeypatch.setattr(attention, "KEPT", 0)  # torch's own attention, whose products have another name
    config = RunConfig(**SHAPE | knobs)
    model = GPT(config.model)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)  # zeros would do too: the counter looks at shapes
    ids = torch.zeros(2, 64, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model.loss(ids, ids).backward()
    products = sum(
        count for op, count in counter.get_flop_counts()["Global"].items() if "mm" in str(op) or "linear" in str(op)
    )
    pairs = 12 * len(config.passes()) * (64 + 1) / 2 * config.model_dim
    # The gradient of the embedding's output is no product; the first layer's input needs one all the same.
    assert flops.flops_per_token(config) - pairs == pytest.approx(products / ids.numel(), rel=1e-12)


@pytest.mark.parametrize("window", [0, 1, 16, 63, 64, 100])
def test_pairs_are_those_of_the_mask(window):
    config = RunConfig(**SHAPE, window_size=window)
    pairs = window_mask(64, window or 64, torch.device("cpu")).sum().item() / 64
    none = RunConfig(**SHAPE, window_size=1)
    difference = flops.flops_per_token(config) - flops.flops_per_token(none)
    assert difference == pytest.approx(12 * config.num_layers * config.model_dim * (pairs - 1))


def test_operations_are_the_mean_over_the_tokens_of_all_stages():
    whole = RunConfig(**SHAPE, loop_extra=1)
    short, once = whole.with_knobs(train_seq_len=32), whole.with_knobs(loop_extra=0)
    config = whole.with_knobs(train_seq_schedule="32@0.25", train_batch_schedule="1024@0.5", loop_from=0.75)
    a, b, c = (flops.flops_per_token(each) for each in (short.with_knobs(loop_extra=0), once, whole))
    mean = (0.25 * 1024 * a + 0.25 * 1024 * b + 0.25 * 512 * b + 0.25 * 512 * c) / (0.5 * 1024 + 0.5 * 512)
    assert flops.flops_per_token(config) == pytest.approx(mean, rel=1e-12)


def test_utilisation_is_of_all_gpus(monkeypatch):
    config, device = RunConfig(track="h100", world_size=8), torch.device("cuda")
    for name, peak in {
        "a card of next year": None, "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None, "NVIDIA RTX A1000": None,
        "NVIDIA L40": 181e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H100 80GB HBM3": 989e12,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert flops.peak_flops(device) == peak
        assert (flops.utilisation(config, 1000, 1.0, device) is None) == (peak is None)
    whole = 8 * 989e12 / flops.flops_per_token(config)  # tokens per second at the peak
    assert flops.utilisation(config, int(whole), 2.0, device) == pytest.approx(0.5)
    assert flops.utilisation(config, 1000, 1.0, torch.device("cpu")) is None
    assert flops.peak_memory(torch.device("cpu")) > 50 * 2**20
