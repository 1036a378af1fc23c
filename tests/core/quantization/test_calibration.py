"""Statistics against gradients taken token by token, for every way in which a weight is used."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pgolf_core.config import RunConfig
from pgolf_core.model import GPT
from pgolf_core.parameters import EMBEDDING, RoleError, declare, matrix
from pgolf_core.quantization import calibration as calibration_module
from pgolf_core.quantization.calibration import calibrate, fisher_root

SHAPES = {
    "tied": {},
    "untied": {"tie_embeddings": False},
    "factorised": {"embed_dim": 16},
    "shared blocks": {"num_layers": 4, "num_unique_blocks": 2},
    "bases and own parts": {"weights": "basis", "weight_bases": 2, "weight_rank": 3, "weight_row_scale": True},
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
    """With one token in the sum there are no cross terms: both sums are of the square of autograd's own gradient."""
    model, config = case
    ids = IDS[:1, :1]
    calibration = calibrate(model, [ids], seed=5)
    squares = squared_gradients(model, calibration, ids, seed=5)
    shared = config.blocks < config.num_layers
    for name, s in calibration.items():
        tied = name in ("tok_emb.weight", "tok_emb_proj.weight") and config.tie_embeddings
        if tied or shared or name.startswith("generator."):
            continue  # used twice for one token: cross terms between the uses are left out by design
        assert torch.allclose(s.row_fisher, squares[name].sum(1), rtol=1e-4, atol=1e-9), name
        assert torch.allclose(s.hessian.diagonal(), squares[name].sum(0), rtol=1e-4, atol=1e-9), name


def squared_gradients(model, names, ids, seed):
    """Name -> square of autograd's gradient by the logits' random ones, summed over sequences."""
    generator, squares = torch.Generator().manual_seed(seed), dict.fromkeys(names, 0)
    for sequence in ids.split(1):
        model.zero_grad()
        logits = model(sequence).flatten(0, 1)
        logits.backward(fisher_root(logits.detach(), generator))
        squares = {name: total + model.get_parameter(name).grad.square() for name, total in squares.items()}
    return squares


def test_the_logits_gradients_have_the_fisher_information_as_second_moments_and_steadier_norms_where_they_are_peaked():
    g = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(1, 13, generator=g)
    p = logits[0].softmax(0)
    drawn = fisher_root(logits.expand(100_000, -1), g)
    assert ((drawn.T @ drawn) / len(drawn) - (p.diag() - p.outer(p))).abs().max() < 0.003
    assert drawn.sum(1).abs().max() < 1e-5  # a shift of all logits changes nothing
    of_labels = ((torch.eye(13) - p).square().sum(1) - (1 - p.square().sum())).square() @ p
    assert drawn.square().sum(1).var() < 0.5 * of_labels


def test_cost_predicts_the_rise_of_the_loss(case):
    """Against the true curvature, the mean over labels of the model's own: KL divergence on the same text."""
    model, _ = case
    calibration, ids = calibrate(model, IDS.split(16)), IDS
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


def test_pieces_and_panels_change_the_sums_by_rounding_alone(case, monkeypatch):
    model, _ = case
    whole = calibrate(model, [IDS])
    monkeypatch.setattr(calibration_module, "PIECE", 24)
    monkeypatch.setattr(calibration_module, "PANEL", 5)
    for name, s in calibrate(model, [IDS]).items():
        for now, once in ((s.hessian, whole[name].hessian), (s.row_fisher, whole[name].row_fisher)):
            assert (now - once).norm() < 1e-5 * once.norm(), name
        assert torch.equal(s.hessian, s.hessian.T)


def test_runs_repeat_and_leave_the_model_as_it_was(case):
    model, _ = case
    model.q_gains.requires_grad_(False)
    first, second = (calibrate(model, [IDS[:8]]) for _ in range(2))
    assert first.keys() == {name for name, _ in model.named_parameters() if name.endswith(".weight")}
    for name, s in first.items():
        assert s.tokens == 64 and torch.equal(s.hessian, second[name].hessian)
        assert torch.allclose(s.row_fisher.sum(), s.hessian.trace(), rtol=1e-4), name
        assert torch.allclose(s.hessian, s.hessian.T, rtol=1e-4, atol=1e-5), name
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
    s = calibrate(model, [ids], seed=2)["w"]
    expected = squared_gradients(model, ["w"], ids, seed=2)["w"]
    assert torch.allclose(s.row_fisher, expected.sum(1), rtol=1e-4)
    assert torch.allclose(s.hessian.diagonal(), expected.sum(0), rtol=1e-4)


def test_a_weight_that_the_model_does_not_use_is_an_error_with_its_name():
    with pytest.raises(RoleError, match="weight w is declared, but the model does not use it"):
        calibrate(Used("unused"), [IDS[:1] % 16])
