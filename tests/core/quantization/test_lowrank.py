"""Low-rank residuals: what they store comes back, and what they minimise is what they say."""

from itertools import pairwise

import pytest
import torch

from pgolf_core.quantization.lowrank import LowRank, dequantize_factor, low_rank, quantize_factor


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


def weighted_sq_error(residual, hessian=None, row_weight=None):
    """The sum over rows i of row_weight_i · r_i H r_iᵀ; without weights the squared norm."""
    r = residual.double()
    per_row = ((r if hessian is None else r @ hessian.double()) * r).sum(dim=1)
    return (per_row if row_weight is None else per_row * row_weight.double()).sum().item()


@pytest.mark.parametrize("size", [2.0**-20, 2.0**-10, 1.0])
@pytest.mark.parametrize(("rank", "kept"), [(1, 1), (3, 3), (8, 3)])
def test_true_low_rank_comes_back(rank, kept, size):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randint(-99, 100, shape, generator=generator).float() for shape in ((30, kept), (kept, 50)))
    residual = size * (left @ right)  # whole numbers, so nothing but rounding in the SVD is left beyond rank `kept`
    after = residual - low_rank(residual, rank, 16, 64).dense()
    assert after.norm() < 2**-11 * residual.norm()  # half a unit in the last place of float16, relative


@pytest.mark.parametrize("bits", [16, 8])
def test_without_weights_it_is_the_truncated_svd(bits):
    residual = random_residual()
    tail = torch.linalg.svdvals(residual.double())[4:].square().sum().item()
    after = weighted_sq_error(residual - low_rank(residual, 4, bits, 64).dense())
    assert tail <= after < tail * (1.0001 if bits == 16 else 1.005)


def test_with_weights_it_is_the_optimum_of_the_weighted_error():
    residual = random_residual()
    hessian, row_weight = random_weights()
    rooted = row_weight.double().sqrt()[:, None] * residual.double() @ torch.linalg.cholesky(hessian.double())
    tail = torch.linalg.svdvals(rooted)[4:].square().sum().item()
    after = weighted_sq_error(
        residual - low_rank(residual, 4, 16, 64, hessian, row_weight).dense(), hessian, row_weight
    )
    assert tail <= after < 1.1 * tail  # damping moves the optimum a little


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("given", [("hessian",), ("row_weight",), ("hessian", "row_weight")])
def test_weights_lower_the_weighted_error(bits, given):
    residual = random_residual()
    weights = dict(zip(("hessian", "row_weight"), random_weights(), strict=True))
    weights = {name: weights[name] for name in given}
    blind = weighted_sq_error(residual - low_rank(residual, 4, bits, 64).dense(), **weights)
    assert weighted_sq_error(residual - low_rank(residual, 4, bits, 64, **weights).dense(), **weights) < 0.97 * blind


def test_weights_are_free_of_scale():
    residual = random_residual()
    hessian, row_weight = random_weights()
    plain = low_rank(residual, 3, 4, 16, hessian, row_weight)
    scaled = low_rank(residual, 3, 4, 16, hessian * 2.0**-20, row_weight * 2.0**20)
    assert torch.equal(plain.dense(), scaled.dense())


def test_singular_values_are_split_evenly():
    fitted = low_rank(100 * random_residual(), 4, 16, 64)
    torch.testing.assert_close(fitted.left.float().norm(dim=0), fitted.right.float().norm(dim=1), rtol=0.01, atol=0)


@pytest.mark.parametrize(
    ("bits", "weighted"), [(2, False), *((bits, weighted) for bits in (3, 4, 8, 16) for weighted in (False, True))]
)
def test_error_never_grows_with_rank(bits, weighted):
    residual = random_residual()
    weights = random_weights() if weighted else (None, None)
    errors = [weighted_sq_error(residual, *weights)]
    for rank in (1, 2, 4, 8, 16, 32):
        errors.append(weighted_sq_error(residual - low_rank(residual, rank, bits, 16, *weights).dense(), *weights))
    assert all(after < before for before, after in pairwise(errors))


def test_error_falls_with_bits():
    residual = random_residual()
    errors = [weighted_sq_error(residual - low_rank(residual, 8, bits, 16).dense()) for bits in (2, 3, 4, 6, 8, 16)]
    assert errors == sorted(errors, reverse=True) and errors[0] > 1.1 * errors[-1]


def test_right_factor_makes_up_for_the_left_ones_rounding():
    residual = random_residual()
    stored = low_rank(residual, 4, 3, 64)
    left = dequantize_factor(stored.left, stored.left_scale, stored.group, dim=0).double()
    _, s, v = torch.linalg.svd(residual.double(), full_matrices=False)
    naive, naive_scale = quantize_factor(s[:4].sqrt()[:, None] * v[:4], 3, 64, dim=1)
    naive = left @ dequantize_factor(naive, naive_scale, 64, dim=1).double()
    assert weighted_sq_error(residual - stored.dense()) < weighted_sq_error(residual - naive)


@pytest.mark.parametrize("bits", [2, 5, 8, 16])
@pytest.mark.parametrize("group", [1, 7, 64, 1000])
def test_storage_comes_back(bits, group):
    hessian, row_weight = random_weights()
    fitted = low_rank(random_residual(), 5, bits, group, hessian, row_weight)
    arrays = fitted.arrays()
    assert arrays["left"].shape == (48, 5) and arrays["right"].shape == (5, 40)
    if bits == 16:
        assert set(arrays) == {"left", "right"} and arrays["left"].dtype == arrays["right"].dtype == torch.float16
    else:
        assert arrays["left"].dtype == arrays["right"].dtype == torch.int8
        assert arrays["left_scale"].shape == (-(-48 // group), 5) and arrays["left_scale"].dtype == torch.float16
        assert arrays["right_scale"].shape == (5, -(-40 // group)) and arrays["right_scale"].dtype == torch.float16
        assert max(arrays["left"].abs().max(), arrays["right"].abs().max()) == 2 ** (bits - 1) - 1
    copied = {name: t.clone() for name, t in arrays.items()}
    assert torch.equal(LowRank.from_arrays(copied, group).dense(), fitted.dense())


def test_dense_is_the_product():
    fitted = low_rank(random_residual(), 12, 4, 16)
    left = fitted.left.double() * fitted.left_scale.double().repeat_interleave(16, 0)[:48]
    right = fitted.right.double() * fitted.right_scale.double().repeat_interleave(16, 1)[:, :40]
    assert fitted.dense().dtype == torch.float32
    torch.testing.assert_close(fitted.dense().double(), left @ right, rtol=1e-5, atol=1e-8)


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
    fitted = low_rank(torch.zeros(9, 12), 3, bits, 64)
    assert not any(t.any() for t in fitted.arrays().values())
    assert torch.equal(fitted.dense(), torch.zeros(9, 12))


def test_unseen_columns_and_weightless_rows_stay_bounded():
    residual = random_residual()
    hessian, row_weight = random_weights()
    hessian[:, :10] = hessian[:10] = 0
    row_weight[:10] = 0
    for bits in (4, 16):
        dense = low_rank(residual, 8, bits, 16, hessian, row_weight).dense()
        assert dense.norm() < 2 * residual.norm()
        silent = low_rank(residual, 8, bits, 16, torch.zeros(40, 40), torch.zeros(48)).dense()
        assert (residual - silent).norm() < 0.5 * residual.norm()  # weights of zero do no harm


def test_equal_inputs_give_equal_bytes():
    one, two = (low_rank(random_residual(), 4, 4, 16, *random_weights()).arrays() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
