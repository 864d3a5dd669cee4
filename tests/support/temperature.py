"""Rows, definition and check of the tests of the optimal temperature."""

import math

import compare
import torch

from tempnet_kernels import optimal_temperature

LOW, HIGH = 1e-3, 1e3
INF = math.inf


def kinds(n, v, device="cpu"):
    """{kind of row: logits [n, v]}"""
    z = torch.randn(n, v, device=device)
    first = torch.arange(v, device=device)
    stairs = 0.01 * (first > 0) + (first >= v // 40) + 99.0 * (first >= v // 2)
    peaked = z * 0.5
    peaked[:, v // 2] += 30
    masked = z * 3
    masked[:, ::3] = -INF
    return {
        "normal": z * 3,
        "small": z * 1e-3,
        "large": z * 1e3,
        "offset": z * 3 + 1e4,
        "peaked": peaked,
        "zipf": (-2 * torch.log(first + 1.0)).expand(n, v),
        "cauchy": torch.tan(math.pi * 0.498 * (2 * torch.rand(n, v, device=device) - 1)),
        "ties": torch.where(first < max(1, v // 50), 0.0, -1.0).expand(n, v),
        "stairs": (-stairs).expand(n, v),
        "masked": masked,
    }  # fmt: skip


def variance(logits, tau):
    """-d kl / d log tau: the variance of z / tau under softmax(z / tau), in float64."""
    x = logits.double() / tau.double()[:, None]
    p = torch.softmax(x, 1)
    x = torch.where(p > 0, x, 0)
    return (p * (x - (p * x).sum(1, keepdim=True)) ** 2).sum(1)


def kl_at(logits, tau):
    return compare.statistics(logits, torch.as_tensor(tau).expand(logits.shape[0]))[2]


def check(logits, rho, backend, low=LOW, high=HIGH):
    """(number of rows that are not clipped, most iterations)"""
    tau, stats = optimal_temperature(logits, rho, low, high, return_stats=True, backend=backend)
    double = logits.dtype == torch.float64
    tolerance = 1e-11 if double else 1e-5
    assert tau.dtype == stats.kl.dtype == (torch.float64 if double else torch.float32)
    assert stats.iterations.dtype == torch.int32
    assert (stats.iterations >= 1).all() and (stats.iterations <= 30).all()
    kl = kl_at(logits, tau)
    ends = tau.new_tensor([low, high])
    assert ((tau >= ends[0]) & (tau <= ends[1])).all()
    at_low, at_high = tau == ends[0], tau == ends[1]
    error = kl - rho
    error = torch.where(at_low, error.clamp(min=0), torch.where(at_high, error.clamp(max=0), error))
    assert error.abs().max() <= tolerance, error
    assert (stats.kl.double() - kl).abs().max() <= tolerance
    # No row is clipped whose root lies inside.
    assert (at_low <= (kl_at(logits, low) <= rho + tolerance)).all()
    assert (at_high <= (kl_at(logits, high) >= rho - tolerance)).all()
    return (~at_low & ~at_high).sum().item(), stats.iterations.max().item()
