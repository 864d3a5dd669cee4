"""What odd input gets, and failures seen in other packages: one test each, named after the row or
the failure."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from backends import BACKENDS
from compare import definition

from tempnet_kernels import dro_cross_entropy

INF = math.inf


def run(logits, target, tau=1.0, rho=0.5, upstream=None, **options):
    z = logits.detach().clone().requires_grad_()
    t = torch.as_tensor(tau, dtype=torch.float32, device=logits.device)
    t = t.expand(target.shape).clone().requires_grad_()
    loss = dro_cross_entropy(z, target, t, rho, **options)
    loss.backward(torch.ones_like(loss) if upstream is None else upstream)
    return loss.detach(), z.grad, t.grad


def rows(logits, target, tau=1.0, rho=0.5):
    z = logits.double().requires_grad_()
    tau = torch.as_tensor(tau, dtype=torch.float64, device=z.device).expand(target.shape)
    loss = definition(z, target, tau, rho)
    (grad,) = torch.autograd.grad(loss.sum(), z)
    return loss.detach(), grad


@pytest.mark.parametrize("reduction, expected", [("mean", math.nan), ("sum", 0.0), ("none", None)])
def test_no_rows(backend, reduction, expected, device):
    logits = torch.empty(0, 7, device=device)
    target = torch.empty(0, dtype=torch.int64, device=device)
    loss, grad, _ = run(logits, target, reduction=reduction, backend=backend)
    assert grad.shape == (0, 7)
    if expected is None:
        assert loss.shape == (0,)
    else:
        torch.testing.assert_close(loss.item(), expected, equal_nan=True)


def test_every_row_ignored(backend, device):
    target = torch.full((3,), -100, device=device)
    logits = torch.full((3, 5), math.nan, device=device)  # an ignored row is never read
    for reduction, expected in (("mean", math.nan), ("sum", 0.0)):
        loss, grad, grad_tau = run(logits, target, reduction=reduction, backend=backend)
        torch.testing.assert_close(loss.item(), expected, equal_nan=True)
        assert (grad == 0).all() and (grad_tau == 0).all()


def test_one_column(backend, device):
    logits = torch.tensor([[3.0], [-1e4]], device=device)
    target = torch.zeros(2, dtype=torch.int64, device=device)
    loss, grad, grad_tau = run(logits, target, 0.3, 0.5, reduction="none", backend=backend)
    torch.testing.assert_close(loss, torch.full_like(loss, 0.3 * 0.5), rtol=1e-6, atol=0)
    assert (grad == 0).all()
    torch.testing.assert_close(grad_tau, torch.full_like(grad_tau, 0.5))


def test_one_column_of_any_logit_has_no_gradient(backend, device):
    """z a rounds where the maximum's product was rounded before."""
    logits = 1e4 * torch.randn(3000, 1, device=device)[: 300 if backend == "triton" else 3000]
    target = torch.zeros(len(logits), dtype=torch.int64, device=device)
    for reduction in ("none", "sum"):
        _, grad, _ = run(logits, target, 0.01, reduction=reduction, backend=backend)
        assert (grad == 0).all()


def test_one_column_has_no_gradient_however_the_exponential_is_rounded(
    backend, device, monkeypatch
):
    """A GPU's errs by 2 ulp, the interpreter's by half of one."""
    if backend == "triton" and device == "cpu":
        from triton.runtime.interpreter import InterpreterBuilder

        off = lambda self, x: self.unary_op(  # noqa: E731
            x, lambda u: np.where(u == np.round(u), np.exp2(u), np.exp2(u) * np.float32(1 + 2**-22))
        )
        monkeypatch.setattr(InterpreterBuilder, "create_exp2", off)
    logits = torch.tensor([[3.0], [-1e4], [77.7], [math.nan]], device=device)
    target = torch.zeros(4, dtype=torch.int64, device=device)
    for tau in (0.3, 0.7, 1.1):
        for reduction in ("none", "sum"):
            _, grad, _ = run(logits, target, tau, reduction=reduction, backend=backend)
            assert (grad[:3] == 0).all() and grad[3].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_minus_inf_logits_have_no_weight_and_no_gradient(backend, dtype, device):
    logits = torch.randn(3, 5000, device=device).to(dtype)
    logits[0, :4500] = -INF  # the whole first block of a long row
    logits[1, 7:] = -INF
    logits[2, 1::2] = -INF
    target = torch.tensor([4999, 3, 2], device=device)
    loss, grad, grad_tau = run(logits, target, 0.5, reduction="none", backend=backend)
    exact, exact_grad = rows(logits, target, 0.5)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)
    tolerance = torch.finfo(dtype).eps
    torch.testing.assert_close(grad.double(), exact_grad, rtol=0, atol=tolerance)
    assert (grad[logits == -INF] == 0).all() and grad_tau.isfinite().all()


