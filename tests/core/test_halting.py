"""Tokens that leave loops: by how many passes, in one graph, and with none left early the plain loop."""

import itertools

import pytest
import torch

from pgolf_core.config import ConfigError, RunConfig
from pgolf_core.knobs import ModelConfig
from pgolf_core.layers.halting import START
from pgolf_core.model import GPT

LOOP = dict(loop_start=1, loop_end=2, loop_extra=2)
SHAPE = dict(vocab_size=61, num_layers=4, model_dim=24, num_heads=4, num_kv_heads=2) | LOOP
GATE = dict(halting="act")


def model_of(**knobs) -> GPT:
    """A model in which every path carries signal, the same weights for all knobs of scoring."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(**SHAPE | knobs)).eval()
    for name, parameter in model.named_parameters():
        own = torch.Generator().manual_seed(len(name))
        parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=own))
    return model


def mean_passes(model: GPT, ids: torch.Tensor) -> float:
    seen = []
    model.halting.register_forward_hook(lambda halting, inputs, output: seen.append(output[1]))
    with torch.no_grad():
        model(ids)
    return [exits for exits in seen if exits][-1].passes.mean().item()


@pytest.fixture
def ids():
    return torch.randint(61, (3, 16), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("passes", [0, 3])
@pytest.mark.parametrize("gate", [{}, GATE], ids=["plain", "gated"])
def test_all_passes_are_the_plain_loop_to_the_bit(ids, passes, gate):
    assert torch.equal(model_of(**gate, halting_eval="fixed", halting_passes=passes)(ids), model_of()(ids))


def test_one_pass_is_every_layer_once(ids):
    once = model_of(halting_eval="fixed", halting_passes=1)
    called = []
    for i, block in enumerate(once.blocks):
        block.register_forward_hook(lambda *_, i=i: called.append(i))
    once(ids)
    assert called == [0, 1, 2, 3]


@pytest.mark.parametrize("bias", [-9.0, START, 0.0, 9.0])
def test_ways_of_scoring_agree_where_the_gate_is_certain_and_passes_are_within_one_and_all(ids, bias):
    ways = [dict(halting_eval="expected"), dict(halting_eval="threshold", halting_threshold=0.6)]
    models = [model_of(**GATE | way) for way in ways]
    for model in models:
        model.halting.weight.data.zero_()
        model.halting.bias.data.fill_(bias)
    soft, hard = (mean_passes(model, ids) for model in models)
    leaving = torch.tensor(bias).sigmoid().item()
    assert soft == pytest.approx(1 + (1 - leaving) + (1 - leaving) ** 2, abs=1e-5)
    assert hard == (3 if bias < 0 else 2 if bias == 0 else 1)
    if abs(bias) == 9:
        torch.testing.assert_close(models[0](ids), models[1](ids), atol=2e-2, rtol=0)


def test_a_lower_threshold_takes_fewer_passes_and_tokens_differ(ids):
    def taken(threshold):
        return mean_passes(model_of(**GATE, halting_eval="threshold", halting_threshold=threshold), ids)

    passes = [taken(threshold) for threshold in (0.05, 0.2, 0.5, 0.9)]
    assert passes == sorted(passes) and passes[0] < passes[-1] and passes[1] % 1


def test_later_tokens_change_no_logits_of_earlier_ones(ids):
    changed = ids.clone()
    changed[:, 9:] = (changed[:, 9:] + 7) % 61
    for way in ("expected", "threshold"):
        model = model_of(**GATE, halting_eval=way)
        a, b = model(ids), model(changed)
        assert torch.equal(a[:, :9], b[:, :9]) and not torch.equal(a, b), way


def test_the_loss_is_one_graph_whatever_tokens_do():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = model_of(**GATE, ponder_cost=0.1).train()
    model.positions(torch.empty(1, 16, 0))
    loss = torch.compile(model.loss, fullgraph=True, dynamic=False, backend=count)
    for bias in (-9.0, 0.0, 9.0):
        model.halting.bias.data.fill_(bias)
        x, y = torch.randint(61, (2, 2, 16)).unbind()
        assert loss(x, y).item() == pytest.approx(model.loss(x, y).item(), rel=1e-5)
    assert len(graphs) == 1


def trained_passes(ponder_cost: float) -> float:
    """Mean passes of a model after some steps on a text that repeats itself."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(**SHAPE | GATE, ponder_cost=ponder_cost))
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    text = torch.randint(61, (7,)).repeat(40)
    for step in range(40):
        ids = text[step : step + 65].unfold(0, 17, 16)
        model.loss(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return mean_passes(model.eval(), text[None, :64])


def test_mean_passes_fall_as_the_ponder_cost_rises():
    passes = [trained_passes(cost) for cost in (0.0, 0.001, 0.003, 0.01)]
    assert all(more > less + 0.02 for more, less in itertools.pairwise(passes)), passes


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        (dict(halting="act"), "there are no loops to leave; set loop_extra"),
        (dict(halting_eval="fixed"), "there are no loops to leave; set loop_extra"),
        (LOOP | dict(halting_eval="threshold"), "halting_eval=threshold needs the gate of halting=act"),
        (LOOP | dict(halting_eval="fixed", halting_passes=4), "halting_passes=4 is more than the passes of"),
    ],
)
def test_knobs_that_cannot_work_are_named(knobs, says):
    with pytest.raises(ConfigError, match=says):
        RunConfig({}, **knobs)
