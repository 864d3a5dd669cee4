"""The temperature networks around their matrix products: every backend against the definition."""

import pytest
import torch
from compare import assert_within_twice_plain

from tempnet_kernels.core import tempnet
from tempnet_kernels.core.dropout import hashed_dropout
from tempnet_kernels.reference import temperature_head as definition

KEY = torch.tensor(-7_301_442_953_011_299_171)
# More than one block of rows, a ragged one, one row; columns within, at and past a tile.
SHAPES = [(1, 1), (7, 33), (21, 256), (9, 300), (2100, 5)]
BOUNDS = 0.005, 0.05


@pytest.fixture
def shape(request, backend):
    """Of the test, fewer rows where Triton's interpreter runs it."""
    n, k = request.param
    return (17, k) if n > 1000 and "triton" in request.node.name else (n, k)


def operator(name, backend):
    return tempnet._op(name, backend)


def precisions(x):
    """(float32, float64) of what the kernel takes."""
    return [[None if t is None else t.to(d) for t in x] for d in (torch.float32, torch.float64)]


@pytest.mark.parametrize("shape", SHAPES, ids=str, indirect=True)
@pytest.mark.parametrize("ids", ["ids", "row numbers"])
@pytest.mark.parametrize("scaled", [False, True])
def test_sigmoid_dropout(backend, shape, ids, scaled):
    n, h = shape
    single, exact = precisions(
        [torch.randn(n, h) * 4, torch.randn(h), torch.rand(n) * 3 if scaled else None]
    )
    found = torch.randint(-(1 << 62), 1 << 62, (2 * n,))[::2] if ids == "ids" else None
    mask = (KEY, found, (1 << 33) - 3, 0.3)
    got = operator("sigmoid_dropout", backend)(*single, *mask)
    plain, expected = (definition.sigmoid_dropout(*x, *mask) for x in (single, exact))
    assert torch.equal(got == 0, expected == 0)  # the same masks, to the bit
    assert_within_twice_plain(got, expected, plain)
    everything = operator("sigmoid_dropout", backend)(*single, None, None, 0, 0.0)
    assert (everything > 0).all() and (n * h < 100 or 0.6 < (got != 0).float().mean() < 0.8)


@pytest.mark.parametrize("probability", [0.0, 0.5, 1 - 1e-9])
def test_mask_is_the_hash_s(backend, probability):
    got = operator("sigmoid_dropout", backend)(
        torch.zeros(50, 70), torch.zeros(70), None, KEY, None, 11, probability
    )
    mask = hashed_dropout(KEY, torch.arange(11, 61), 70, probability, torch.float32)
    torch.testing.assert_close(got, mask / 2, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str, indirect=True)
@pytest.mark.parametrize("probability", [0.0, 0.3])
@pytest.mark.parametrize("scaled", [False, True])
def test_gradient_of_sigmoid_dropout(backend, shape, probability, scaled):
    n, h = shape
    pre, bias = torch.randn(n, h), torch.randn(h)
    factor = torch.rand(n) * 3 if scaled else None
    key = KEY if probability else None
    leaves = [x.double().requires_grad_() for x in (pre, bias)]
    x = definition.sigmoid_dropout(
        *leaves, None if factor is None else factor.double(), key, None, 0, probability
    )
    grad = torch.randn(n, h)
    expected = torch.autograd.grad(x, leaves, grad.double())
    args = grad, x.detach().float(), factor, probability
    got, sums = operator("sigmoid_dropout_bwd", backend)(*args)
    plain, plain_sums = definition.sigmoid_dropout_bwd(*args)
    assert sums.shape == (tempnet.row_blocks(n)[0], h)
    assert_within_twice_plain(got, expected[0], plain, "pre")
    assert_within_twice_plain(sums.sum(0), expected[1], plain_sums.sum(0), "bias")


def parameters(n, k, normed):
    h = torch.randn(n, k) * 2
    norms = torch.rand(k) + 0.5 if normed else None
    return [h, norms, torch.tensor([-1.0]), torch.randn(1, k), torch.tensor([0.3])]


def of_parameters(shape, normed, squash, backend):
    """[(got, exact, plain)] by name: temperatures, and what the backward gives."""
    n, k = shape
    single, exact = precisions(parameters(n, k, normed))
    leaves = [x.requires_grad_() for x in exact if x is not None]
    grad_tau = torch.randn(2 * n)[::2]
    tau = definition.temperature_head(*exact, squash, *BOUNDS)
    by_autograd = torch.autograd.grad(tau, leaves, grad_tau.double())
    grad_h, *of_norms, scaler, weight, bias = by_autograd
    expected = {
        "tau": tau.detach(), "h": grad_h, "grad_b2": grad_h.sum(0), "grad_weight": weight[0],
        "grad_scaler": scaler, "grad_bias": bias,
    }  # fmt: skip
    if normed:  # d |p| / d p = p / |p|
        expected["along"] = of_norms[0] / exact[1].detach()
    of = tempnet.HeadSums.with_norms if normed else tempnet.HeadSums.of

    def results(forward, backward):
        found_h, sums = backward(grad_tau, *single, squash, *BOUNDS)
        assert sums.shape == (tempnet.row_blocks(n)[0], 2 * k + 2 + normed * k)
        of_sums = of(sums.sum(0))._asdict()
        return {"tau": forward(*single, squash, *BOUNDS), "h": found_h, **of_sums}

    names = "temperature_head", "temperature_head_bwd"
    got = results(*(operator(name, backend) for name in names))
    plain = results(*(getattr(definition, name) for name in names))
    return {name: (got[name], x, plain[name]) for name, x in expected.items()}


