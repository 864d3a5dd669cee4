"""Data, definition and check of the tests of the token loss whose columns several gloo processes
share."""

import math

import compare
import torch

from tempnet_kernels import dro_cross_entropy

RHO = 0.7


def make(n=7, v=44, dtype=torch.float32, spread=3.0):
    """(logits, target, tau, row_weight): the targets are on all of four ranks, and one is
    ignored."""
    logits = (torch.randn(n, v) * spread).to(dtype)
    target = torch.arange(n) * v // n
    if n > 2:
        target[1] = -100
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    return logits, target, torch.rand(n, dtype=acc) + 0.5, torch.rand(n, dtype=acc) + 0.2


def own_columns(x, group):
    return x.chunk(group.size(), -1)[group.rank()]


def visit(group, logits, target, tau, weight, options, padded=False):
    """(loss, gradients of the rank's logits, tau and row_weight, statistics)"""
    own = own_columns(logits, group)
    leaf = torch.full((*own.shape[:-1], own.shape[-1] + 3 * padded), math.nan, dtype=own.dtype)
    leaf[..., : own.shape[-1]] = own
    leaf.requires_grad_()
    t, w = (None if x is None else x.clone().requires_grad_() for x in (tau, weight))
    used = leaf * 1 if options.get("overwrite_logits") else leaf
    loss, stats = dro_cross_entropy(
        used[..., : own.shape[-1]], target, t, RHO, row_weight=w, return_stats=True,
        process_group=group, **options,
    )  # fmt: skip
    loss.backward(torch.ones_like(loss))
    grad, rest = leaf.grad.split([own.shape[-1], 3 * padded], -1)
    assert (rest == 0).all()
    return loss.detach(), grad, t.grad, None if w is None else w.grad, stats


def expected(logits, target, tau, weight, dtype, reduction="mean", normalizer=None, **formula):
    """The same of the definition in ``dtype``, rounded to the types of the inputs."""
    # autograd has no derivative of -inf / tau; the weight of -1e4 is 0 too.
    z, t = (x.detach().to(dtype).requires_grad_() for x in (logits.clamp(min=-1e4), tau))
    w = torch.ones_like(tau) if weight is None else weight
    w = w.detach().to(dtype).requires_grad_()
    rows = compare.definition(z, target, t, RHO, **formula)
    live = (target != -100).to(dtype)
    loss = rows * w * live
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        loss = loss / ((w * live).sum() if normalizer is None else normalizer)
    grads = torch.autograd.grad(loss.sum(), (z, t, w))
    if dtype == torch.float64:
        return loss.detach(), *grads
    return loss.detach(), *(g.to(x.dtype) for g, x in zip(grads, (logits, tau, tau), strict=True))


def check(gloo, world_size, tensors, padded=False, **options):
    logits, target, tau, _ = tensors
    results = gloo.run(world_size, visit, *tensors, options, padded)
    formula = {
        k: v for k, v in options.items() if k not in ("backend", "overwrite_logits")
    }  # fmt: skip
    exact = expected(*tensors, torch.float64, **formula)
    plain = expected(*tensors, torch.float32, **formula)
    for other in results[1:]:
        for i in (0, 2, 3):
            assert other[i] is None or torch.equal(other[i], results[0][i]), "equal on every rank"
        torch.testing.assert_close(other[4], results[0][4], rtol=0, atol=0, equal_nan=True)
    loss, _, *grads, stats = results[0]
    got = loss, torch.cat([result[1] for result in results], -1), *grads
    names = ("loss", "grad_logits", "grad_tau", "grad_row_weight")
    for name, g, e, p in zip(names, got, exact, plain, strict=True):
        if g is not None:
            compare.assert_within_twice_plain(g, e, p, name)
    live = target != -100
    c = options.get("softcap")
    seen = c * torch.tanh(logits.double() / c) if c else logits
    _, entropy, kl = compare.statistics(seen, tau)
    y = target.clamp(min=0)[..., None]

    def lse_and_log_prob(dtype):
        z = logits.to(dtype)
        x = (c * torch.tanh(z / c) if c else z) / tau.to(dtype)[..., None]
        return torch.logsumexp(x, -1), torch.log_softmax(x, -1).gather(-1, y)[..., 0]

    pairs = zip(*map(lse_and_log_prob, (torch.float64, torch.float32)), strict=True)
    for name, (e, p) in zip(("lse", "log_prob"), pairs, strict=True):
        compare.assert_within_twice_plain(getattr(stats, name)[live], e[live], p[live], name)
    for name, e in {"entropy": entropy, "kl": kl}.items():
        compare.assert_entropy_accurate(
            getattr(stats, name)[live], e[live], logits.shape[-1], name
        )  # fmt: skip
    assert torch.equal(stats.argmax, torch.where(live, logits.float().argmax(-1), -1))
    assert all(s[~live].isnan().all() for s in stats if s.is_floating_point())
    return got, stats
