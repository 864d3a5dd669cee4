"""Optimal temperature: ours, a bisection in eager PyTorch, and a copy of the logits.

    make bench

The variants run in turn, round by round. Ours is checked in float64 before it is timed. On a GPU
also Triton.
"""

import functools
import math

import pytest
import torch
from measure import peak_extra_mib, time_in_turn

from tempnet_kernels import optimal_temperature

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
TAU_MIN, TAU_MAX = 0.05, 5.0
STEPS = 30  # of the bisection: 1e-8 in log tau
ROUNDS = 9 if CUDA else 5
OURS = "tempnet_kernels"
SHAPES = [
    (n, v, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for n, v in ((256, 32000), (256, 50304), (64, 128256))
]
if CUDA:
    SHAPES = [
        *((8192, v, torch.bfloat16) for v in (32000, 50257, 50304, 128256, 262144)),
        *((4096, v, torch.float32) for v in (32000, 128256)),
        *((n, 128256, torch.bfloat16) for n in (1, 64)),
    ]


def make(n, v, dtype):
    """Rows from nearly certain to nearly flat."""
    logits = torch.randn(n, v, device=DEVICE) * (0.5 + 4 * torch.rand(n, 1, device=DEVICE))
    logits[:, :50] += 12 * torch.rand(n, 50, device=DEVICE)
    return logits.to(dtype)


def kl_at(logits, tau):
    x = logits / tau[:, None]
    log_p = torch.log_softmax(x, 1)
    return math.log(logits.shape[1]) + (log_p.exp() * log_p).sum(1)


def bisection(logits, rho):
    logits = logits.float()
    low = logits.new_full((logits.shape[0],), TAU_MIN)
    high = torch.full_like(low, TAU_MAX)
    for _ in range(STEPS):
        middle = (low * high).sqrt()
        above = kl_at(logits, middle) > rho
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return low


def check(name, backend, logits, rho):
    """A wrong solver is not timed: some rows of the launch that is timed, in float64. Returns
    what it took."""
    tau, stats = optimal_temperature(
        logits, rho, TAU_MIN, TAU_MAX, return_stats=True, backend=backend
    )
    rows = torch.randperm(logits.shape[0], device=logits.device)[:16]
    excess = kl_at(logits[rows].double(), tau[rows].double()) - rho
    excess[tau[rows] == TAU_MAX] = 0
    excess[(tau[rows] == tau.new_tensor(TAU_MIN)) & (excess < 0)] = 0
    assert excess.abs().max() <= 1e-5, name
    return {
        "iterations_mean": stats.iterations.float().mean().item(),
        "iterations_max": stats.iterations.max().item(),
        "clipped": ((tau == tau.new_tensor(TAU_MIN)) | (tau == TAU_MAX)).float().mean().item(),
    }


def prepare(n, v, dtype):
    """(logits, rho, {name: call}, check of ours)."""
    torch.manual_seed(torch.seed())  # fresh data every run
    logits, rho = make(n, v, dtype), 0.6 * math.log(v)
    backends = {OURS: "native"} | ({f"{OURS}, triton": "triton"} if CUDA else {})
    variants = {
        name: functools.partial(optimal_temperature, logits, rho, TAU_MIN, TAU_MAX, backend=backend)
        for name, backend in backends.items()
    }
    variants[f"bisection of {STEPS} steps, eager"] = lambda: bisection(logits, rho)
    return (
        logits,
        rho,
        variants,
        lambda: {name: check(name, b, logits, rho) for name, b in backends.items()}[OURS],
    )


@pytest.mark.parametrize("n, v, dtype", SHAPES, ids=str)
def test_optimal_temperature(benchmark, n, v, dtype):
    logits, _, variants, checked = prepare(n, v, dtype)
    found = checked()
    variants["copy of the logits"] = logits.clone
    peak = {name: peak_extra_mib(variant) for name, variant in variants.items()}  # warms up, too
    time_in_turn(
        benchmark, OURS, variants, ROUNDS, op="optimal_temperature", n=n, v=v,
        dtype=str(dtype).removeprefix("torch."), logits_mib=logits.nbytes / 2**20,
        peak_extra_mib=peak, **found,
    )  # fmt: skip