@pytest.mark.parametrize("mask", [-1e9, -1e10, -1e25])
def test_a_part_of_a_row_masked_by_a_finite_number_is_as_good_as_minus_inf(backend, mask, device):
    logits = torch.randn(2, 9000, device=device)
    masked = torch.arange(9000, device=device) < 5000
    target = torch.tensor([8000, 5000], device=device)
    tau = torch.tensor([0.3, 2.0], device=device)
    got, clean = (
        run(logits.masked_fill(masked, x), target, tau, backend=backend) for x in (mask, -INF)
    )
    for g, c in zip(got, clean, strict=True):
        assert torch.equal(g, c) and g.isfinite().all()


def test_minus_inf_target_gives_inf_loss(backend, device):
    logits = torch.randn(2, 9, device=device)
    logits[0, 4] = -INF
    target = torch.tensor([4, 4], device=device)
    loss, grad, grad_tau = run(logits, target, reduction="none", backend=backend)
    assert loss[0] == INF and loss[1].isfinite()
    torch.testing.assert_close(grad.double(), rows(logits, target)[1], rtol=1e-5, atol=1e-6)
    assert grad_tau.isfinite().all()


def test_minus_inf_logit_with_label_smoothing_as_cross_entropy(backend, device):
    logits = torch.randn(2, 9, device=device)
    logits[0, 4] = -INF
    target = torch.tensor([1, 1], device=device)
    options = {"label_smoothing": 0.2, "reduction": "none"}
    loss, grad, _ = run(logits, target, 1.0, math.log(9), backend=backend, **options)
    z = logits.clone().requires_grad_()
    plain = F.cross_entropy(z, target, **options)
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-6)
    assert loss[0] == INF
    q = torch.full_like(logits, 0.2 / 9).scatter_(1, target[:, None], 0.8 + 0.2 / 9)
    torch.testing.assert_close(grad, torch.softmax(logits, 1) - q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [math.nan, INF])
@pytest.mark.parametrize("column", [0, 4800])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_or_inf_logit_reaches_its_row_only(backend, dtype, column, value, device):
    logits = torch.randn(3, 5000, device=device).to(dtype)
    target = torch.tensor([1, 2, 3], device=device)
    clean = run(logits, target, reduction="none", backend=backend)
    logits[1, column] = value
    loss, grad, grad_tau = run(logits, target, reduction="none", backend=backend)
    assert loss[1].isnan() and grad_tau[1].isnan() and grad[1].isnan().any()
    for got, before in zip((loss, grad, grad_tau), clean, strict=True):
        assert torch.equal(got[[0, 2]], before[[0, 2]])


def test_row_of_minus_inf_is_nan(backend, device):
    logits = torch.randn(2, 4200, device=device)
    logits[0] = -INF
    loss, grad, _ = run(
        logits, torch.tensor([1, 1], device=device), reduction="none", backend=backend
    )
    assert loss[0].isnan() and grad[0].isnan().any()
    assert loss[1].isfinite() and grad[1].isfinite().all()


@pytest.mark.parametrize("columns", [40, 5000])
def test_statistics_of_a_row_without_a_finite_softmax_are_nan(backend, columns, device):
    """Its temperature and lse too: the maximum of a row of NaN or -inf need not be NaN."""
    logits = torch.randn(6, columns, device=device)
    logits[1, 3] = math.nan
    logits[2] = math.nan
    logits[3] = -INF
    logits[4, 1] = INF
    target = torch.arange(6, device=device)
    tau = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, -1.0], device=device)
    _, stats = dro_cross_entropy(logits, target, tau, return_stats=True, backend=backend)
    for name, values in stats._asdict().items():
        if name != "argmax":
            assert values[0].isfinite() and values[1:].isnan().all(), (name, values)
    assert stats.argmax.tolist() == [logits[0].argmax(), -1, -1, -1, -1, -1]


