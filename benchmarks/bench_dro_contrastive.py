"""Contrastive loss, forward and backward: ours, the official formula, the loss of open_clip, and
four matrix products of that size, which is the limit of a loss that recomputes the similarities.

    make bench

The variants run in turn, round by round. Ours and the official formula are checked against the
definition in float64 before they are timed.
"""

import pytest
import torch
import torch.nn.functional as F
from measure import environment, peak_extra_mib, time_ms

from tempnet_kernels import dro_contrastive
from tempnet_kernels.reference.official import official_contrastive

D = 512
RHO, GAMMA = 7.0, 0.8
ROUNDS = 5
OURS = "tempnet_kernels"

_compiled = torch.compile(official_contrastive, dynamic=False)


def official(image, text, tau_image, tau_text, state, function=official_contrastive):
    ids = torch.arange(image.shape[0])
    return function(image, text, tau_image, tau_text, RHO, GAMMA, dict(state), ids, 0)


def official_compiled(*arguments):
    return official(*arguments, function=_compiled)


def open_clip(image, text, tau_image, tau_text, state):
    """One temperature, softmax with the positive: the formula of ClipLoss on one process."""
    logits = image @ text.T / tau_image[0]
    y = torch.arange(image.shape[0])
    return (F.cross_entropy(logits, y) + F.cross_entropy(logits.T, y)) / 2


def ours(image, text, tau_image, tau_text, state):
    return dro_contrastive(image, text, tau_image, tau_text, RHO, gamma=GAMMA)


LOSSES = {
    "official eager": official,
    "official compiled": official_compiled,
    "open_clip's formula": open_clip,
    OURS: ours,
}


def gradients(name, *tensors, state):
    loss = LOSSES[name](*tensors, state)
    return torch.autograd.grad(loss, tensors, allow_unused=True)


@torch.no_grad()
def four_products(image, text, *_, state=None):
    similarity = image @ text.T
    torch.mm(image, text.T, out=similarity)
    return similarity @ text, similarity.T @ image


def check(name, tensors, state):
    exact = [t.detach().double().requires_grad_() for t in tensors]
    loss = dro_contrastive(*exact, RHO, gamma=GAMMA, backend="reference")
    for got, want in zip(
        gradients(name, *tensors, state=state), torch.autograd.grad(loss, exact), strict=True
    ):
        assert (got - want).norm() <= 1e-5 * want.norm(), name


@pytest.mark.parametrize("b", [2048, 4096, 8192])
def test_contrastive_loss(benchmark, b):
    torch.manual_seed(torch.seed())  # fresh data every run
    torch.compiler.reset()
    image = F.normalize(torch.randn(b, D), dim=1)
    text = F.normalize(image + torch.randn(b, D) / D**0.5, dim=1)
    taus = 0.05 + 0.1 * torch.rand(2, b)
    tensors = [t.requires_grad_() for t in (image, text, *taus.unbind())]
    state = {k: torch.zeros(b) for k in ("s_I", "b_I", "s_T", "b_T")}
    for name in ("official eager", "official compiled", OURS):
        check(name, tensors, state)
    variants = {
        name: lambda name=name: gradients(name, *tensors, state=state) for name in LOSSES
    } | {"four matrix products": lambda: four_products(*tensors)}
    peak = {}
    times = {name: [] for name in variants}
    for name, function in variants.items():
        # The first call too, which compiles: the allocator keeps what a later one would ask for.
        peak[name] = peak_extra_mib(function)

    def once(name):
        times[name].append(time_ms(variants[name]))

    def in_turn():
        for name in variants:
            if name != OURS:
                once(name)

    benchmark.pedantic(lambda: once(OURS), setup=in_turn, rounds=ROUNDS, warmup_rounds=1)
    benchmark.extra_info.update(
        op="dro_contrastive", n=b, d=D, dtype="float32", environment=environment(),
        time_ms={name: values[1:] for name, values in times.items()}, peak_extra_mib=peak,
    )  # fmt: skip
