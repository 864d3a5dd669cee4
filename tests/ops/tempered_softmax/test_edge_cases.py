"""What odd input to the tempered softmax gets, and wrong arguments."""

import math

import pytest
import torch
from compare import assert_within_twice_plain
from tempered import FUNCTIONS, expected, logarithm, make, run

from tempnet_kernels import tempered_softmax

NAN, INF = math.nan, math.inf


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
