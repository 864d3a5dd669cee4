"""Data, definition and check of the tests of the token loss."""

import torch
from compare import assert_within_twice_plain, definition

from tempnet_kernels import dro_cross_entropy

RHO = 0.7
# (N, V, columns before the row): every kernel that a GPU of compute capability 9.0 launches.
CUDA_SHAPES = [
    (150, 33, 0),  # a row in the registers of one CTA
    (150, 1001, 1),  # the same, off 16 bytes
    (133, 36000, 1),  # read twice
    (133, 60000, 0),  # a cluster of 2 (float32: 4)
    (133, 128256, 0),  # of 4 (8)
    (133, 60001, 7),  # the same as with 60000, off 16 bytes
    (3, 20011, 0),  # few rows
]


def make(shape, dtype=torch.float32, device="cpu", spread=3.0, ignore=True):
    n, v = shape
    logits = (torch.randn(n, v, device=device) * spread).to(dtype)
    target = torch.randint(0, v, (n,), device=device)
    if ignore and n > 2:
        target[1] = -100
    tau = torch.rand(n, device=device) + 0.5
    return logits, target, tau


def run(backend, logits, target, tau, rho=RHO, upstream=None, **options):
    """(loss, d loss / d logits, d loss / d tau) through autograd."""
    z = logits.detach().clone().requires_grad_()
    t = tau.detach().clone().requires_grad_()
    loss = dro_cross_entropy(z, target, t, rho, backend=backend, **options)
    loss.backward(upstream)
    return loss.detach(), z.grad, t.grad


def expected(logits, target, tau, dtype, reduction="mean", weight=None, rho=RHO, **options):
    """The definition through autograd in ``dtype``; gradients rounded to the inputs' dtypes."""
    z = logits.detach().to(dtype).requires_grad_()
    t = tau.detach().to(dtype).requires_grad_()
    rows = definition(z, target, t, rho, **options)
    live = (target != -100).to(dtype)
    weight = live if weight is None else live * weight.to(dtype)
    rows = rows * weight
    loss = {"mean": rows.sum() / weight.sum(), "sum": rows.sum(), "none": rows}[reduction]
    loss.sum().backward()
    if dtype == torch.float64:
        return loss.detach(), z.grad, t.grad
    return loss.detach(), z.grad.to(logits.dtype), t.grad.to(tau.dtype)


def check(backend, logits, target, tau, **options):
    upstream = torch.ones_like(tau) if options.get("reduction") == "none" else None
    row_weight = options.get("row_weight")
    got = run(backend, logits, target, tau, upstream=upstream, **options)
    formula = {k: v for k, v in options.items() if k not in ("row_weight", "overwrite_logits")}
    exact = expected(logits, target, tau, torch.float64, weight=row_weight, **formula)
    plain = expected(logits, target, tau, torch.float32, weight=row_weight, **formula)
    for name, g, e, p in zip(("loss", "grad_logits", "grad_tau"), got, exact, plain, strict=True):
        assert_within_twice_plain(g, e, p, name)
    return got
