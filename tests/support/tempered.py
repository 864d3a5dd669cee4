"""Data, definition and check of the tests of the tempered softmax."""

import pytest
import torch
from compare import assert_within_twice_plain

from tempnet_kernels import tempered_log_softmax, tempered_softmax

FUNCTIONS = {False: tempered_softmax, True: tempered_log_softmax}
logarithm = pytest.mark.parametrize("log", [False, True], ids=["softmax", "log_softmax"])


def make(shape, dtype=torch.float32, device="cpu", spread=3.0):
    """(logits, tau, upstream gradient)"""
    n, v = shape
    logits = (torch.randn(n, v, device=device) * spread).to(dtype)
    upstream = torch.randn(n, v, device=device).to(dtype)
    return logits, torch.rand(n, device=device) + 0.5, upstream


def run(backend, log, logits, tau, upstream):
    """(output, d / d logits, d / d tau) through autograd."""
    z = logits.detach().requires_grad_()
    t = tau.detach().clone().requires_grad_()
    output = FUNCTIONS[log](z, t, backend=backend)
    return output.detach(), *torch.autograd.grad(output, (z, t), upstream)


def expected(log, logits, tau, upstream, dtype):
    """The formula through autograd in ``dtype``; what is not float64 is rounded to the inputs'."""
    z = logits.detach().to(dtype).requires_grad_()
    t = tau.detach().to(dtype).requires_grad_()
    output = (torch.log_softmax if log else torch.softmax)(z / t[:, None], -1)
    grad_logits, grad_tau = torch.autograd.grad(output, (z, t), upstream.to(dtype))
    if dtype == torch.float64:
        return output.detach(), grad_logits, grad_tau
    return output.detach().to(logits.dtype), grad_logits.to(logits.dtype), grad_tau.to(tau.dtype)


def check(backend, log, logits, tau, upstream):
    got = run(backend, log, logits, tau, upstream)
    exact = expected(log, logits, tau, upstream, torch.float64)
    plain = expected(log, logits, tau, upstream, torch.float32)
    names = ("output", "grad_logits", "grad_tau")
    for name, g, e, p in zip(names, got, exact, plain, strict=True):
        assert_within_twice_plain(g, e, p, name)
    return got, exact
