"""Softmax and log-softmax with a temperature per row: values and gradients against the definition
in float64, odd input, and what PyTorch must be able to do with the ops."""

import math
import sys

import pytest
import torch
from backends import BACKENDS, DEVICE, DTYPES, native_levels
from compare import assert_graph_replays, assert_within_twice_plain
from tempered import FUNCTIONS, check, expected, logarithm, make, run
from torch.utils.checkpoint import checkpoint

from tempnet_kernels import _register, tempered_log_softmax, tempered_softmax

SHAPES = [
    (1, 1),  # one column
    (30, 7),
    (30, 33),  # ragged tile
    (5, 1000),
    (5, 4097),  # one column past a block
    (5, 9001),  # several blocks, ragged
]
NAN, INF = math.nan, math.inf

registered = pytest.mark.parametrize("name", BACKENDS)


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
    op = sys.modules["tempnet_kernels.tempered_softmax"]._op
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
def test_no_rows_and_one_column(backend, log, device):
    logits, tau, upstream = make((0, 7), device=device)
    output, grad, grad_tau = run(backend, log, logits, tau, upstream)
    assert output.shape == grad.shape == (0, 7) and grad_tau.shape == (0,)
    logits, tau, upstream = make((2, 1), device=device)
    output, grad, grad_tau = run(backend, log, logits + 1e4, tau, upstream)
    assert (output == (0 if log else 1)).all()
    assert (grad == 0).all() and (grad_tau == 0).all()


@logarithm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_minus_inf_logits_have_no_probability_and_no_gradient(backend, dtype, log, device):
    logits, tau, upstream = make((6, 5000), dtype, device)
    logits[:2, :4500] = -INF  # the whole first block of a long row
    logits[2:4, 7:] = -INF
    logits[4:, 1::2] = -INF
    masked = logits == -INF
    upstream = torch.where(masked, 0, upstream)
    got = run(backend, log, logits, tau, upstream)
    assert (got[0][masked] == (-INF if log else 0)).all()
    assert (got[1][masked] == 0).all() and got[2].isfinite().all()
    # torch's gradient of tau is 0 * inf there; a low logit has the same gradients.
    low = logits.masked_fill(masked, -1e4), tau, upstream
    exact, plain = (expected(log, *low, d) for d in (torch.float64, torch.float32))
    for g, e, p in zip(got, exact, plain, strict=True):
        if g.dim() > 1:
            g, e, p = (x.masked_fill(masked, 0) for x in (g, e, p))
        assert_within_twice_plain(g, e, p)


def test_a_probability_of_zero_has_no_part_whatever_its_upstream_gradient(backend, device):
    """Of an entropy, log p + 1 is -inf there."""
    logits, tau, upstream = make((2, 600), device=device)
    logits[:, 100:300] = -INF
    clean = run(backend, False, logits, tau, upstream)
    upstream[0, 100:300] = -INF
    upstream[1, 100:300] = NAN
    for got, before in zip(run(backend, False, logits, tau, upstream), clean, strict=True):
        assert torch.equal(got, before) and got.isfinite().all()


@pytest.mark.parametrize("mask", [-1e9, -1e10, -1e25, torch.finfo(torch.float32).min])
def test_a_mask_of_finite_numbers_is_as_good_as_minus_inf(backend, mask, device):
    """Where a part of a row holds only such numbers, its maximum is one: the rounding of 1e10 / tau
    alone would be an infinite weight."""
    logits, _, upstream = make((3, 9000), device=device)
    tau = torch.tensor([2.0, 0.3, 0.01], device=device)
    masked = torch.arange(9000, device=device) < 5000
    clean = run(backend, False, logits.masked_fill(masked, -INF), tau, upstream)
    got = run(backend, False, logits.masked_fill(masked, mask), tau, upstream)
    for g, c in zip(got, clean, strict=True):
        assert torch.equal(g, c) and g.isfinite().all()


def test_log_softmax_passes_a_gradient_to_a_minus_inf_logit_as_torch_does(backend, device):
    logits, _, upstream = make((1, 50), device=device)
    logits[0, 3] = -INF
    z = logits.clone().requires_grad_()
    (exact,) = torch.autograd.grad(torch.log_softmax(z, 1), z, upstream)
    one = torch.ones(1, device=device)
    _, grad, grad_tau = run(backend, True, logits, one, upstream)
    torch.testing.assert_close(grad, exact, rtol=1e-5, atol=1e-5)
    assert grad[0, 3] == upstream[0, 3] and grad_tau[0] == INF * upstream[0, 3]


@logarithm
@pytest.mark.parametrize(
    "value", [NAN, INF, "row of -inf", "tau 0", "tau -1", "tau nan", "tau inf"]
)
@pytest.mark.parametrize("column", [0, 4800])
def test_a_bad_row_is_nan_and_no_other(backend, column, value, log, device):
    logits, tau, upstream = make((3, 5000), device=device)
    clean = run(backend, log, logits, tau, upstream)
    if value == "row of -inf":
        logits[1] = -INF
    elif isinstance(value, str):
        tau[1] = float(value.split()[1])
    else:
        logits[1, column] = value
    bad = run(backend, log, logits, tau, upstream)
    for got, before in zip(bad, clean, strict=True):
        assert got[1].isnan().all()
        assert torch.equal(got[[0, 2]], before[[0, 2]]) and before.isfinite().all()
    silent = run(backend, log, logits, tau, torch.zeros_like(upstream))
    assert silent[1][1].isnan().all() and silent[2][1].isnan()


