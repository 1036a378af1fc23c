"""The shared codebook: round trips, what Lloyd's algorithm promises, and the price of bits."""

from itertools import pairwise

import pytest
import torch

from pgolf_core.quantization.schemes.codebook import as_vectors, cheapest, learn, lloyd_step, spread_entries, to_codes


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


def bits_and_error(tensors, codebook, rate_weight=0.0):
    """Sums over the tensors of bits per index and of relative squared error."""
    stored = [to_codes(w, codebook, rate_weight) for w in tensors]
    errors = [(w - t.dequantize()).square().sum() / w.square().sum() for w, t in zip(tensors, stored, strict=True)]
    return sum(entropy(t.indices) for t in stored), sum(errors).item()


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
    """Max 1960, table I: four levels for a normal distribution."""
    w = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    codebook = learn([w], 4, 1)
    expected = torch.tensor([-1.510, -0.4528, 0.4528, 1.510])
    torch.testing.assert_close(codebook.float()[:, 0], expected, atol=0.02, rtol=0)
    assert bits_and_error([w], codebook)[1] == pytest.approx(0.1175, rel=0.01)


@pytest.mark.parametrize(("size", "dimension", "rate_weight"), SHAPES)
def test_round_trip_is_idempotent(size, dimension, rate_weight):
    tensors = random_weights()
    codebook = learn(tensors, size, dimension, rate_weight)
    for w in tensors:
        stored = to_codes(w, codebook, rate_weight)
        assert stored.indices.dtype == torch.uint8 and stored.indices.shape == (w.size(0), w.size(1) // dimension)
        assert stored.scale.dtype == torch.float16 and stored.scale.shape == ()
        decoded = stored.dequantize()
        assert decoded.dtype == torch.float32 and decoded.shape == w.shape
        again = to_codes(decoded, codebook)
        assert torch.equal(again.indices, stored.indices) and torch.equal(again.dequantize(), decoded)


def test_scaled_weights_get_the_same_indices():
    (w,) = random_weights(1)
    codebook = learn([w], 32, 2)
    plain, scaled = to_codes(w, codebook), to_codes(w * 2.0**-5, codebook)
    assert torch.equal(plain.indices, scaled.indices) and scaled.scale == plain.scale * 2.0**-5


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
    tensors, prices = random_weights(), (0.0, 0.02, 0.1, 0.4)
    codebooks = [learn(tensors, 32, dimension, price) for price in prices]
    figures = [bits_and_error(tensors, book, price) for book, price in zip(codebooks, prices, strict=True)]
    assert all(fewer < more and larger > smaller for (more, smaller), (fewer, larger) in pairwise(figures))
    assert len(codebooks[0]) == 32 > len(codebooks[-1])  # entries nobody pays for are dropped


def test_price_on_bits_beats_the_plain_codebook_at_its_rate():
    tensors = random_weights()
    bits, error = bits_and_error(tensors, learn(tensors, 24, 1, 0.06), 0.06)
    plain_bits, plain_error = bits_and_error(tensors, learn(tensors, 8, 1))
    assert bits < plain_bits and error < plain_error


def test_equal_weights_give_equal_tables_in_order():
    one, two = (learn(random_weights(), 32, 2) for _ in range(2))
    assert torch.equal(one, two)
    assert one.dtype == torch.float16 and one.tolist() == sorted(one.tolist())


def test_few_distinct_vectors_are_the_table():
    w = torch.tensor([[1.0, -1.0, 1.0, 2.0], [-1.0, 1.0, 2.0, 2.0]])
    codebook = learn([w], 16, 1)
    assert codebook.shape == (3, 1)
    torch.testing.assert_close(to_codes(w, codebook).dequantize(), w, rtol=1e-3, atol=0)


def test_large_tables_have_wide_indices():
    tensors = random_weights(1)
    codebook = learn(tensors, 300, 2)
    indices = to_codes(tensors[0], codebook).indices
    assert indices.dtype == torch.int16 and indices.max() >= 256
    assert bits_and_error(tensors, codebook)[1] < 0.02


@pytest.mark.parametrize("rate_weight", [0.0, 100.0])
def test_zeros_stay_zeros(rate_weight):
    codebook = learn([*random_weights(1), torch.zeros(4, 8)], 8, 2)
    assert torch.equal(to_codes(torch.zeros(4, 8), codebook, rate_weight).dequantize(), torch.zeros(4, 8))


def test_bits_at_any_price_leave_a_finite_scale():
    for entries in ([[0.0], [5.0]], [[-0.01], [9.0]]):
        stored = to_codes(random_weights(1)[0], torch.tensor(entries).half(), rate_weight=1e6)
        assert entropy(stored.indices) == 0 and torch.isfinite(stored.scale) and stored.scale > 0


def test_refuses_columns_that_its_vectors_do_not_divide():
    with pytest.raises(ValueError, match="2 weights do not fit 5 columns"):
        learn([torch.ones(2, 5)], 2, 2)