# The launcher of CPU tensors checks targets; that of CUDA tensors must not wait for them.
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [-1, 7, 2**40])
@pytest.mark.parametrize("overwrite", [False, True])
def test_target_out_of_range(backend, overwrite, bad, device):
    logits = torch.randn(4, 7, device=device).requires_grad_()
    wide = logits * 1.0
    before = wide.detach().clone()
    target = torch.tensor([0, -100, bad, bad], device=device)
    call = lambda: dro_cross_entropy(  # noqa: E731
        wide, target, reduction="sum", overwrite_logits=overwrite, backend=backend
    )
    if device == "cpu":
        with pytest.raises(IndexError, match=rf"target\[2\].*{bad}"):
            call()
        assert torch.equal(wide.detach(), before), "nothing is written before the check"
    else:
        assert call().isnan()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_every_weight_zero(backend, reduction, device):
    logits = torch.randn(3, 8, device=device)
    logits[0, 0] = math.nan
    target = torch.tensor([1, 2, 3], device=device)
    weight = torch.zeros(3, device=device)
    loss, grad, grad_tau = run(
        logits, target, row_weight=weight, reduction=reduction, backend=backend
    )
    assert (grad == 0).all() and (grad_tau == 0).all()
    assert loss.isnan() if reduction == "mean" else loss == 0


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, INF])
def test_tau_not_positive_or_not_finite(backend, bad, device):
    logits, target = torch.randn(2, 8, device=device), torch.tensor([1, 2], device=device)
    with pytest.raises(ValueError, match=r"dro_cross_entropy: tau must be a finite number > 0"):
        dro_cross_entropy(logits, target, bad, backend=backend)
    tau = torch.tensor([1.0, bad], device=device)
    for reduction in ("none", "sum"):
        loss, grad, grad_tau = run(logits, target, tau, reduction=reduction, backend=backend)
        assert loss.flatten()[-1].isnan()
        assert grad[1].isnan().all() and grad_tau[1].isnan()
        assert grad[0].isfinite().all() and grad_tau[0].isfinite()


@pytest.mark.parametrize(
    "kind, error, words",
    [
        ("logits dtype", TypeError, "logits must be float32"),
        ("logits list", TypeError, "logits must be a tensor, got list"),
        ("no columns", ValueError, r"V >= 1, got \(3, 0\)"),
        ("target dtype", TypeError, "target must be int64 or int32, got torch.float32"),
        ("target shape", ValueError, r"target must have shape \(3,\), got \(4,\)"),
        ("tau shape", ValueError, r"tau must have shape \(3,\), got \(1,\)"),
        ("tau dtype", TypeError, "tau must be of a floating-point dtype, got torch.int64"),
        ("weight shape", ValueError, r"row_weight must have shape \(3,\), got \(5,\)"),
        ("normalizer", ValueError, "normalizer needs reduction='mean', got reduction='sum'"),
        ("reduction", ValueError, "reduction must be one of .* got 'avg'"),
        ("smoothing", ValueError, r"label_smoothing must be in \[0, 1\], got 1.5"),
        ("z_loss", ValueError, "z_loss must be finite and >= 0, got -1"),
        ("backend", ValueError, "backend must be one of .* got 'cuda'"),
        ("no rho", ValueError, "rho must be given where tau learns: .* near the mean kl"),
        ("rho < 0", ValueError, "rho must be a finite number >= 0, got -1"),
        ("rho NaN", ValueError, "rho must be a finite number >= 0, got nan"),
    ],
)
def test_wrong_arguments_are_named(backend, kind, error, words, device):
    logits, target = torch.randn(3, 8, device=device), torch.tensor([1, 2, 3], device=device)
    options = {"backend": backend}
    tau = 1.0
    if kind == "logits dtype":
        logits = logits.long()
    elif kind == "logits list":
        logits = [[1.0]]
    elif kind == "no columns":
        logits = logits[:, :0]
    elif kind == "target dtype":
        target = target.float()
    elif kind == "target shape":
        target = torch.zeros(4, dtype=torch.int64, device=device)
    elif kind == "tau shape":
        tau = torch.ones(1, device=device)
    elif kind == "tau dtype":
        tau = torch.ones(3, dtype=torch.int64, device=device)
    elif kind == "no rho":
        tau = torch.ones(3, device=device, requires_grad=True)
    else:
        options |= {
            "weight shape": {"row_weight": torch.ones(5, device=device)},
            "normalizer": {"normalizer": 3, "reduction": "sum"},
            "reduction": {"reduction": "avg"},
            "smoothing": {"label_smoothing": 1.5},
            "z_loss": {"z_loss": -1},
            "rho < 0": {"rho": -1},
            "rho NaN": {"rho": math.nan},
            "backend": {"backend": "cuda"},
        }[kind]
    with pytest.raises(error, match="dro_cross_entropy: .*" + words):
        dro_cross_entropy(logits, target, tau, **options)


