"""Data and definition of the tests of the contrastive loss."""

import math

import compare
import torch
import torch.nn.functional as F

from tempnet_kernels import dro_contrastive

RHO = 7.0
NAMES = ("image", "text", "tau_image", "tau_text")


def make(m, d=24, n=None, dtype=torch.float32, low=0.1):
    n = n or m
    image = F.normalize(torch.randn(m, d), dim=1)
    text = torch.randn(n, d)
    text[:m] += 2 * image
    taus = (low + 0.2 * torch.rand(m) for _ in range(2))
    return (image.to(dtype), F.normalize(text, dim=1).to(dtype), *taus)


def definition(
    image, text, tau_image, tau_text, rho=RHO, *, gamma=1.0, log_s=(None, None), excluded=None,
    positive=None, include_positive=False,
):  # fmt: skip
    """(value, a function with its gradients, log_s of both sides, kl of both sides) as the formulas
    read, in the dtype of the input."""
    m, n = image.shape[0], text.shape[0]
    positive = torch.arange(m) if positive is None else positive
    similarity = image @ text.T
    s_positive = similarity.gather(1, positive[:, None])[:, 0]
    counts = torch.ones(m, n, dtype=torch.bool) if excluded is None else ~excluded
    counts = counts.scatter(1, positive[:, None], include_positive)
    value, surrogate, states, kls = 0.0, 0.0, [], []
    for h, tau, old, c in (
        (similarity - s_positive[:, None], tau_image, log_s[0], counts),
        ((similarity[:, positive] - s_positive).T, tau_text, log_s[1], counts[:, positive].T),
    ):
        number = c.sum(1)
        x = (h / tau[:, None]).detach().masked_fill(~c, -math.inf)
        log_g = torch.logsumexp(x, 1)
        log_new = log_g
        if old is not None:
            averaged = torch.log((1 - gamma) * old.exp() + gamma * log_g.exp())
            log_new = torch.where(old.isnan(), log_g, averaged)
        live = number > 0
        w = torch.where(c, torch.exp(x - log_new[:, None]), 0)
        x = torch.where(c, x, 0)
        k = torch.where(live, log_new - number.log() + rho - (w * x).sum(1), 0)
        term = tau.detach() * (log_new - number.log() + rho)
        value = value + torch.where(live, term, 0).sum() / m
        terms = (w * torch.where(c, h, 0)).sum(1) + k.detach() * tau
        surrogate = surrogate + torch.where(live, terms, 0).sum() / m
        states.append(torch.where(live, log_new, math.nan if old is None else old))
        p = torch.where(c, torch.exp(x - log_g[:, None]), 0)
        kl = number.log() - log_g + (p * x).sum(1)
        kls.append(torch.where(live, kl, math.nan))
    return value, surrogate, states, kls


def leaves(tensors, dtype=None):
    return [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]


def check(tensors, backend, log_s=(None, None), excluded=None, **options):
    """Value, statistics and the four gradients: 2e-6 of their norm."""
    own = {k: options.pop(k) for k in ("image_ids", "text_ids", "negative_mask") if k in options}
    exact = leaves(tensors, torch.float64)
    wide = tuple(None if old is None else old.double() for old in log_s)
    value, surrogate, states, kls = definition(*exact, log_s=wide, excluded=excluded, **options)
    grads = torch.autograd.grad(surrogate, exact)

    got = leaves(tensors)
    loss, stats = dro_contrastive(
        *got, RHO, log_s_image=log_s[0], log_s_text=log_s[1], return_stats=True, backend=backend,
        **own, **options,
    )  # fmt: skip
    got_grads = torch.autograd.grad(loss, got)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), value, rtol=2e-6, atol=0)
    for name, g, e, t in zip(NAMES, got_grads, grads, tensors, strict=True):
        assert g.dtype == t.dtype
        # Features of 16 bits round their gradient.
        bound = 2e-6 if g.dtype == torch.float32 else torch.finfo(g.dtype).eps
        assert (g.double() - e).norm() <= bound * e.norm(), name
    for g, e in zip(stats[:2], states, strict=True):
        torch.testing.assert_close(g.double(), e, rtol=2e-6, atol=2e-6, equal_nan=True)
    for g, e in zip(stats[2:4], kls, strict=True):
        live = ~e.isnan()
        assert torch.equal(live, ~g.isnan())
        if live.any():
            compare.assert_entropy_accurate(g[live], e[live], tensors[1].shape[0], "kl")
    return grads


def states(m):
    """Later visits, and first ones among them."""
    log_s = torch.randn(2, m) * 0.5 + math.log(m)
    log_s[0, ::3] = math.nan
    return tuple(log_s)


def features(b, d):
    """Pairs of unit vectors that want a gradient."""
    image = F.normalize(torch.randn(b, d), dim=1)
    text = F.normalize(image + 0.3 * torch.randn(b, d), dim=1)
    return image.requires_grad_(), text.requires_grad_()
