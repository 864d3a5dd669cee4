"""Softmax with a temperature per row, forward alone and with its backward: ours, PyTorch's formula,
and a copy of the logits.

    make bench

The variants run in turn, as in bench_dro_cross_entropy.py, and each is checked against the
definition in float64 before it is timed.
"""

import pytest
import torch
from measure import peak_extra_mib, time_in_turn
from peers import SOFTMAXES

from tempnet_kernels import tempered_softmax

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
ROUNDS = 9 if CUDA else 7
OURS = "tempnet_kernels"
SHAPES = [
    (n, v, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for n, v in ((1024, 32000), (512, 128256))
]
if CUDA:
    SHAPES = [
        *((8192, v, torch.bfloat16) for v in (32000, 50257, 50304, 128256, 262144)),
        *((8192, v, torch.float32) for v in (32000, 128256)),
        *((n, 128256, torch.bfloat16) for n in (1, 64)),
    ]


def make(n, v, dtype):
    """(logits, tau, upstream gradient)."""
    torch.manual_seed(torch.seed())  # fresh data every run
    logits = (torch.randn(n, v, device=DEVICE, dtype=dtype) * 3).requires_grad_()
    tau = (torch.rand(n, device=DEVICE) + 0.5).requires_grad_()
    return logits, tau, torch.randn(n, v, device=DEVICE, dtype=dtype)


@torch.no_grad()
def forward(function, logits, tau, upstream):
    return function(logits, tau)


def forward_and_backward(function, logits, tau, upstream):
    output = function(logits, tau)
    return output.detach(), *torch.autograd.grad(output, (logits, tau), upstream)


def check(name, logits, tau, upstream):
    """A wrong kernel is not timed: the launch that is timed, some of its rows against float64."""
    rows = torch.randperm(logits.shape[0], device=logits.device)[:16]
    got = forward_and_backward(SOFTMAXES[name], logits, tau, upstream)
    z, t, g = (x.detach()[rows].double() for x in (logits, tau, upstream))
    exact = forward_and_backward(
        lambda z, t: tempered_softmax(z, t, backend="reference"),
        z.requires_grad_(), t.requires_grad_(), g,
    )  # fmt: skip
    for x, e in zip(got, exact, strict=True):
        # PyTorch sums tau's gradient over products that cancel.
        tolerance = 2e-5 if name.startswith(OURS) else 2e-4
        tolerance += torch.finfo(x.dtype).eps
        assert (x[rows].double() - e).abs().max() <= tolerance * e.abs().max(), name


@pytest.mark.parametrize("work", [forward, forward_and_backward], ids=lambda work: work.__name__)
@pytest.mark.parametrize("n, v, dtype", SHAPES, ids=str)
def test_tempered_softmax(benchmark, n, v, dtype, work):
    torch.compiler.reset()  # past a number of recompilations it runs eagerly, in silence
    logits, tau, upstream = make(n, v, dtype)
    variants = {}
    for name, function in SOFTMAXES.items():
        check(name, logits, tau, upstream)
        variants[name] = lambda function=function: work(function, logits, tau, upstream)
    variants["copy of the logits"] = lambda: logits.detach().clone()
    peak = {name: peak_extra_mib(run) for name, run in variants.items()}  # warms up, too
    time_in_turn(
        benchmark, OURS, variants, ROUNDS,
        op="tempered_softmax" + (", forward" if work is forward else ""), n=n, v=v,
        dtype=str(dtype).removeprefix("torch."), logits_mib=logits.nbytes / 2**20,
        peak_extra_mib=peak,
    )  # fmt: skip
