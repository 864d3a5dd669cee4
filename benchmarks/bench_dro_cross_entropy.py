"""Token loss, forward and backward: ours, the official formula, plain cross entropy, and a copy of
the logits.

    make bench

The variants run in turn, round by round, so that a drift of the machine meets all of them. Each is
checked against the definition in float64 before it is timed.
"""

import pytest
import torch
from measure import environment, peak_extra_mib, synchronize, time_ms
from peers import TOKEN_LOSSES

from tempnet_kernels import dro_cross_entropy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RHO = 8.0
ROUNDS = 7
TEMPERED = ("official eager", "official compiled", "tempnet_kernels")


def gradients(function, logits, target, tau):
    inputs = (
        (logits, tau) if function.__name__ not in ("cross_entropy", "liger", "quack") else (logits,)
    )
    loss = function(logits, target, tau, RHO)
    return loss.detach(), *torch.autograd.grad(loss, inputs)


def peak_overwriting(logits, target, tau):
    """Ours with the gradient in the storage of the logits: of a copy, which is made before and not
    counted."""
    wide = logits * 1.0

    def overwriting():
        loss = dro_cross_entropy(wide, target, tau, RHO, overwrite_logits=True)
        return loss.detach(), torch.autograd.grad(loss, tau)

    return peak_extra_mib(overwriting)


def check(name, logits, target, tau):
    """A wrong kernel is not timed. In float32 the official formula's gradient of tau keeps four
    digits at V = 128256."""
    rows = slice(0, 8)
    z = logits.detach()[rows].clone().requires_grad_()
    t = tau.detach()[rows].clone().requires_grad_()
    got = gradients(TOKEN_LOSSES[name], z, target[rows], t)
    exact_inputs = z.detach().double().requires_grad_(), t.detach().double().requires_grad_()
    loss = dro_cross_entropy(
        exact_inputs[0], target[rows], exact_inputs[1], RHO, backend="reference"
    )
    exact = loss.detach(), *torch.autograd.grad(loss, exact_inputs)
    tolerance = {"tempnet_kernels": 2e-5}.get(name, 2e-4)
    if logits.dtype != torch.float32:
        tolerance = 5e-2
    for g, e in zip(got, exact, strict=True):
        # The loss and rho - kl may be near 0: there the terms that they are the difference of are
        # the measure.
        scale = e.abs().max() if e.dim() == 2 else 1.0
        assert (g.double() - e).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("n, v", [(1024, 32000), (2048, 50304), (512, 128256)])
def test_token_loss(benchmark, n, v, dtype):
    torch.manual_seed(torch.seed())  # fresh data every run
    torch.compiler.reset()  # past a number of recompilations it runs eagerly, in silence
    logits = (torch.randn(n, v, device=DEVICE) * 3).to(dtype).requires_grad_()
    target = torch.randint(0, v, (n,), device=DEVICE)
    tau = (torch.rand(n, device=DEVICE) + 0.5).requires_grad_()
    variants = {
        name: lambda f=f: gradients(f, logits, target, tau) for name, f in TOKEN_LOSSES.items()
    }
    variants["copy of the logits"] = lambda: logits.detach().clone()
    for name in TEMPERED:
        check(name, logits, target, tau)

    peak = {name: peak_extra_mib(variant) for name, variant in variants.items()}  # warms up, too
    peak["tempnet_kernels, overwrite_logits"] = peak_overwriting(logits, target, tau)
    times = {name: [] for name in variants}

    def in_turn():
        for name, variant in variants.items():
            if name != "tempnet_kernels":
                times[name].append(time_ms(variant))
        synchronize()

    def timed():
        times["tempnet_kernels"].append(time_ms(variants["tempnet_kernels"]))

    benchmark.pedantic(timed, setup=in_turn, rounds=ROUNDS, warmup_rounds=1)
    benchmark.extra_info.update(
        op="dro_cross_entropy", n=n, v=v, dtype=str(dtype).removeprefix("torch."),
        logits_mib=logits.nbytes / 2**20, environment=environment(),
        time_ms={name: values[1:] for name, values in times.items()}, peak_extra_mib=peak,
    )  # fmt: skip