def test_rho_may_be_left_out_where_no_temperature_learns(backend, device):
    logits, target = torch.randn(3, 8, device=device), torch.tensor([1, 2, 3], device=device)
    tau = torch.full((3,), 0.5, device=device, requires_grad=True)
    with torch.no_grad():
        loss = dro_cross_entropy(logits, target, tau, backend=backend)
    assert torch.equal(loss, dro_cross_entropy(logits, target, 0.5, 0.0, backend=backend))


def test_non_contiguous_logits(backend, device):
    base = torch.randn(6, 40, device=device)
    target = torch.arange(6, device=device)
    expected = run(base, target, backend=backend)
    wide = torch.empty(6, 100, device=device)
    wide[:, 3:43] = base
    for view in (wide[:, 3:43], base.t().contiguous().t(), base.repeat_interleave(2, 0)[::2]):
        z = view.detach().requires_grad_()
        loss = dro_cross_entropy(z, target, 1.0, 0.5, backend=backend)
        (grad,) = torch.autograd.grad(loss, z)
        torch.testing.assert_close(loss.detach(), expected[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(grad, expected[1], rtol=1e-5, atol=1e-7)


def test_overwrite_logits_misuse_raises(backend, device):
    leaf = torch.randn(3, 8, device=device, requires_grad=True)
    target = torch.tensor([1, 2, 3], device=device)
    options = {"overwrite_logits": True, "backend": backend}
    with pytest.raises(ValueError, match=r"needs logits that an operation made .*, got a leaf"):
        dro_cross_entropy(leaf, target, **options)
    with pytest.raises(ValueError, match="got a view of a leaf that requires a gradient"):
        dro_cross_entropy(leaf.view(1, 3, 8), target[None], **options)
    with pytest.raises(ValueError, match="needs reduction 'mean' or 'sum', got 'none'"):
        dro_cross_entropy(leaf * 1.0, target, reduction="none", **options)
    with pytest.raises(ValueError, match="column stride 1"):
        dro_cross_entropy((leaf * 1.0).t().contiguous().t(), target, **options)
    with pytest.raises(ValueError, match="rows fill their storage"):
        dro_cross_entropy((leaf * 1.0)[1:], target[1:], **options)


def test_padding_after_the_row_is_not_read(backend, device):
    wide = torch.full((5, 64), 1e30, device=device)
    wide[:, 33:] = math.nan
    wide[:, :33] = torch.randn(5, 33, device=device)
    target = torch.tensor([0, 5, 32, 7, 9], device=device)
    loss, grad, _ = run(wide[:, :33], target, reduction="none", backend=backend)
    exact, exact_grad = rows(wide[:, :33], target)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-5, atol=1e-7)


def test_sum_of_fp16_does_not_overflow(backend, device):
    logits = torch.randn(200, 64, device=device, dtype=torch.float16) * 3
    logits[:, 0] = -500
    target = torch.zeros(200, dtype=torch.int64, device=device)
    loss, _, _ = run(logits, target, reduction="sum", backend=backend)
    assert loss.dtype == torch.float32 and 65504 < loss < INF


def test_fp16_gradients_are_not_flushed_by_the_mean(backend, device):
    n = 4096
    # A row takes 20 ms in Triton's interpreter: fewer of them, over the same normaliser.
    interpreted = backend == "triton" and device == "cpu"
    count, options = (64, {"normalizer": n}) if interpreted else (n, {})
    logits = torch.zeros(count, 32, device=device, dtype=torch.float16)
    target = torch.zeros(count, dtype=torch.int64, device=device)
    upstream = torch.tensor(65536.0, device=device)  # a usual loss scale
    _, grad, _ = run(logits, target, upstream=upstream, backend=backend, **options)
    exact = torch.full((count, 31), 65536.0 / (32 * n), device=device).double()
    torch.testing.assert_close(grad[:, 1:].double(), exact, rtol=2e-3, atol=0)


def test_gradient_of_one_confident_row_in_bf16(backend, device):
    logits = torch.zeros(1, 1000, device=device, dtype=torch.bfloat16)
    logits[0, 5] = 12.0
    target = torch.tensor([5], device=device)
    _, grad, _ = run(logits, target, backend=backend)
    _, exact = rows(logits, target)
    assert 0.001 < exact[0, 5].abs() < 0.1
    torch.testing.assert_close(grad.double(), exact, rtol=torch.finfo(torch.bfloat16).eps, atol=0)


def test_loss_at_an_offset_of_1e4_keeps_its_digits(backend, device):
    logits = (torch.randn(4, 500, device=device) + 1e4).float()
    target = torch.tensor([1, 2, 3, 4], device=device)
    loss, _, _ = run(logits, target, 0.5, reduction="none", backend=backend)
    torch.testing.assert_close(loss.double(), rows(logits, target, 0.5)[0], rtol=2e-6, atol=0)


def test_ignored_rows_add_no_rho_term(backend, device):
    logits = torch.randn(4, 9, device=device)
    target = torch.tensor([1, -100, -100, 3], device=device)
    loss, _, grad_tau = run(logits, target, 2.0, 5.0, backend=backend)
    alone, _, _ = run(logits[[0, 3]], target[[0, 3]], 2.0, 5.0, backend=backend)
    torch.testing.assert_close(loss, alone, rtol=1e-6, atol=1e-6)
    assert (grad_tau[[1, 2]] == 0).all()


def test_a_loss_mask_is_not_ignored(backend, device):
    logits = torch.randn(4, 9, device=device)
    target = torch.tensor([1, 2, 3, 4], device=device)
    mask = torch.tensor([1.0, 0.0, 1.0, 0.0], device=device)
    loss, grad, _ = run(logits, target, row_weight=mask, backend=backend)
    alone, _, _ = run(logits[::2], target[::2], backend=backend)
    torch.testing.assert_close(loss, alone, rtol=1e-6, atol=1e-6)
    assert (grad[1::2] == 0).all() and (grad[::2] != 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("weight", [math.nan, INF])
def test_the_weight_of_an_ignored_row_is_not_used(backend, weight, dtype, device):
    logits = torch.randn(3, 9, device=device).to(dtype)
    target = torch.tensor([1, -100, 3], device=device)
    weights = torch.tensor([1.0, weight, 2.0], device=device)
    zero = torch.tensor([1.0, 0.0, 2.0], device=device)
    for reduction in ("mean", "sum", "none"):
        options = {"reduction": reduction, "backend": backend}
        got = run(logits, target, row_weight=weights, **options)
        for g, expected in zip(got, run(logits, target, row_weight=zero, **options), strict=True):
            assert g.isfinite().all() and torch.equal(g, expected)


def test_other_ignore_index(backend, device):
    logits = torch.randn(3, 9, device=device)
    target = torch.tensor([1, 0, 3], device=device)
    loss, grad, _ = run(logits, target, ignore_index=0, backend=backend)
    alone, _, _ = run(logits[::2], target[::2], backend=backend)
    torch.testing.assert_close(loss, alone, rtol=1e-6, atol=1e-6)
    assert (grad[1] == 0).all()
