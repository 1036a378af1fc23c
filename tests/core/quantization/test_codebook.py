"""The shared codebook: round trips, what Lloyd's algorithm promises, and the price of bits."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf_core.quantization.schemes.codebook import (
    as_vectors,
    cheapest,
    encode,
    learn,
    lloyd_step,
    spread_entries,
)


def random_weights(count=3, rows=64, cols=48):
    """Matrices of unlike sizes and spreads, with tails heavier than a normal distribution's."""
    generator = torch.Generator().manual_seed(0)
    return [
        0.02 * 4.0**i * torch.randn(rows, cols, generator=generator) * torch.rand(rows, 1, generator=generator).add(0.5)
        for i in range(count)
    ]


def entropy(indices):
    """Order-0 bits an index."""
    share = torch.bincount(indices.flatten().long()).double()
    share = share[share > 0] / share.sum()
    return -(share * share.log2()).sum().item()


def normalised_error(w, codebook, **options):
    return ((w - encode(w, codebook, **options).dequantize()).square().mean() / w.square().mean()).item()


SHAPES = [(8, 1, 0.0), (16, 2, 0.0), (64, 4, 0.0), (16, 1, 0.05), (32, 2, 0.1)]


@pytest.mark.parametrize(("size", "dimension", "rate_weight"), SHAPES)
def test_lloyds_cost_never_rises(size, dimension, rate_weight):
    vectors, rms = as_vectors(random_weights(1)[0], dimension)
    vectors = vectors / rms
    entries = spread_entries(vectors, size, torch.Generator().manual_seed(0))
    penalty, costs = torch.zeros(size), []
    for _ in range(25):
        entries, penalty, cost = lloyd_step(vectors, entries, penalty, rate_weight)
        costs.append(cost)
    costs = costs[1:] if rate_weight else costs  # the first one is counted without a price on bits
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(costs))
    assert costs[-1] < 0.99 * costs[0]


def test_empty_cells_are_seeded_again():
    vectors = torch.linspace(-1, 1, 100)[:, None]
    entries = torch.tensor([[-0.5], [0.5], [90.0], [91.0]])
    for _ in range(60):
        entries, _, cost = lloyd_step(vectors, entries, torch.zeros(4), 0.0)
    assert cost == pytest.approx(0.25**2 / 3, rel=0.05)  # four equal cells of half-width 0.25


def test_normal_weights_get_the_lloyd_max_quantiser():
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(256, 512, generator=generator)
    codebook = learn([w], 4, 1)
    # Max 1960, table I: four levels for a normal distribution
    torch.testing.assert_close(
        codebook.float()[:, 0], torch.tensor([-1.510, -0.4528, 0.4528, 1.510]), atol=0.02, rtol=0
    )
    assert normalised_error(w, codebook) == pytest.approx(0.1175, rel=0.01)


@pytest.mark.parametrize(("size", "dimension", "rate_weight"), SHAPES)
def test_round_trip_is_idempotent(size, dimension, rate_weight):
    tensors = random_weights()
    codebook = learn(tensors, size, dimension, rate_weight)
    for w in tensors:
        stored = encode(w, codebook, rate_weight)
        assert stored.indices.dtype == torch.uint8 and stored.indices.shape == (w.size(0), w.size(1) // dimension)
        assert stored.scale.dtype == torch.float16 and stored.scale.shape == ()
        decoded = stored.dequantize()
        assert decoded.dtype == torch.float32 and decoded.shape == w.shape
        again = encode(decoded, codebook)
        assert torch.equal(again.indices, stored.indices) and torch.equal(again.dequantize(), decoded)


def test_scaled_weights_get_the_same_indices():
    (w,) = random_weights(1)
    codebook = learn([w], 32, 2)
    plain, scaled = encode(w, codebook), encode(w * 2.0**-5, codebook)
    assert torch.equal(plain.indices, scaled.indices) and scaled.scale == plain.scale * 2.0**-5


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**16), size=st.integers(1, 40), dimension=st.sampled_from([1, 2, 3, 6]))
def test_nearest_entry_is_nearest(seed, size, dimension):
    generator = torch.Generator().manual_seed(seed)
    codebook = torch.randn(size, dimension, generator=generator).half()
    w = torch.randn(10, 12, generator=generator)
    stored = encode(w, codebook)
    vectors = w.view(-1, 1, dimension) / stored.scale.float()
    squares = (vectors - codebook.float()).square().sum(dim=2)  # (vectors, size)
    taken = squares.gather(1, stored.indices.view(-1, 1).long())[:, 0]
    torch.testing.assert_close(taken, squares.min(dim=1).values, rtol=1e-4, atol=1e-4)


