"""Generated weights begin as usual ones, come back from a file without their maps, and are priced by what they make."""

import pytest
import torch

from pgolf_core.knobs import ModelConfig
from pgolf_core.layers.generated import KINDS, legendre
from pgolf_core.model import GPT
from pgolf_core.quantization.calibration import calibrate

SHAPE = dict(vocab_size=61, num_layers=4, model_dim=32, num_heads=4, num_kv_heads=2)
IDS = torch.randint(61, (8, 8), generator=torch.Generator().manual_seed(3))


def model_of(**knobs) -> GPT:
    torch.manual_seed(0)
    return GPT(ModelConfig(**SHAPE | knobs))


def with_own_weights(model: GPT) -> GPT:
    """The same function of blocks that hold what was generated."""
    own = GPT(model.config.model_copy(update={"weights": "own"}))
    generated = {
        f"blocks.{i}.{kind}.weight": block.get_submodule(kind)(
            torch.eye(own.get_submodule(f"blocks.{i}.{kind}").in_features)
        ).T
        for i, block in enumerate(model.blocks)
        for kind in KINDS
    }
    others = {name: t for name, t in model.state_dict().items() if name in own.state_dict()}
    own.load_state_dict(others | generated)
    return own


def test_an_error_of_a_base_costs_in_every_block_the_square_of_its_coefficient():
    model = model_of(weights="basis", weight_bases=2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    ours, of_blocks = calibrate(model, [IDS], seed=5), calibrate(with_own_weights(model), [IDS], seed=5)
    assert ours.keys() == {name for name, _ in model.named_parameters() if name.endswith(".weight")}
    for kind, path in enumerate(KINDS):
        for j in range(2):
            base = ours[f"generator.bases.{path.replace('.', '_')}.{j}.weight"]
            own = [(of_blocks[f"blocks.{i}.{path}.weight"], model.generator.coefficients(kind, i)[j]) for i in range(4)]
            for part in ("hessian", "row_fisher"):
                expected = sum(c**2 * getattr(s, part) for s, c in own)
                assert (getattr(base, part) - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("weights", ["basis", "hypernetwork"])
def test_learned_coefficients_begin_as_shared_blocks(weights):
    model, shared = model_of(weights=weights, weight_bases=2), model_of(num_unique_blocks=2)
    state = shared.state_dict()
    for j, kind in ((j, kind) for j in range(2) for kind in KINDS):
        state[f"blocks.{j}.{kind}.weight"] = model.generator.bases[kind.replace(".", "_")][j].weight
    shared.load_state_dict(state | {"tok_emb.weight": model.tok_emb.weight})
    assert torch.equal(model(IDS), shared(IDS)) and model(IDS).std() > 0


def test_legendre_polynomials_are_orthogonal_and_keep_the_usual_scale():
    table = legendre(2001, 4)
    gram = table.T @ table / len(table)
    torch.testing.assert_close(gram / gram[0, 0], torch.diag(1 / torch.tensor([1.0, 3, 5, 7])), atol=2e-3, rtol=0)
    assert table.square().sum(1).mean() == pytest.approx(1) and legendre(1, 3).isfinite().all()


def test_random_maps_are_of_their_seed_alone_and_in_no_file():
    first, again, other = (model_of(weights="random", weight_rank=2, weight_seed=seed) for seed in (1, 1, 2))
    torch.manual_seed(9)
    again = GPT(again.config)
    again.load_state_dict(first.state_dict())
    assert not [name for name in first.state_dict() if name.endswith("map")]
    maps, same, others = (dict(m.named_buffers()) for m in (first, again, other))
    assert len(maps) == 4 * len(KINDS) == len({tuple(m.flatten()[:9].tolist()) for m in maps.values()})
    for name, drawn in maps.items():
        assert torch.equal(drawn, same[name]) and not torch.equal(drawn, others[name])
        assert drawn.std() == pytest.approx((3 * drawn.size(1)) ** -0.5, rel=0.1)  # as nn.Linear's
    assert torch.equal(first(IDS), again(IDS))


@pytest.mark.parametrize("weights", ["basis", "hypernetwork", "random"])
def test_outputs_of_generated_blocks_begin_at_zero(weights):
    model = model_of(weights=weights, weight_bases=3, weight_rank=2, orthogonal_init=weights == "basis")
    for block in model.blocks:
        assert not block.attn.proj(torch.randn(5, 32)).any() and not block.mlp.proj(torch.randn(5, 64)).any()
        assert block.mlp.fc(torch.randn(5, 32)).std() > 0.3
