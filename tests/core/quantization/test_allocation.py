"""The solver lands under its cap, gives bytes to the sensitive tensors, and says when nothing fits."""

import re
from types import SimpleNamespace

import pytest
import torch

from pgolf_core.artifact.format import pack
from pgolf_core.config import RunConfig
from pgolf_core.quantization import allocation
from pgolf_core.quantization.allocation import (
    AllocationError,
    SizeEstimate,
    residuals_worth_their_bytes,
    search,
    solve,
    step_grids,
)
from pgolf_core.quantization.calibration import Statistics
from pgolf_core.quantization.gptq import factorize_hessian
from pgolf_core.quantization.grids import step_grid
from pgolf_core.quantization.stored import Quantized


def solved(model, cap: int, code: int = 0, **knobs):
    """The solver's model, and the bytes of its file and code."""
    config = RunConfig(allocation="solve", codec="ans", cap_bytes=cap, **knobs).export
    quantized = solve(*model, config, lambda quantized: len(pack(quantized, "ans").bytes) + code)
    return quantized, len(pack(quantized, "ans").bytes) + code


def statistics(rows: int, cols: int, sensitivity: float = 1.0, seed: int = 0) -> Statistics:
    g = torch.Generator().manual_seed(seed)
    inputs = torch.randn(4 * cols, cols, generator=g) @ torch.randn(cols, cols, generator=g)
    hessian = inputs.T @ inputs
    return Statistics(sensitivity * (0.1 + torch.rand(rows, generator=g)) * hessian.trace(), hessian, 4 * cols)


@pytest.fixture(scope="module")
def model():
    g = torch.Generator().manual_seed(1)
    weights = {f"blocks.{i}.mlp.fc.weight": torch.randn(320, 48, generator=g) for i in range(4)}
    calibration = {name: statistics(320, 48, sensitivity=16.0**-i, seed=i) for i, name in enumerate(weights)}
    return weights, {"attn_scales": torch.ones(4, 96)}, calibration


@pytest.fixture(scope="module")
def at_30_000(model):
    return solved(model, 30_000)[0].tensors


@pytest.mark.parametrize("budget, code", [(8_000, 0), (25_000, 5_000), (60_000, 0)])
def test_lands_at_the_cap_and_never_over(model, budget, code):
    _, size = solved(model, budget + code, code)
    assert 0.998 * (budget + code) <= size <= budget + code


@pytest.mark.parametrize("budget", [12_000, 25_000, 60_000])
def test_few_files_are_made_on_the_way(model, budget):
    made = []

    def file_bytes(quantized):
        if quantized.tensors:
            made.append(quantized)
        return len(pack(quantized, "ans").bytes)

    solve(*model, RunConfig(allocation="solve", codec="ans", cap_bytes=budget).export, file_bytes)
    assert len(made) <= 4


def test_step_squared_times_sensitivity_is_the_same_everywhere(model, at_30_000):
    """Up to the quarters of a power of two that exponents are rounded to."""
    calibration = model[2]
    levels = []
    for name, t in at_30_000.items():
        s = calibration[name]
        sensitivity = (s.row_weight / s.tokens)[:, None] * factorize_hessian(s.hessian).column_weight
        levels.append((t.step_size().square() * sensitivity).log2())
    levels = torch.cat([level.flatten() for level in levels])
    assert (levels - levels.mean()).abs().max() < 2 * 2 * 0.125 + 0.05


def test_steps_are_finer_in_more_sensitive_tensors(at_30_000):
    sizes = [t.q.abs().float().mean() for t in at_30_000.values()]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 8 * sizes[-1]


def test_beats_equal_steps_of_the_same_bytes(model):
    weights, floats, calibration = model

    def cost(quantized):
        return sum(calibration[n].cost(t.dequantize() - weights[n]) for n, t in quantized.tensors.items())

    equal = Quantized({n: step_grid(w, 0.5).round(w) for n, w in weights.items()}, {}, floats)
    quantized, _ = solved(model, len(pack(equal, "ans").bytes))
    assert cost(quantized) < 0.3 * cost(equal)


def test_the_coarsest_steps_meet_a_cap_and_nothing_a_smaller_one(model):
    with pytest.raises(AllocationError, match="cap_bytes=100: with the coarsest steps file and code take") as refused:
        solved(model, 100)
    smallest = int(re.search(r"take ([\d,]+) bytes", str(refused.value))[1].replace(",", ""))
    for cap in (smallest, smallest + 15, smallest + 50, smallest + 200):
        assert smallest <= solved(model, cap)[1] <= cap
    with pytest.raises(AllocationError):
        solved(model, smallest - 1)


