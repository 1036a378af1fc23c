"""Low-rank residuals: what they store comes back, and what they minimise is what they say."""

from itertools import pairwise

import pytest
import torch

from pgolf_core.quantization.lowrank import LowRank, dequantize_factor, low_rank, quantize_factor

EVEN = torch.eye(40), torch.ones(48)


def random_residual(rows=48, cols=40, seed=0):
    """A falling spectrum, as residuals of trained weights have, on top of noise."""
    generator = torch.Generator().manual_seed(seed)
    left, right, noise = (torch.randn(shape, generator=generator) for shape in ((rows, 6), (6, cols), (rows, cols)))
    return 0.01 * (left * 0.5 ** torch.arange(6)) @ right + 0.003 * noise


def random_weights(rows=48, cols=40, seed=1):
    """Second moments of correlated inputs of unlike sizes, and an importance for each row."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(cols, cols, generator=generator) * torch.logspace(-1, 1, cols)
    inputs = torch.randn(4 * cols, cols, generator=generator) @ mix
    return inputs.T @ inputs / len(inputs), torch.rand(rows, generator=generator) ** 4


def weighted_sq_error(residual, hessian, row_weight):
    """The sum over rows i of row_weight_i · r_i H r_iᵀ."""
    r = residual.double()
    return (row_weight.double() @ (r @ hessian.double() * r).sum(dim=1)).item()


def error_left(rank, bits, group, weights, judged_by=None):
    """weighted_sq_error of what a fit under `weights` leaves of the residual."""
    residual = random_residual()
    fitted = low_rank(residual, rank, bits, group, *weights)
    return weighted_sq_error(residual - fitted.dequantize(), *(judged_by or weights))


@pytest.mark.parametrize("size", [2.0**-20, 2.0**-10, 1.0])
@pytest.mark.parametrize(("rank", "kept"), [(1, 1), (3, 3), (8, 3)])
def test_true_low_rank_comes_back(rank, kept, size):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randint(-99, 100, shape, generator=generator).float() for shape in ((30, kept), (kept, 50)))
    residual = size * (left @ right)  # whole numbers, so nothing but rounding in the SVD is left beyond rank `kept`
    after = residual - low_rank(residual, rank, 16, 64, torch.eye(50), torch.ones(30)).dequantize()
    assert after.norm() < 2**-11 * residual.norm()  # half a unit in the last place of float16, relative


@pytest.mark.parametrize(
    ("weights", "bits", "excess"),
    [(EVEN, 16, 1.0001), (EVEN, 8, 1.005), (random_weights(), 16, 1.1)],  # damping moves the weighted optimum a little
    ids=["even-16", "even-8", "weighted-16"],
)
def test_the_weighted_error_is_that_of_the_truncated_svd(weights, bits, excess):
    hessian, row_weight = (t.double() for t in weights)
    rooted = row_weight.sqrt()[:, None] * random_residual().double() @ torch.linalg.cholesky(hessian)
    tail = torch.linalg.svdvals(rooted)[4:].square().sum().item()
    assert (1 - 1e-12) * tail <= error_left(4, bits, 64, weights) < excess * tail


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("given", ["hessian", "row_weight", "both"])
def test_weights_lower_the_weighted_error(bits, given):
    hessian, row_weight = random_weights()
    weights = (EVEN[0] if given == "row_weight" else hessian, EVEN[1] if given == "hessian" else row_weight)
    assert error_left(4, bits, 64, weights) < 0.97 * error_left(4, bits, 64, EVEN, judged_by=weights)


def test_weights_are_free_of_scale_and_equal_inputs_give_equal_bytes():
    hessian, row_weight = random_weights()
    plain = low_rank(random_residual(), 3, 4, 16, hessian, row_weight).arrays()
    scaled = low_rank(random_residual(), 3, 4, 16, hessian * 2.0**-20, row_weight * 2.0**20).arrays()
    assert all(torch.equal(plain[kind], scaled[kind]) for kind in plain)


def test_singular_values_are_split_evenly():
    fitted = low_rank(100 * random_residual(), 4, 16, 64, *EVEN)
    torch.testing.assert_close(fitted.left.float().norm(dim=0), fitted.right.float().norm(dim=1), rtol=0.01, atol=0)


@pytest.mark.parametrize(
    ("bits", "weights"), [(2, EVEN), *((bits, w) for bits in (3, 4, 8, 16) for w in (EVEN, random_weights()))]
)
def test_error_never_grows_with_rank(bits, weights):
    errors = [weighted_sq_error(random_residual(), *weights)]
    errors += [error_left(rank, bits, 16, weights) for rank in (1, 2, 4, 8, 16, 32)]
    assert all(after < before for before, after in pairwise(errors))


def test_error_falls_with_bits():
    errors = [error_left(8, bits, 16, EVEN) for bits in (2, 3, 4, 6, 8, 16)]
    assert errors == sorted(errors, reverse=True) and errors[0] > 1.1 * errors[-1]


def test_right_factor_makes_up_for_the_left_ones_rounding():
    residual = random_residual()
    stored = low_rank(residual, 4, 3, 64, *EVEN)
    left = dequantize_factor(stored.left, stored.left_scale, stored.group, dim=0).double()
    _, s, v = torch.linalg.svd(residual.double(), full_matrices=False)
    naive, naive_scale = quantize_factor(s[:4].sqrt()[:, None] * v[:4], 3, 64, dim=1)
    naive = left @ dequantize_factor(naive, naive_scale, 64, dim=1).double()
    assert (residual - stored.dequantize()).norm() < (residual - naive).norm()


@pytest.mark.parametrize("bits", [2, 5, 8, 16])
@pytest.mark.parametrize("group", [1, 7, 64, 1000])
def test_storage_comes_back_and_is_the_product(bits, group):
    fitted = low_rank(random_residual(), 5, bits, group, *random_weights())
    arrays = fitted.arrays()
    assert arrays["left"].shape == (48, 5) and arrays["right"].shape == (5, 40)
    left, right = arrays["left"].double(), arrays["right"].double()
    if bits == 16:
        assert set(arrays) == {"left", "right"} and arrays["left"].dtype == arrays["right"].dtype == torch.float16
    else:
        assert arrays["left"].dtype == arrays["right"].dtype == torch.int8
        assert arrays["left_scale"].shape == (-(-48 // group), 5) and arrays["left_scale"].dtype == torch.float16
        assert arrays["right_scale"].shape == (5, -(-40 // group)) and arrays["right_scale"].dtype == torch.float16
        assert max(arrays["left"].abs().max(), arrays["right"].abs().max()) == 2 ** (bits - 1) - 1
        left *= arrays["left_scale"].double().repeat_interleave(group, 0)[:48]
        right *= arrays["right_scale"].double().repeat_interleave(group, 1)[:, :40]
    again = LowRank.from_arrays({name: t.clone() for name, t in arrays.items()}, group).dequantize()
    assert again.dtype == torch.float32 and torch.equal(again, fitted.dequantize())
    torch.testing.assert_close(again.double(), left @ right, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_group_quantiser_has_the_grids_points_for_fixed_points(bits, dim):
    generator = torch.Generator().manual_seed(0)
    largest = 2 ** (bits - 1) - 1
    q = torch.randint(-largest, largest + 1, (20, 30), generator=generator).to(torch.int8)
    q[::4, :] = q[:, ::4] = largest  # every group reaches its range
    scale = 2.0 ** -torch.arange(1, 5 if dim == 0 else 7).float()
    scale = (scale[:, None].expand(4, 30) if dim == 0 else scale.expand(20, 6)).half()  # groups of 5
    again, again_scale = quantize_factor(dequantize_factor(q, scale, 5, dim), bits, 5, dim)
    assert torch.equal(again, q) and torch.equal(again_scale, scale)


@pytest.mark.parametrize("bits", [2, 8, 16])
def test_nothing_lost_gives_nothing_back(bits):
    fitted = low_rank(torch.zeros(48, 40), 3, bits, 64, *EVEN)
    assert not any(t.any() for t in fitted.arrays().values()) and not fitted.dequantize().any()


@pytest.mark.parametrize("bits", [4, 16])
def test_unseen_columns_and_weightless_rows_stay_bounded(bits):
    residual = random_residual()
    hessian, row_weight = random_weights()
    hessian[:, :10] = hessian[:10] = 0
    row_weight[:10] = 0
    assert low_rank(residual, 8, bits, 16, hessian, row_weight).dequantize().norm() < 2 * residual.norm()
    silent = low_rank(residual, 8, bits, 16, torch.zeros(40, 40), torch.zeros(48)).dequantize()
    assert (residual - silent).norm() < 0.5 * residual.norm()  # weights of zero do no harm
