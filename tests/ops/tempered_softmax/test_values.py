"""Softmax and log-softmax with a temperature per row: values and gradients against the definition
in float64."""

import math

import pytest
import torch
from backends import DEVICE, DTYPES, native_levels
from compare import assert_within_twice_plain
from tempered import FUNCTIONS, check, expected, logarithm, make, run

from tempnet_kernels.ops import tempered_softmax as softmax_op

SHAPES = [
    (1, 1),  # one column
    (30, 7),
    (30, 33),  # ragged tile
    (5, 1000),
    (5, 4097),  # one column past a block
    (5, 9001),  # several blocks, ragged
]
NAN, INF = math.nan, math.inf


@logarithm
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients_match_the_definition(backend, shape, dtype, log, device):
    logits, tau, upstream = make(shape, dtype, device)
    got, exact = check(backend, log, logits, tau, upstream)
    assert got[0].dtype == got[1].dtype == dtype and got[2].dtype == torch.float32
    if shape[1] > 1:
        p = exact[0].exp() if log else exact[0]
        assert ((p > 0.01) & (p < 0.99)).any(), "a trivial softmax would prove nothing"
        assert exact[2].abs().max() > 0.01


@logarithm
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v", [1, 33, 4097, 20000])
def test_triton_reads_a_row_twice_that_does_not_fit(v, dtype, log, monkeypatch):
    from tempnet_kernels.triton import tempered_softmax as kernels

    monkeypatch.setattr(kernels, "ONE_PASS_COLUMNS", {"forward": 0, "backward": 0})
    logits, tau, upstream = make((4 if v > 1000 else 30, v), dtype, DEVICE)
    check("triton", log, logits, tau, upstream)
    if v < 1000:
        return
    masked = torch.zeros_like(logits, dtype=torch.bool)
    masked[0, : v - 500] = True  # the whole first block
    low = logits.masked_fill(masked, -1e4), tau, upstream.masked_fill(masked, 0)
    got = run("triton", log, logits.masked_fill(masked, -INF), *low[1:])
    assert (got[0][masked] == (-INF if log else 0)).all() and (got[1][masked] == 0).all()
    exact, plain = (expected(log, *low, d) for d in (torch.float64, torch.float32))
    for g, e, p in zip(got, exact, plain, strict=True):
        if g.dim() > 1:
            g, e, p = (x.masked_fill(masked, 0) for x in (g, e, p))
        assert_within_twice_plain(g, e, p)


@logarithm
@pytest.mark.parametrize("simd_level", native_levels(), indirect=True)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_every_simd_level_is_as_accurate(simd_level, dtype, log):
    logits, tau, upstream = make((5, 9001), dtype)
    check("native", log, logits, tau, upstream)


@logarithm
@pytest.mark.parametrize("offset", [0.0, 200.0, 1e4])
@pytest.mark.parametrize("tau", [1.0, 0.1, 0.01, 0.005])
def test_small_tau_and_large_offsets_cost_no_digits(backend, tau, offset, log, device):
    v = 4096
    logits = torch.randn(4, v, device=device) * 3 * tau + offset
    tau = torch.full((4,), tau, device=device)
    upstream = torch.randn(4, v, device=device)
    exact = expected(log, logits, tau, upstream, torch.float64)
    got = run(backend, log, logits, tau, upstream)
    log_p = torch.log_softmax(logits.double() / tau.double()[:, None], 1)
    p = log_p.exp()
    assert offset == 1e4 or ((p > 0.01) & (p < 0.99)).any(), "a trivial softmax"
    eps = torch.finfo(torch.float32).eps
    # An exponent is as exact as it is long, whatever the logits' offset.
    error = 4 * eps * (log_p.abs() if log else p * log_p.abs() + eps)
    assert ((got[0].double() - exact[0]).abs() <= error + 4 * eps * log_p.abs().amin()).all()
    # Of H it is 2e-6 log V (MATH.md section 7); q_j sums to at most this.
    total = (upstream.double() * (1 if log else p)).abs().sum(1)
    bound = 2e-6 * math.log(v) * total / tau
    assert ((got[2].double() - exact[2]).abs() <= bound).all()
    magnitude = (upstream.double() if log else p * upstream.double()).abs() + p * total[:, None]
    bound = (p * log_p.abs() * total[:, None] + magnitude) * 4e-6 / tau[:, None]
    assert ((got[1].double() - exact[1]).abs() <= bound + eps**2).all()


def test_a_constant_upstream_gradient_adds_only_its_rounding(backend, device):
    """The softmax sums to 1 whatever the logits and tau: exactly, a constant adds nothing."""
    logits, tau, upstream = make((7, 1000), device=device)
    constant = 100.0
    exact = expected(False, logits, tau, upstream + constant, torch.float64)
    got = run(backend, False, logits, tau, upstream + constant)
    log_p = exact[0].log()
    entropy = -(exact[0] * log_p).sum(1, keepdim=True)
    unit = 4 * torch.finfo(torch.float32).eps * constant / tau.double()
    assert ((got[1].double() - exact[1]).abs() <= unit[:, None] * exact[0] + 1e-12).all()
    spread = (exact[0] * (log_p + entropy).abs()).sum(1)
    assert ((got[2].double() - exact[2]).abs() <= unit * spread).all()
    assert exact[2].abs().min() > 10 * (unit * spread).max()


