"""Data, definition and check of the tests of the token loss of a linear layer."""

import copy

import torch
from compare import assert_within_twice_plain, definition

from tempnet_kernels import linear_dro_cross_entropy
from tempnet_kernels.core.dropout import hashed_dropout
from tempnet_kernels.nn import TempNet

RHO = 2.0


def layer(n=19, v=301, d=24, dtype=torch.float32, device=None, bias=True):
    """(hidden, weight, bias, target): logits of a few units; some rows ignored."""
    hidden = torch.randn(n, d, device=device).to(dtype)
    weight = (torch.randn(v, d, device=device) / d**0.5 * 3).to(dtype)
    target = torch.randint(0, v, (n,), device=device)
    target[1::7] = -100
    return hidden, weight, torch.randn(v, device=device).to(dtype) if bias else None, target


def network(v, center=None, device=None, dropout=0.0, dtype=torch.float32, hidden_size=40):
    """A TempNet whose temperatures differ: the initial one's hardly do."""
    net = TempNet(v, 0.4, 1.6, center=center, dropout=dropout, hidden_size=hidden_size)
    with torch.no_grad():
        net.proj[0].weight.mul_(40)
        net.proj[3].weight.mul_(8)
        net.scaler.fill_(0.5)
        net.last.bias.fill_(-2)
    return net.to(device, dtype)


def predicted(net, z):
    """The temperatures of a TempNet as its formula reads, in the dtype of its parameters."""
    z = z.detach().to(torch.promote_types(torch.float32, net.scaler.dtype))
    key = net.dropout_key(z.device)
    if net.center == "max":
        z = z - z.amax(1, keepdim=True)
    z = torch.where(z == -torch.inf, 0, z)
    x = torch.sigmoid(net.proj[0](torch.nn.functional.normalize(z, dim=1)))
    if key is not None:
        rows = torch.arange(z.shape[0], device=z.device)
        x = x * hashed_dropout(key, rows, x.shape[1], net.proj[2].p, x.dtype)
    h = net.proj[3](x)
    w = torch.softmax(h / net.scaler.exp(), 1)
    t = net.last((w - 1 / h.shape[1]) * h)[:, 0]
    return net.tau_min + (net.tau_max - net.tau_min) * torch.sigmoid(t)


def plain(hidden, weight, bias, target, tau, softcap=None, reduction="mean", **options):
    """The formula as a user writes it, in the dtype of its tensors; tau: rows or a TempNet."""
    z = torch.nn.functional.linear(hidden, weight, bias)
    acc = torch.promote_types(z.dtype, torch.float32)
    if softcap:
        z = softcap * torch.tanh(z.to(acc) / softcap)  # one rounding of the logits, not two
    tau = predicted(tau, z) if isinstance(tau, torch.nn.Module) else tau
    z = z.to(acc).clamp_min(-1e30)  # autograd's 0 * -inf would be NaN in d tau
    loss = definition(z, target, tau.to(acc), RHO, **options)
    if reduction == "none":
        return loss
    return loss.sum() / ((target != -100).sum() if reduction == "mean" else 1)


def ours(hidden, weight, bias, target, tau, **options):
    chosen = {"tempnet" if isinstance(tau, torch.nn.Module) else "tau": tau}
    return linear_dro_cross_entropy(hidden, weight, target, bias=bias, rho=RHO, **chosen, **options)


def gradients(function, tensors, target, tau, upstream=None, dtype=None, **options):
    """{name: tensor} of the value and of every gradient."""
    leaves = [
        None if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors
    ]
    if isinstance(tau, torch.nn.Module):
        tau = copy.deepcopy(tau)
        tau = tau.to(dtype) if dtype else tau
        named = dict(tau.named_parameters())
    else:
        tau = tau.detach().to(dtype or tau.dtype).requires_grad_()
        named = {"tau": tau}
    loss = function(*leaves, target, tau, **options)
    loss.backward(torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype))
    named |= dict(zip(("hidden", "weight", "bias"), leaves, strict=True))
    return {"loss": loss.detach()} | {k: x.grad for k, x in named.items() if x is not None}


def check(tensors, target, tau, backend, chunk_rows=None, draws=1, **options):
    """``draws``: of the hidden states, over which a gradient that is one number is judged: in one
    draw the plain formula may err by little."""
    first = ours_and_plain(tensors, target, tau, backend, chunk_rows, **options)
    assert all(exact.abs().max() > 0 for _, exact, _ in first.values())
    several = [first]
    for _ in range(draws - 1):
        again = [torch.randn_like(tensors[0]) * tensors[0].std(), *tensors[1:]]
        several.append(ours_and_plain(again, target, tau, backend, chunk_rows, **options))
    for name, results in first.items():
        if results[0].numel() == 1:
            results = [torch.stack(x) for x in zip(*(x[name] for x in several), strict=True)]
        assert_within_twice_plain(*results, name)


def ours_and_plain(tensors, target, tau, backend, chunk_rows, **options):
    """{name: (got, exact, plain)} of the value and of every gradient."""
    exact = gradients(plain, tensors, target, tau, dtype=torch.float64, **options)
    usual = gradients(plain, tensors, target, tau, **options)
    got = gradients(ours, tensors, target, tau, backend=backend, chunk_rows=chunk_rows, **options)
    assert got.keys() == exact.keys()
    return {name: (got[name], exact[name], usual[name]) for name in got}
