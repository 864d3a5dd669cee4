"""The bound of every comparison is computed from the data, never chosen (docs/numerics.md)."""

import contextlib
import functools
import math
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode


def definition(
    logits, target, tau, rho=0.0, *, label_smoothing=0.0, z_loss=0.0, softcap=None,
    ignore_index=-100,
):  # fmt: skip
    """The token loss per row as its formula reads, differentiable, in the dtype of ``logits``."""
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    v = logits.shape[-1]
    y = torch.where(target == ignore_index, 0, target).long()
    lse = torch.logsumexp(logits / tau[..., None], -1)
    z_y = logits.gather(-1, y[..., None])[..., 0]
    mean = logits.mean(-1) if label_smoothing else 0.0
    loss = tau * (lse + rho - math.log(v)) - (1 - label_smoothing) * z_y - label_smoothing * mean
    return torch.where(target == ignore_index, 0, loss + z_loss * lse**2)


def statistics(logits, tau):
    """(lse, entropy, kl) of softmax(logits / tau) in float64."""
    x = logits.double() / tau.double()[..., None]
    log_p = torch.log_softmax(x, -1)
    entropy = -torch.where(log_p > -math.inf, log_p.exp() * log_p, 0).sum(-1)
    return torch.logsumexp(x, -1), entropy, math.log(logits.shape[-1]) - entropy


def assert_within_twice_plain(got, exact, plain, name=""):
    """``got`` may be at most twice as far from ``exact`` as the plain formula is, plus one unit."""
    assert got.shape == exact.shape, f"{name}: {tuple(got.shape)} != {tuple(exact.shape)}"
    if not got.numel():
        return
    exact, plain = exact.double(), plain.double()
    unit = torch.finfo(got.dtype).eps * exact.abs().max()
    error = (got.double() - exact).abs().max()
    bound = 2 * ((plain - exact).abs().max() + unit)
    assert error <= bound, f"{name}: error {error:.3e} > bound {bound:.3e}"


def assert_entropy_accurate(got, exact, vocab_size, name=""):
    """The absolute bound of H, kl and d loss / d tau in float32."""
    error = (got.double() - exact).abs().max()
    bound = 2e-6 * max(1.0, math.log(vocab_size))
    assert error <= bound, f"{name}: error {error:.3e} > bound {bound:.3e}"


def assert_graph_replays(step):
    """A captured step gives what it gives uncaptured. Capture raises where anything waits for the
    GPU."""
    eager = [x.clone() for x in step()]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for x in captured:
        x.fill_(7)
    graph.replay()
    for got, expected in zip(captured, eager, strict=True):
        assert torch.equal(got, expected)


@contextlib.contextmanager
def counted_flops(module, *loops):
    """The floating-point operations of the matrix products in these functions of ``module``, in a
    list. They run within an operator, where a counter around the call does not see them."""
    flops = []

    def counted(loop, *args):
        with FlopCounterMode(display=False) as counter:
            result = loop(*args)
        flops.append(counter.get_total_flops())
        return result

    replaced = {name: functools.partial(counted, getattr(module, name)) for name in loops}
    with mock.patch.multiple(module, **replaced):
        yield flops