def test_cheapest_is_a_search_through_all(monkeypatch):
    monkeypatch.setattr("pgolf_core.quantization.schemes.codebook.CHUNK_SCORES", 100)
    generator = torch.Generator().manual_seed(0)
    vectors, entries = torch.randn(57, 3, generator=generator), torch.randn(9, 3, generator=generator)
    penalty = torch.rand(9, generator=generator)
    costs = (vectors[:, None] - entries).square().sum(dim=2) + penalty
    index, cost = cheapest(vectors, entries, penalty)
    assert torch.equal(index, costs.argmin(dim=1))
    torch.testing.assert_close(cost, costs.min(dim=1).values)


@pytest.mark.parametrize("dimension", [1, 2])
def test_bits_fall_and_error_rises_with_their_price(dimension):
    tensors = random_weights()
    bits, errors, sizes = [], [], []
    for rate_weight in (0.0, 0.02, 0.1, 0.4):
        codebook = learn(tensors, 32, dimension, rate_weight)
        bits.append(sum(entropy(encode(w, codebook, rate_weight).indices) for w in tensors))
        errors.append(sum(normalised_error(w, codebook, rate_weight=rate_weight) for w in tensors))
        sizes.append(len(codebook))
    assert all(after < before for before, after in pairwise(bits))
    assert all(after > before for before, after in pairwise(errors))
    assert sizes[0] == 32 > sizes[-1]  # entries nobody pays for are dropped


def test_price_on_bits_beats_the_plain_codebook_at_its_rate():
    tensors = random_weights()
    plain, priced = learn(tensors, 8, 1), learn(tensors, 24, 1, 0.06)
    assert sum(entropy(encode(w, priced, 0.06).indices) for w in tensors) < sum(
        entropy(encode(w, plain).indices) for w in tensors
    )
    assert sum(normalised_error(w, priced, rate_weight=0.06) for w in tensors) < sum(
        normalised_error(w, plain) for w in tensors
    )


def test_equal_weights_give_equal_tables_in_order():
    one, two = (learn(random_weights(), 32, 2) for _ in range(2))
    assert torch.equal(one, two)
    assert one.dtype == torch.float16 and one.tolist() == sorted(one.tolist())


def test_few_distinct_vectors_are_the_table():
    w = torch.tensor([[1.0, -1.0, 1.0, 2.0], [-1.0, 1.0, 2.0, 2.0]])
    codebook = learn([w], 16, 1)
    assert codebook.shape == (3, 1)
    torch.testing.assert_close(encode(w, codebook).dequantize(), w, rtol=1e-3, atol=0)


def test_large_tables_have_wide_indices():
    tensors = random_weights(1)
    codebook = learn(tensors, 300, 2)
    stored = encode(tensors[0], codebook)
    assert stored.indices.dtype == torch.int16 and stored.indices.max() >= 256
    assert normalised_error(tensors[0], codebook) < 0.02


@pytest.mark.parametrize("rate_weight", [0.0, 100.0])
def test_zeros_stay_zeros(rate_weight):
    codebook = learn([*random_weights(1), torch.zeros(4, 8)], 8, 2)
    assert torch.equal(encode(torch.zeros(4, 8), codebook, rate_weight).dequantize(), torch.zeros(4, 8))


def test_bits_at_any_price_leave_a_finite_scale():
    (w,) = random_weights(1)
    for entries in ([[0.0], [5.0]], [[-0.01], [9.0]]):
        stored = encode(w, torch.tensor(entries).half(), rate_weight=1e6)
        assert entropy(stored.indices) == 0 and torch.isfinite(stored.scale) and stored.scale > 0


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.tensor([[1.0, float("nan")]]), "not finite"),
        (torch.tensor([[1.0, float("inf")]]), "not finite"),
        (torch.zeros(0, 2), "empty"),
        (torch.ones(4), "not 2-D"),
        (torch.ones(2, 5), "2 weights do not fit 5 columns"),
    ],
)
def test_refuses_tensors(bad, message):
    codebook = torch.tensor([[0.0, 0.0], [1.0, 1.0]]).half()
    with pytest.raises(ValueError, match=message):
        learn([bad], 2, 2)
    with pytest.raises(ValueError, match=message):
        encode(bad, codebook)