def test_the_backward_of_bf16_is_that_of_exact_probabilities(backend, device):
    """A saved bf16 p sums to 1 only to about 1e-3: tau's gradient would be as wrong."""
    logits, tau, upstream = make((4, 3000), torch.bfloat16, device)
    got = run(backend, False, logits, tau, upstream)
    exact = expected(False, logits, tau, upstream, torch.float64)
    rounded = exact[0].to(torch.bfloat16).double()
    log_p = rounded.log().clamp(min=-1e3)
    d = (rounded * upstream.double()).sum(1, keepdim=True)
    h = -(rounded * log_p).sum(1, keepdim=True)
    from_p = -(rounded * (log_p + h) * (upstream.double() - d)).sum(1) / tau.double()
    error = (got[2].double() - exact[2]).abs().max()
    assert error < 1e-5 * exact[2].abs().max()
    assert (from_p - exact[2]).abs().max() > 20 * error


@logarithm
def test_tau_as_number_scalar_or_rows(backend, log, device):
    logits, _, upstream = make((6, 65), device=device)
    rows = torch.full((6,), 0.75, device=device)
    exact = run(backend, log, logits, rows, upstream)
    assert torch.equal(FUNCTIONS[log](logits, 0.75, backend=backend), exact[0])
    for tau in (
        torch.tensor(0.75, device=device),
        rows.view(2, 3),
        rows.bfloat16().view(2, 3),
        torch.stack([rows, rows], 1)[:, 0].view(2, 3),
    ):
        t = tau.detach().requires_grad_()
        output = FUNCTIONS[log](logits.view(2, 3, 65), t, backend=backend)
        assert torch.equal(output, exact[0].view(2, 3, 65))
        (grad,) = torch.autograd.grad(output, t, upstream.view(2, 3, 65))
        assert grad.dtype == tau.dtype and grad.shape == tau.shape
        got = grad if tau.dim() else grad[None]
        want = exact[2].view(2, 3) if tau.dim() else exact[2].sum()[None]
        eps = torch.finfo(tau.dtype).eps
        torch.testing.assert_close(got.float(), want, rtol=4 * eps, atol=4e-6)
    one_row = FUNCTIONS[log](logits[0], rows[0], backend=backend)
    assert torch.equal(one_row, exact[0][0])


@logarithm
def test_gradients_that_nobody_wants_are_not_made(backend, log, device):
    logits, tau, upstream = make((3, 500), device=device)
    exact = run(backend, log, logits, tau, upstream)
    z, t = logits.clone().requires_grad_(), tau.clone().requires_grad_()
    output = FUNCTIONS[log](z, tau, backend=backend)
    assert torch.equal(torch.autograd.grad(output, z, upstream)[0], exact[1])
    output = FUNCTIONS[log](logits, t, backend=backend)
    torch.testing.assert_close(
        torch.autograd.grad(output, t, upstream)[0], exact[2], rtol=1e-5, atol=1e-6
    )
    op = softmax_op._op
    _, rows = op("tempered_softmax_fwd", backend)(logits, tau, log)
    bwd = op("tempered_softmax_bwd", backend)
    assert bwd(logits, tau, rows, upstream, log, False)[0].shape == (0, 500)
    assert not FUNCTIONS[log](logits, tau, backend=backend).requires_grad


@logarithm
@pytest.mark.parametrize("v", [33, 1000, 4097])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_views_are_read_in_place_and_padding_is_not(backend, dtype, v, log, device):
    logits, tau, upstream = make((8, v), dtype, device)
    pitch = -(-v // 16) * 16 + 16

    def padded(rows, first):
        wide = torch.full((rows.shape[0], pitch), NAN, dtype=dtype, device=device)
        wide[:, first : first + v] = rows
        return wide[:, first : first + v]

    views = [(padded(logits, f), padded(upstream, h)) for f, h in ((0, 0), (1, 1), (3, 0))]
    views.append((logits.t().contiguous().t(), upstream.t().contiguous().t()))
    views.append((logits.repeat_interleave(2, 0)[::2], upstream))
    for z, g in views:
        check(backend, log, z, tau, g)
    # What sum() and mean() send is expanded: both strides are 0.
    for g in (torch.ones((), device=device), torch.ones(v, device=device)):
        g = g.to(dtype).expand(8, v)
        got, want = (run(backend, log, logits, tau, x) for x in (g, g.contiguous()))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@logarithm
@pytest.mark.parametrize("name", ["reference", "native"])
def test_gradcheck_in_float64(name, log):
    logits = torch.randn(4, 11, dtype=torch.float64, requires_grad=True)
    tau = (torch.rand(4, dtype=torch.float64) + 0.4).requires_grad_()
    function = lambda z, t: FUNCTIONS[log](z, t, backend=name)  # noqa: E731
    assert torch.autograd.gradcheck(function, (logits, tau))
    wide = torch.randn(3, 5000, dtype=torch.float64) * 3
    got = run(name, log, wide, tau[:3], wide.flip(0))
    for g, e in zip(got, expected(log, wide, tau[:3], wide.flip(0), torch.float64), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-11, atol=1e-13)


@logarithm
def test_results_do_not_change_between_runs(backend, log, device):
    inputs = make((4, 6000), torch.bfloat16, device)
    first = run(backend, log, *inputs)
    for got, before in zip(run(backend, log, *inputs), first, strict=True):
        assert torch.equal(got, before)
