"""Statistics against gradients taken token by token; one pass, every way a weight is used."""

import pytest
import torch
import torch.nn.functional as F

from pgolf_core.config import RunConfig
from pgolf_core.model import GPT
from pgolf_core.quantization.calibration import calibrate
from pgolf_core.shards import write_shard

SHAPES = {
    "tied": {},
    "untied": {"tie_embeddings": False},
    "factorised": {"embed_dim": 16},
    "shared blocks": {"num_layers": 4, "num_unique_blocks": 2},
}


class Shards:
    def __init__(self, path, vocab_size):
        g = torch.Generator().manual_seed(3)
        self.train_shards = [
            write_shard(path / "fineweb_train_000000.bin", torch.randint(vocab_size, (600,), generator=g).numpy())
        ]


@pytest.fixture(params=SHAPES, ids=lambda name: name.replace(" ", "-"))
def case(request, tmp_path):
    knobs = dict(vocab_size=64, num_layers=2, model_dim=32, num_heads=2, num_kv_heads=1, train_seq_len=8)
    config = RunConfig(track="", train_batch_tokens=64, **knobs | SHAPES[request.param])
    torch.manual_seed(0)
    model = GPT(config.model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model, config, Shards(tmp_path, 64)


def test_one_token_is_its_gradient_squared(case):
    """With one token in the sum there are no cross terms: Fisher is the square of autograd's own gradient."""
    model, config, dataset = case
    config = config.with_knobs(train_seq_len=1, train_batch_tokens=8)
    calibration = calibrate(model, config, dataset, tokens=1, hessians=False, seed=5)
    ids = torch.from_numpy(
        __import__("numpy").fromfile(dataset.train_shards[0], "<u2", offset=1024)[:1].astype("int64")
    )[None]
    logits = model(ids)
    generator = torch.Generator().manual_seed(5)
    drawn = torch.multinomial(logits.softmax(-1).flatten(0, 1), 1, generator=generator).flatten()
    F.cross_entropy(logits.flatten(0, 1), drawn, reduction="sum").backward()
    shared = config.blocks < config.num_layers
    for name, p in model.named_parameters():
        if name not in calibration:
            assert not name.endswith(".weight")
        elif (name in ("tok_emb.weight", "tok_emb_proj.weight") and config.tie_embeddings) or shared:
            continue  # used twice for one token: cross terms between the uses are left out by design
        else:
            assert torch.allclose(calibration[name].fisher, p.grad.square(), rtol=1e-4, atol=1e-10), name


def test_forms_agree(case):
    """row_fisher is fisher's row sums, and the Hessian's trace carries the same total."""
    model, config, dataset = case
    full = calibrate(model, config, dataset, 64, hessians=False)
    moments = calibrate(model, config, dataset, 64)
    assert full.keys() == moments.keys() == {n for n, p in model.named_parameters() if n.endswith(".weight")}
    for name, s in full.items():
        assert s.tokens == moments[name].tokens == 64
        assert torch.allclose(s.fisher.sum(1), moments[name].row_fisher, rtol=1e-4), name
        assert torch.allclose(s.fisher.sum(), moments[name].hessian.trace(), rtol=1e-4), name
        assert torch.allclose(moments[name].hessian, moments[name].hessian.T, rtol=1e-4, atol=1e-5)


def test_cost_predicts_the_rise_of_the_loss(case):
    """Against the true curvature, the mean over labels of the model's own: KL divergence on the same text."""
    model, config, dataset = case
    calibration = calibrate(model, config, dataset, 512, hessians=False)
    tokens = __import__("numpy").fromfile(dataset.train_shards[0], "<u2", offset=1024)[:512]
    ids = torch.from_numpy(tokens.astype("int64")).view(-1, 8)
    g = torch.Generator().manual_seed(1)
    predicted, real = [], []
    with torch.no_grad():
        before = model(ids).log_softmax(-1)
        for name, p in model.named_parameters():
            if name in calibration:
                change = 0.02 * p.std() * torch.randn(p.shape, generator=g)
                p.add_(change)
                after = model(ids).log_softmax(-1)
                real.append(F.kl_div(after, before, log_target=True, reduction="sum").item() / ids.numel())
                p.sub_(change)
                predicted.append(calibration[name].cost(change))
    ratio = torch.tensor(predicted) / torch.tensor(real)
    assert 0.5 < ratio.median() < 1.6 and ((ratio > 0.2) & (ratio < 4)).all(), ratio


def test_hooks_are_gone_and_runs_repeat(case):
    model, config, dataset = case
    first, second = (calibrate(model, config, dataset, 64) for _ in range(2))
    assert all(torch.equal(first[n].hessian, second[n].hessian) for n in first)
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