@logarithm
@pytest.mark.parametrize(
    "kind, error, words",
    [
        ("logits dtype", TypeError, "logits must be float32"),
        ("logits list", TypeError, "logits must be a tensor, got list"),
        ("no columns", ValueError, r"V >= 1, got \(3, 0\)"),
        ("tau shape", ValueError, r"tau must have shape \(3,\), got \(1,\)"),
        ("tau dtype", TypeError, "tau must be of a floating-point dtype, got torch.int64"),
        ("tau 0", ValueError, "tau must be a finite number > 0, got 0"),
        ("tau -1", ValueError, "tau must be a finite number > 0, got -1"),
        ("tau nan", ValueError, "tau must be a finite number > 0, got nan"),
        ("backend", ValueError, "backend must be one of .* got 'cuda'"),
    ],
)
def test_wrong_arguments_are_named(kind, error, words, log):
    logits, tau, options = torch.randn(3, 8), 1.0, {}
    if kind == "logits dtype":
        logits = logits.long()
    elif kind == "logits list":
        logits = [[1.0]]
    elif kind == "no columns":
        logits = logits[:, :0]
    elif kind == "tau shape":
        tau = torch.ones(1)
    elif kind == "tau dtype":
        tau = torch.ones(3, dtype=torch.int64)
    elif kind == "backend":
        options = {"backend": "cuda"}
    else:
        tau = float(kind.split()[1])
    with pytest.raises(error, match=f"^{FUNCTIONS[log].__name__}: .*" + words):
        FUNCTIONS[log](logits, tau, **options)


def test_float64_on_a_backend_without_it_raises():
    with pytest.raises(TypeError, match=r"for backend 'triton' on cpu, got torch\.float64"):
        tempered_softmax(torch.randn(2, 3).double(), 1.0, backend="triton")


@logarithm
def test_double_backward_raises(backend, log, device):
    logits, tau, _ = make((3, 8), device=device)
    function = lambda z: FUNCTIONS[log](z, tau, backend=backend).square().sum()  # noqa: E731
    z = logits.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(function(z), z, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.func.grad(lambda z: torch.func.grad(function)(z).square().sum())(logits)


def test_logits_changed_before_the_backward_raise(backend, device):
    logits, tau, upstream = make((3, 8), device=device)
    wide = logits.requires_grad_() * 1.0
    output = tempered_softmax(wide, tau, backend=backend)
    output.backward(upstream, retain_graph=True)
    output.backward(upstream)  # a second one is the same
    output = tempered_softmax(wide, tau, backend=backend)
    wide.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward(upstream)


@logarithm
def test_results_do_not_change_between_runs(backend, log, device):
    inputs = make((4, 6000), torch.bfloat16, device)
    first = run(backend, log, *inputs)
    for got, before in zip(run(backend, log, *inputs), first, strict=True):
        assert torch.equal(got, before)


@logarithm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@registered
def test_opcheck(name, dtype, log, device):
    logits, tau, upstream = make((6, 40), dtype, device)
    ops = torch.ops.tempnet
    forward = getattr(ops.tempered_softmax_fwd, name)
    torch.library.opcheck(forward, (logits, tau, log))
    _, rows = forward(logits, tau, log)
    for want in (False, True):
        torch.library.opcheck(
            getattr(ops.tempered_softmax_bwd, name), (logits, tau, rows, upstream, log, want)
        )


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@registered
def test_compile_fullgraph_dynamic(name, compiler, device, monkeypatch):
    if compiler == "inductor" and name != "native":
        pytest.skip("inductor sees the same graph for every backend; one is enough")
    monkeypatch.setattr(_register, "_available", {})  # as in the first call of a process

    def function(z, t):
        z = z * 1.0
        p = tempered_softmax(z, t, backend=name)
        return (p * tempered_log_softmax(z, t, backend=name)).sum(-1) + p[:, 0]

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=compiler)
    for shape in ((6, 40), (9, 73)):
        logits, tau, _ = make(shape, device=device)
        results = []
        for f in (compiled, function):
            z, t = logits.clone().requires_grad_(), tau.clone().requires_grad_()
            output = f(z, t)
            results.append((output.detach(), *torch.autograd.grad(output.sum(), (z, t))))
        for got, eager in zip(*results, strict=True):
            torch.testing.assert_close(got, eager, rtol=1e-5, atol=1e-6)


@logarithm
@registered
def test_func_grad_checkpointing_and_autocast_give_the_same_gradients(name, log, device):
    logits, tau, upstream = make((6, 40), torch.bfloat16, device)
    expected_grads = run(name, log, logits, tau, upstream)[1:]

    def function(z, t):
        return FUNCTIONS[log](z * 1.0, t, backend=name)

    def backward(output, z, t):
        assert output.dtype == torch.bfloat16
        return torch.autograd.grad(output, (z, t), upstream)

    def under_func(z, t):
        # The product's rounding is that of the upstream gradient.
        return (function(z, t) * upstream).sum()

    z, t = logits.clone().requires_grad_(), tau.clone().requires_grad_()
    checkpointed = backward(checkpoint(function, z, t, use_reentrant=False), z, t)
    with torch.autocast(device, dtype=torch.bfloat16):
        autocast = backward(function(z, t), z, t)
    func = torch.func.grad(under_func, argnums=(0, 1))(logits, tau)
    for got in (checkpointed, autocast, func):
        for g, e in zip(got, expected_grads, strict=True):
            assert torch.equal(g, e)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@logarithm
@pytest.mark.parametrize("n, v", [(6, 40), (200, 40000), (200, 70001)])
@pytest.mark.parametrize("name", ["native", "triton"])
def test_cuda_graph_replays_a_step(name, n, v, log):
    logits, tau, upstream = make((n, v), device="cuda")
    assert_graph_replays(lambda: run(name, log, logits, tau, upstream))