@pytest.mark.parametrize(("shape", "most"), [((8, 256), 0.4), ((256, 128), 0.1)])  # small ones' tables vary
def test_the_first_file_is_near_its_cap(shape, most):
    g, tried = torch.Generator().manual_seed(2), []
    weights = {f"blocks.{i}.mlp.fc.weight": torch.randn(shape, generator=g) for i in range(6)}
    calibration = {name: statistics(*shape, sensitivity=1.0, seed=i) for i, name in enumerate(weights)}
    cap = round(2.5 / 8 * 6 * shape[0] * shape[1])

    def file_bytes(quantized):
        tried.append(len(pack(quantized, "ans").bytes))
        return tried[-1]

    solve(weights, {}, calibration, RunConfig(allocation="solve", codec="ans", cap_bytes=cap).export, file_bytes)
    assert tried[1] == pytest.approx(cap, rel=most)  # the first is without weights


def test_a_cap_beyond_need_gets_the_finest_steps(model):
    weights, floats, calibration = model
    weights = {name: w * (1 + 9 * (w == w.max())) for name, w in list(weights.items())[:2]}  # an outlier each
    quantized, size = solved((weights, floats, calibration), 10**6)
    count = sum(w.numel() for w in weights.values())
    assert count < size < 4 * count  # more than eight bits a weight
    below = solved((weights, floats, calibration), size - 20)[1]  # a cap that the finest steps miss by little
    assert 0.99 * size < below <= size - 20
    for name, t in quantized.tensors.items():
        assert t.q.abs().max() < 32_767  # nothing is clipped, so finer is never worse
        assert (t.dequantize() - weights[name]).abs().max() < 4 * t.step_size().max()  # compensation moves some further


def test_residuals_only_where_they_pay(model, monkeypatch):
    """For nothing every tensor takes one, at any price none; and the code that reads them counts under the cap."""
    weights, _, calibration = model
    knobs = dict(int8_residual_rank=2, int8_residual_bits=4)
    config = RunConfig(allocation="solve", codec="ans", **knobs).export
    quantized, _ = solved(model, 12_000)
    assert residuals_worth_their_bytes(quantized, 0.0, weights, calibration, config) == tuple(weights)
    assert residuals_worth_their_bytes(quantized, 1e9, weights, calibration, config) == ()
    monkeypatch.setattr(allocation, "residuals_worth_their_bytes", lambda *_: tuple(weights))
    keep = lambda *values, key=None: values[0][1] if key else min(*values)  # noqa: E731, although they lose
    monkeypatch.setattr(allocation, "min", keep, raising=False)

    def file_bytes(q):
        return len(pack(q, "ans").bytes) + (3_000 if q.residuals else 0)

    quantized = solve(*model, config.model_copy(update={"cap_bytes": 20_000}), file_bytes)
    assert quantized.residuals.keys() == weights.keys()
    assert 0.998 * 17_000 < len(pack(quantized, "ans").bytes) <= 17_000


@pytest.mark.parametrize(
    "size, finest, tries",
    [(lambda lam: 900 if lam > 1e-5 else 1100, 1e-9, 24), (lambda lam: min(900, round(1e-2 / lam)), 1e-5, 3)],
    ids=["jumps-past-the-window", "stops-growing"],
)
def test_search_takes_the_finest_that_fits(size, finest, tries):
    tried = []

    def at(lam):
        tried.append(lam)
        return SimpleNamespace(lam=lam, bytes=size(lam))

    sizes = SizeEstimate(lambda lam: 1e-2 / lam, 0, 1000, (finest, 1e9))
    assert search(at, 1000, sizes).bytes == 900 and len(tried) <= tries


def test_a_tensor_without_information_takes_the_coarsest_steps():
    w = torch.randn(8, 16)
    silent = Statistics(torch.zeros(8), torch.zeros(16, 16), 64)
    grid = step_grids(w, silent, factorize_hessian(silent.hessian))[0](1e-4)
    assert torch.isfinite(grid.step_size()).all() and grid.step_size().min() > 3 * w.std()


def test_an_outlier_beyond_what_float16_holds_is_stored_whole():
    """Its tensor's rms is no float16, a step of it is."""
    w = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    w[3, 5] = 3e6
    even = Statistics(torch.ones(24), torch.eye(16), 1)
    for lam in (1e-9, 1e-4, 1e9):
        t = step_grids(w, even, factorize_hessian(even.hessian))[0](lam).round(w)
        assert ((t.dequantize() - w).abs() <= 0.51 * t.step_size()).all() and t.scale <= 2**15
