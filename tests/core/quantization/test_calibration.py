"""Statistics against gradients taken token by token, for every way in which a weight is used."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pgolf_core.config import RunConfig
from pgolf_core.model import GPT
from pgolf_core.parameters import EMBEDDING, RoleError, declare, matrix
from pgolf_core.quantization.calibration import calibrate

SHAPES = {
    "tied": {},
    "untied": {"tie_embeddings": False},
    "factorised": {"embed_dim": 16},
    "shared blocks": {"num_layers": 4, "num_unique_blocks": 2},
}


IDS = torch.randint(64, (64, 8), generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=SHAPES, ids=lambda name: name.replace(" ", "-"))
def case(request):
    knobs = dict(vocab_size=64, num_layers=2, model_dim=32, num_heads=2, num_kv_heads=1, train_seq_len=8)
    config = RunConfig(track="", train_batch_tokens=64, **knobs | SHAPES[request.param])
    torch.manual_seed(0)
    model = GPT(config.model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model, config


def test_one_token_is_its_gradient_squared(case):
    """With one token in the sum there are no cross terms: Fisher is the square of autograd's own gradient."""
    model, config = case
    ids = IDS[:1, :1]
    calibration = calibrate(model, [ids], hessians=False, seed=5)
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
    model, _ = case
    full = calibrate(model, [IDS[:8]], hessians=False)
    moments = calibrate(model, [IDS[:8]])
    assert full.keys() == moments.keys() == {n for n, p in model.named_parameters() if n.endswith(".weight")}
    for name, s in full.items():
        assert s.tokens == moments[name].tokens == 64
        assert torch.allclose(s.fisher.sum(1), moments[name].row_fisher, rtol=1e-4), name
        assert torch.allclose(s.fisher.sum(), moments[name].hessian.trace(), rtol=1e-4), name
        assert torch.allclose(moments[name].hessian, moments[name].hessian.T, rtol=1e-4, atol=1e-5)


def test_cost_predicts_the_rise_of_the_loss(case):
    """Against the true curvature, the mean over labels of the model's own: KL divergence on the same text."""
    model, _ = case
    calibration, ids = calibrate(model, IDS.split(16), hessians=False), IDS
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


def test_the_model_is_left_as_it_was_and_runs_repeat(case):
    model, _ = case
    model.q_gains.requires_grad_(False)
    first, second = (calibrate(model, [IDS[:8]]) for _ in range(2))
    assert all(torch.equal(first[n].hessian, second[n].hessian) for n in first)
    assert all(p.grad is None and p.requires_grad == (p is not model.q_gains) for p in model.parameters())
    assert model.training


class Used(nn.Module):
    """Logits of ids (B, T) by a table and two matrices; `use` says how w is used."""

    def __init__(self, use: str):
        super().__init__()
        torch.manual_seed(0)
        self.use = use
        self.table = nn.Parameter(torch.randn(16, 6))
        self.w = nn.Parameter(torch.randn(6, 6))
        self.out = nn.Parameter(torch.randn(16, 6))
        declare(declare(self, EMBEDDING, "table"), matrix(), "w", "out")

    def forward(self, ids):
        x = F.embedding(ids, self.table)
        x += 1  # changing a recorded output in place is allowed
        w, out = self.w, self.out
        match self.use:
            case "F.linear":
                x = F.linear(x, w.T)
            case "x @ w":
                x = x @ w
            case "matmul":
                x = torch.matmul(x, w)
            case "left of x":
                x = (w.T @ x.flatten(0, 1).T).T.view_as(x)
            case "generated":  # the product of two weights is a weight that nobody declared
                out = out @ w.T
            case "generated by F.linear":
                out = F.linear(out, w)
            case "unused":
                pass
            case "in a sum":
                x = (x[..., None] * w).sum(-2)
        return x @ out.T


@pytest.mark.parametrize("use", ["x @ w", "matmul", "left of x"])
def test_products_written_differently_have_the_same_statistics(use):
    ids = [IDS[:4] % 16]
    expected, found = (calibrate(Used(name), ids) for name in ("F.linear", use))
    for name in ("table", "w", "out"):
        assert torch.allclose(found[name].hessian, expected[name].hessian, rtol=1e-4), name
        assert torch.allclose(found[name].row_fisher, expected[name].row_fisher, rtol=1e-4), name


@pytest.mark.parametrize("use", ["generated", "generated by F.linear", "in a sum"])
def test_a_weight_used_in_another_way_has_the_squared_gradient_of_each_sequence(use):
    model, ids = Used(use), IDS[:2] % 16
    full, moments = calibrate(model, [ids], hessians=False, seed=2), calibrate(model, [ids], seed=2)
    generator, expected = torch.Generator().manual_seed(2), 0
    for sequence in ids.split(1):
        model.zero_grad()
        logits = model(sequence).flatten(0, 1)
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator).flatten()
        F.cross_entropy(logits, drawn, reduction="sum").backward()
        expected = expected + model.w.grad.square()
    assert torch.allclose(full["w"].fisher, expected, rtol=1e-4)
    assert torch.allclose(moments["w"].row_fisher, expected.sum(1), rtol=1e-4)
    assert torch.allclose(moments["w"].hessian.diagonal(), expected.sum(0), rtol=1e-4)
    assert full["w"].tokens == ids.numel()


def test_a_weight_that_the_model_does_not_use_is_an_error_with_its_name():
    with pytest.raises(RoleError, match="weight w is declared, but the model does not use it"):
        calibrate(Used("unused"), [IDS[:1] % 16])
