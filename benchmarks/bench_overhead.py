"""What a call costs beside the work: launches, and time at small sizes, of every public function
and module against the official formula, ``F.cross_entropy`` and open_clip's loss, all in eager.

    .venv/bin/python -m pytest benchmarks/bench_overhead.py --benchmark-json=overhead.json

Forward and backward, with one thread on a CPU. On a GPU it is the time of the host and the device
together, and the launches are the profiler's.
"""

import time
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from launches import launches
from measure import synchronize, time_in_turn
from peers import official_pairs, open_clip

from tempnet_kernels import (
    dro_contrastive,
    dro_cross_entropy,
    linear_dro_cross_entropy,
    optimal_temperature,
    tempered_log_softmax,
    tempered_softmax,
)
from tempnet_kernels.nn import (
    ContrastiveTempNet,
    DROCrossEntropyLoss,
    RobustContrastiveLoss,
    TempNet,
    TempNetCausalLMLoss,
    TempNetCrossEntropyLoss,
)
from tempnet_kernels.reference.official import official_cross_entropy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RHO = 3.0
CALLS = 20  # at a time: the clock is read around them
ROUNDS = 15


class Call(NamedTuple):
    function: object  # of no arguments, to a loss or to tensors that are summed for the backward
    leaves: list  # what gets a gradient


def step(call):
    """Forward, and backward where something learns."""
    for leaf in call.leaves:
        leaf.grad = None
    result = call.function()
    if call.leaves:
        result.sum().backward() if result.dim() else result.backward()


def token_calls(n, v, device=DEVICE):
    """{name: Call} on logits ``[n, v]``; with peers."""
    logits, target, tau = (
        torch.randn(n, v, device=device, requires_grad=True),
        torch.randint(0, v, (n,), device=device),
        torch.ones(n, device=device).requires_grad_(),
    )
    module, network = DROCrossEntropyLoss(RHO), TempNet(v).to(device)
    predicted, causal = TempNetCrossEntropyLoss(network, RHO), TempNetCausalLMLoss(network, RHO)
    own, learned = [logits, tau], [logits, *network.parameters()]
    z = logits.detach()
    return {
        "F.cross_entropy": Call(lambda: F.cross_entropy(logits, target), [logits]),
        "official eager": Call(lambda: official_cross_entropy(logits, target, tau, RHO), own),
        "dro_cross_entropy": Call(lambda: dro_cross_entropy(logits, target, tau, RHO), own),
        "DROCrossEntropyLoss": Call(lambda: module(logits, target, tau), own),
        "tempered_softmax": Call(lambda: tempered_softmax(logits, tau), own),
        "tempered_log_softmax": Call(lambda: tempered_log_softmax(logits, tau), own),
        "optimal_temperature": Call(lambda: optimal_temperature(z, RHO, 0.05, 2.0), []),
        "official eager, TempNet": Call(
            lambda: official_cross_entropy(logits, target, network(z), RHO), learned
        ),
        "TempNet": Call(lambda: network(z), learned[1:]),
        "TempNetCrossEntropyLoss": Call(lambda: predicted(logits, target), learned),
        "TempNetCausalLMLoss": Call(lambda: causal(logits, target), learned),
    }


def linear_calls(n, v, d, device=DEVICE):
    hidden = torch.randn(n, d, device=device, requires_grad=True)
    weight = torch.randn(v, d, device=device).mul_(d**-0.5).requires_grad_()
    target = torch.randint(0, v, (n,), device=device)
    tau, network = torch.ones(n, device=device).requires_grad_(), TempNet(v).to(device)
    own, learned = [hidden, weight, tau], [hidden, weight, *network.parameters()]

    def ours(**options):
        return lambda: linear_dro_cross_entropy(hidden, weight, target, rho=RHO, **options)

    def official():
        z = F.linear(hidden, weight)
        return official_cross_entropy(z, target, network(z.detach()), RHO)

    chunk = -(-n // 8)
    return {
        "F.linear, F.cross_entropy": Call(
            lambda: F.cross_entropy(F.linear(hidden, weight), target), own[:2]
        ),
        "official eager, TempNet": Call(official, learned),
        "linear_dro_cross_entropy": Call(ours(tau=tau), own),
        "linear_dro_cross_entropy, 8 chunks": Call(ours(tau=tau, chunk_rows=chunk), own),
        "linear_dro_cross_entropy, TempNet": Call(ours(tempnet=network), learned),
        "linear_dro_cross_entropy, TempNet, 8 chunks": Call(
            ours(tempnet=network, chunk_rows=chunk), learned
        ),
    }


def contrastive_calls(b, d, device=DEVICE):
    image, text = (
        F.normalize(x, dim=1).requires_grad_() for x in torch.randn(2, b, d, device=device)
    )
    taus = [t.requires_grad_() for t in (0.02 + 0.02 * torch.rand(2, b, device=device)).unbind()]
    ids = torch.randperm(4 * b, device=device)[:b]
    features = [image, text]
    networks = [ContrastiveTempNet(d, seed=seed).to(device) for seed in (0, 1)]
    calls = {
        "open_clip's formula": Call(lambda: open_clip(image, text, *taus), [*features, taus[0]]),
        "official eager": Call(lambda: official_pairs(image, text, *taus), [*features, *taus]),
        "dro_contrastive": Call(
            lambda: dro_contrastive(image, text, *taus, RHO), [*features, *taus]
        ),
        "ContrastiveTempNet": Call(lambda: networks[0](image, ids), list(networks[0].parameters())),
    }
    for method in ("clip", "sogclr", "isogclr", "tempnet"):
        kwargs = {}
        if method == "tempnet":
            kwargs = {"image_temp_gen": networks[0], "text_temp_gen": networks[1]}
        samples = 0 if method == "clip" else 4 * b
        loss = RobustContrastiveLoss(samples, rho=RHO, method=method, **kwargs).to(device)
        calls[f"RobustContrastiveLoss, {method}"] = Call(
            lambda loss=loss: loss(image, text, ids), [*features, *loss.parameters()]
        )
    return calls


GROUPS = {
    "token loss": (token_calls, [(1, 1000), (64, 1000), (64, 32000)]),
    "linear loss": (linear_calls, [(64, 1000, 64)]),
    "contrastive loss": (contrastive_calls, [(64, 64), (128, 256), (256, 512), (1024, 512)]),
}


def time_us(function):
    """Of one call, host and device together."""
    synchronize()
    begin = time.perf_counter()
    for _ in range(CALLS):
        function()
    synchronize()
    return (time.perf_counter() - begin) * 1e6 / CALLS


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "group, shape", [(group, shape) for group, (_, shapes) in GROUPS.items() for shape in shapes]
)
def test_overhead(benchmark, group, shape):
    calls = GROUPS[group][0](*shape)
    steps = {name: lambda call=call: step(call) for name, call in calls.items()}
    counts = {name: launches(function).total() for name, function in steps.items()}
    ours = next(name for name in steps if "dro" in name)
    time_in_turn(
        benchmark, ours, steps, ROUNDS, clock=time_us, op=f"overhead of the {group}",
        shape=list(shape), launches=counts,
    )  # fmt: skip
