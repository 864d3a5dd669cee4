"""Token loss, forward and backward: ours, the official formula, plain cross entropy, and a copy of
the logits.

    make bench

The variants run in turn, round by round, so that a drift of the machine meets all of them. Each is
checked against the definition in float64 before it is timed. On a GPU also: Triton, the gradient in
the logits' place, the forward alone with all statistics, and the peers that are installed.
"""

import pytest
import torch
from measure import environment, peak_extra_mib, time_ms
from peers import NO_TEMPERATURE, OVERWRITES, TOKEN_LOSSES

from tempnet_kernels import dro_cross_entropy

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
RHO = 8.0
ROUNDS = 9 if CUDA else 7
OURS = "tempnet_kernels"
SHAPES = [
    (n, v, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for n, v in ((1024, 32000), (2048, 50304), (512, 128256))
]
if CUDA:
    SHAPES = [
        *((8192, v, torch.bfloat16) for v in (32000, 50257, 50304, 128256, 151936, 262144)),
        *((8192, v, torch.float32) for v in (32000, 50304, 128256, 151936, 262144)),
        *((n, 128256, torch.bfloat16) for n in (1, 16, 64)),
    ]


def make(n, v, dtype):
    torch.manual_seed(torch.seed())  # fresh data every run
    logits = (torch.randn(n, v, device=DEVICE, dtype=dtype) * 3).requires_grad_()
    target = torch.randint(0, v, (n,), device=DEVICE)
    return logits, target, (torch.rand(n, device=DEVICE) + 0.5).requires_grad_()


def gradients(name, logits, target, tau):
    loss = TOKEN_LOSSES[name](logits, target, tau, RHO)
    inputs = (logits,) if name in NO_TEMPERATURE else (logits, tau)
    return loss.detach(), *torch.autograd.grad(loss, inputs)


def overwriting(logits, target, tau):
    loss = dro_cross_entropy(logits, target, tau, RHO, overwrite_logits=True)
    return loss.detach(), torch.autograd.grad(loss, tau)


@torch.no_grad()
def statistics(logits, target, tau):
    return dro_cross_entropy(logits, target, tau, RHO, return_stats=True)


def check(name, logits, target, tau):
    """A wrong kernel is not timed: the launch that is timed, some of its rows against float64. In
    float32 the official formula's gradient of tau keeps four digits at V = 128256."""
    n = logits.shape[0]
    rows = torch.randperm(n, device=logits.device)[:16]
    _, grad_logits, grad_tau = gradients(name, logits, target, tau)
    z = logits.detach()[rows].double().requires_grad_()
    t = tau.detach()[rows].double().requires_grad_()
    loss = dro_cross_entropy(z, target[rows], t, RHO, normalizer=n, backend="reference")
    exact_logits, exact_tau = torch.autograd.grad(loss, (z, t))
    tolerance = 2e-5 if name.startswith(OURS) else 2e-4
    if logits.dtype != torch.float32:
        tolerance = 5e-2
    error = (grad_logits[rows].double() - exact_logits).abs().max()
    assert error <= tolerance * exact_logits.abs().max(), name
    # rho - kl may be near 0: there the terms that it is the difference of are the measure.
    assert (grad_tau[rows].double() - exact_tau).abs().max() <= tolerance / n, name


@pytest.mark.parametrize("n, v, dtype", SHAPES, ids=str)
def test_token_loss(benchmark, n, v, dtype):
    torch.compiler.reset()  # past a number of recompilations it runs eagerly, in silence
    logits, target, tau = make(n, v, dtype)
    missing = set()
    for name in TOKEN_LOSSES:
        try:
            if name not in NO_TEMPERATURE:
                check(name, logits, target, tau)
        except torch.OutOfMemoryError:
            print(f"{name}: out of memory at {n} x {v}")
            missing.add(name)

    # What overwrites the logits gets a copy, which is made before and not counted.
    variants = {
        name: lambda z, name=name: gradients(name, z, target, tau)
        for name in TOKEN_LOSSES
        if name not in missing
    }
    variants[f"{OURS}, overwrite_logits"] = lambda z: overwriting(z, target, tau)
    if CUDA:
        variants[f"{OURS}, forward with statistics"] = lambda z: statistics(z, target, tau)
    variants["copy of the logits"] = lambda z: z.detach().clone()
    copied = {*OVERWRITES, f"{OURS}, overwrite_logits"}

    def prepared(name):
        if name not in copied:
            return logits
        return logits * 1.0 if name.startswith(OURS) else logits.detach().clone().requires_grad_()

    peak, times = {}, {}
    for name in list(variants):
        z = prepared(name)
        try:
            peak[name] = peak_extra_mib(lambda name=name, z=z: variants[name](z))  # warms up, too
            times[name] = []
        except torch.OutOfMemoryError:
            print(f"{name}: out of memory at {n} x {v}")
            del variants[name]

    def once(name):
        z = prepared(name)
        times[name].append(time_ms(lambda: variants[name](z)))

    def in_turn():
        for name in variants:
            if name != OURS:
                once(name)

    benchmark.pedantic(lambda: once(OURS), setup=in_turn, rounds=ROUNDS, warmup_rounds=1)
    benchmark.extra_info.update(
        op="dro_cross_entropy", n=n, v=v, dtype=str(dtype).removeprefix("torch."),
        logits_mib=logits.nbytes / 2**20, environment=environment(),
        time_ms={name: values[1:] for name, values in times.items()}, peak_extra_mib=peak,
    )  # fmt: skip
