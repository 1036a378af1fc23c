"""The model against recorded forward and backward passes, and properties that it must have."""

import pytest
import torch
from golden_vectors import golden, state_of

from pgolf_core.knobs import ModelConfig
from pgolf_core.model import GPT, skeleton

TINY = dict(vocab_size=61, num_layers=4, model_dim=32, num_heads=4, num_kv_heads=2)


def trained(**knobs) -> GPT:
    """A model whose zero-initialised matrices are not zero, so that every path carries signal."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(**TINY | knobs))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("name", ["combined", "shared", "dense", "windowed", "factorized", "untied"])
def test_golden(name):
    recorded, arrays = golden(f"model_{name}")
    model = GPT(ModelConfig(**{k: v for k, v in recorded.items() if k in ModelConfig.model_fields}))
    model.load_state_dict(state_of(arrays))  # the reference's parameter names
    ids, targets = arrays["input_ids"].long(), arrays["target_ids"].long()
    logits, expected = model(ids), arrays["logits"]
    assert (logits - expected).norm() / expected.norm() < 1e-5
    loss = model.loss(ids, targets)
    loss.backward()
    assert loss.item() == pytest.approx(recorded["loss"], rel=1e-5)
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters()}
    assert norms == pytest.approx(recorded["grad_norms"], rel=1e-5)


@pytest.mark.parametrize("window", [0, 5])
def test_no_token_sees_the_future_or_past_its_window(window):
    model = trained(window_size=window, num_layers=1)
    ids = torch.randint(61, (1, 24))
    changed = ids.clone()
    changed[0, 12] = (changed[0, 12] + 1) % 61
    differs = (model(ids) != model(changed)).any(dim=-1)[0]
    assert not differs[:12].any() and differs[12]
    assert not window or not differs[12 + window :].any()  # one layer reaches window - 1 tokens on
    assert window or differs[-1]


@pytest.mark.parametrize(
    "knobs", [{}, dict(tie_embeddings=False, orthogonal_init=True), dict(embed_dim=8, num_unique_blocks=2)]
)
def test_a_skeleton_has_the_shapes_of_the_model(knobs):
    config = ModelConfig(**TINY | knobs)
    of_skeleton, of_model = ({n: t.shape for n, t in m(config).state_dict().items()} for m in (skeleton, GPT))
    assert of_skeleton == of_model


def test_initial_loss_is_a_uniform_guess():
    torch.manual_seed(1)
    model = GPT(ModelConfig(**TINY))
    ids = torch.randint(61, (4, 33))
    assert model.loss(ids[:, :-1], ids[:, 1:]).item() == pytest.approx(torch.tensor(61.0).log().item(), abs=0.1)


def test_bfloat16_autocast_stays_near_float32():
    model = trained()
    ids = torch.randint(61, (2, 16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(ids).float()
    assert (half - model(ids)).norm() / model(ids).norm() < 0.05
