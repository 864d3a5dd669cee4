"""The scale of every row and the sum of the rows, in every backend."""

import math

import pytest
import torch
from backends import BACKENDS, DEVICE
from compare import assert_within_twice_plain

from tempnet_kernels.ops import token_rows

IGNORED = -100
CASES = {
    "every row": {},
    "weights": {"weighted": True},
    "normalizer": {"normalizer": 7.0},
    "normalizer in a tensor, weights": {"normalizer": torch.tensor(7.0), "weighted": True},
    "sum of weights": {"reduction": "sum", "weighted": True},
}


def rows(n, device, index=torch.int64):
    """Every other element of a tensor, every third of them ignored."""
    target = torch.randint(0, 9, (2 * n,), device=device).to(index)[::2]
    target[::3] = IGNORED
    weight = torch.randn(n, device=device) + 1.5
    weight[::3] = math.nan  # of an ignored row
    return target, weight


@pytest.mark.parametrize("n", [1, 2, 33, 1025, 5000])  # one warp, one more than a block
@pytest.mark.parametrize("case", CASES)
def test_scale_is_the_weight_over_the_normaliser(backend, case, n, device):
    options = {"reduction": "mean", "normalizer": None, **CASES[case]}
    index = torch.int32 if n == 33 else torch.int64
    target, weight = rows(n, device, index)
    if n == 1:
        target[:] = 3
        weight[:] = 2.0
    weighted = options.pop("weighted", False)
    if isinstance(options["normalizer"], torch.Tensor):
        options["normalizer"] = options["normalizer"].to(device)
    scale, total = token_rows.row_scale(
        target, weight if weighted else None, **options, ignore_index=IGNORED,
        acc=torch.float32, backend=backend,
    )  # fmt: skip
    kept = target != IGNORED
    weights = torch.where(kept, weight, 0).double() if weighted else kept.double()
    divisor = torch.as_tensor(options["normalizer"] or weights.sum(), device=device)
    if options["reduction"] == "sum":
        assert total is None
        divisor = torch.ones_like(divisor)
    else:
        assert_within_twice_plain(total, divisor.double().reshape(1), weights.float().sum()[None])
    exact = (weights / divisor)[kept]
    assert scale.shape == (n,) and exact.abs().max() > 0
    assert_within_twice_plain(scale[kept], exact, weights.float()[kept] / divisor.float())
    if weighted:
        assert (scale[~kept] == 0).all()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("n", [0, 5])
def test_mean_over_nothing_has_scale_zero_and_is_nan(backend, n, weighted, device):
    target = torch.full((n,), IGNORED, device=device)
    weight = torch.full((n,), math.inf, device=device) if weighted else None
    scale, total = token_rows.row_scale(
        target, weight, None, IGNORED, "mean", torch.float32, backend
    )
    assert (scale == 0).all() and total.tolist() == [0]
    value = token_rows.reduced(scale.contiguous(), total, False, backend)
    assert value.shape == () and value.isnan()


@pytest.mark.parametrize("n", [1, 31, 1024, 4097])
def test_sum_is_that_of_all_rows(backend, n, device):
    losses = torch.randn(n, 3, device=device)[:, 1] + 1
    value = token_rows.reduced(losses, torch.ones(1, device=device), False, backend)
    exact = losses.double().sum()
    plain = losses.cumsum(0)[-1]  # one after the other
    assert exact.abs() > 0.1
    assert_within_twice_plain(value, exact, plain)
    again = token_rows.reduced(losses, torch.ones(1, device=device), False, backend)
    assert torch.equal(value, again)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_reaches_the_sum(backend, bad, device):
    losses = torch.zeros(700, device=device)
    losses[650] = bad
    value = token_rows.reduced(losses, torch.ones(1, device=device), False, backend)
    torch.testing.assert_close(value.item(), bad, equal_nan=True)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("weighted", [False, True])
def test_opcheck(name, weighted):
    target, weight = rows(6, DEVICE)
    ops, weight = torch.ops.tempnet, weight if weighted else None
    args = target, weight, None, -1.0, IGNORED, True, False
    torch.library.opcheck(getattr(ops.row_scale, name), args)
    total = torch.ones(1, device=DEVICE) if weighted else None
    torch.library.opcheck(getattr(ops.sum_rows, name), (torch.rand(6, device=DEVICE), total))


@pytest.mark.parametrize("normalizer", [None, 7.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradient_of_the_weights_is_exact(reduction, normalizer):
    if reduction == "sum" and normalizer:
        pytest.skip("a normalizer goes with the mean")
    target, _ = rows(7, "cpu")
    weight = (torch.rand(7, dtype=torch.float64) + 0.5).requires_grad_()
    losses = torch.randn(7, dtype=torch.float64)

    def loss(weight):
        scale, _ = token_rows.row_scale(
            target, weight, normalizer, IGNORED, reduction, torch.float64, "native"
        )
        return (scale * losses).sum()

    assert loss(weight).abs() > 1e-3
    torch.autograd.gradcheck(loss, weight)