@pytest.mark.parametrize("shape", SHAPES, ids=str, indirect=True)
@pytest.mark.parametrize("squash", [False, True])
@pytest.mark.parametrize("normed", [False, True])
def test_temperatures_and_their_gradient(backend, shape, squash, normed):
    for name, results in of_draws(6, shape, normed, squash, backend).items():
        assert_within_twice_plain(*results, name)
        assert shape[1] == 1 or results[1].std() > 1e-6, name


def of_draws(count, *args):
    """The gradients of scaler and bias are one number each: of several draws."""
    draws = [of_parameters(*args) for _ in range(count)]
    return {
        name: [torch.stack(x) for x in zip(*(draw[name] for draw in draws), strict=True)]
        for name in draws[0]
    }


@pytest.mark.parametrize("shape", [(8200, 3)], ids=str, indirect=True)
def test_a_block_of_many_rows_adds_them_all(backend, shape):
    """More than a CTA holds at a time."""
    for name, results in of_draws(8, shape, True, True, backend).items():
        assert_within_twice_plain(*results, name)


def test_a_prototype_without_length_has_no_gradient_of_its_norm(backend):
    single, _ = precisions(parameters(9, 20, True))
    single[1][3] = 0
    single[0][:, 3] = 0
    args = torch.ones(9), *single, True, *BOUNDS
    grad_h, sums = operator("temperature_head_bwd", backend)(*args)
    along = tempnet.HeadSums.with_norms(sums.sum(0)).along
    assert along[3] == 0 and along.isfinite().all() and grad_h.isfinite().all()
    assert operator("temperature_head", backend)(*single, True, *BOUNDS).isfinite().all()


def test_large_products_stay_finite_and_accurate(backend):
    """Of one temperature of 0.005 and an offset of 1e3: the softmax is centred."""
    single, exact = precisions(parameters(60, 40, False))
    for x in single, exact:
        x[0] += 1e3
        x[2].fill_(-5.3)
        x[3].fill_(1.0)
    got = operator("temperature_head", backend)(*single, False, *BOUNDS)
    plain, expected = (definition.temperature_head(*x, False, *BOUNDS) for x in (single, exact))
    assert_within_twice_plain(got, expected, plain)
    _, sums = operator("temperature_head_bwd", backend)(torch.ones(60), *single, False, *BOUNDS)
    assert sums.isfinite().all()


@pytest.mark.parametrize("squash", [False, True])
def test_a_tiny_temperature_of_the_softmax(backend, squash):
    """h over exp(scaler) passes 2^31: the softmax is that of the largest alone."""
    single, exact = precisions(parameters(30, 40, False))
    for x in single, exact:
        x[2].fill_(-22.0)
    got = operator("temperature_head", backend)(*single, squash, *BOUNDS)
    plain, expected = (definition.temperature_head(*x, squash, *BOUNDS) for x in (single, exact))
    assert_within_twice_plain(got, expected, plain)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_row_is_nan_and_no_other(backend, value):
    single, _ = precisions(parameters(10, 33, False))
    single[0][4, 7] = value
    good = [i for i in range(10) if i != 4]
    tau = operator("temperature_head", backend)(*single, False, *BOUNDS)
    assert tau[4].isnan() and tau[good].isfinite().all()
    grad_h, _ = operator("temperature_head_bwd", backend)(torch.ones(10), *single, False, *BOUNDS)
    assert grad_h[4].isnan().any() and grad_h[good].isfinite().all()
    pre = torch.zeros(3, 5)
    pre[1, 2] = torch.nan
    for key in (None, KEY):
        x = operator("sigmoid_dropout", backend)(pre, torch.zeros(5), None, key, None, 0, 0.5)
        assert x[1, 2].isnan() and x.isnan().sum() == 1


def test_no_rows(backend):
    x = operator("sigmoid_dropout", backend)(
        torch.zeros(0, 5), torch.zeros(5), None, KEY, None, 0, 0.5
    )
    assert x.shape == (0, 5)
    grad, sums = operator("sigmoid_dropout_bwd", backend)(x, x, None, 0.5)
    assert grad.shape == (0, 5) and sums.shape == (0, 5)
    single, _ = precisions(parameters(0, 5, False))
    assert operator("temperature_head", backend)(*single, False, *BOUNDS).shape == (0,)
    grad, sums = operator("temperature_head_bwd", backend)(torch.zeros(0), *single, False, *BOUNDS)
    assert grad.shape == (0, 5) and sums.shape == (0, 12)


def test_saturated_sigmoids(backend):
    pre = torch.tensor([[-torch.inf, -1e4, -90.0, 90.0, 1e4, torch.inf]])
    x = operator("sigmoid_dropout", backend)(pre, torch.zeros(6), None, None, None, 0, 0.0)
    torch.testing.assert_close(x, torch.sigmoid(pre), rtol=0, atol=1e-37)
