"""A small linear layer with a TempNet, and a step of its token loss."""

import torch

from tempnet_kernels import linear_dro_cross_entropy
from tempnet_kernels.nn import TempNet


def make(device, n=6, v=40, d=8, dtype=torch.float32):
    hidden = torch.randn(n, d, device=device).to(dtype)
    weight = torch.randn(v, d, device=device).to(dtype)
    target = torch.randint(0, v, (n,), device=device)
    target[1] = -100
    return hidden, weight, target, TempNet(v, hidden_size=16, dropout=0.0).to(device)


def gradients(function, *tensors, net=None):
    """The loss and its gradients in the tensors and in the network."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    loss = function(*leaves)
    parameters = [] if net is None else list(net.parameters())
    return loss.detach(), *torch.autograd.grad(loss.sum(), [*leaves, *parameters])


def step(target, net, backend, **options):
    """A function of hidden and weight."""
    return lambda h, w: linear_dro_cross_entropy(
        h, w, target, tempnet=net, rho=0.5, backend=backend, chunk_rows=4, **options
    )


def assert_same(results, expected, **tolerance):
    for got, other in zip(results, expected, strict=True):
        torch.testing.assert_close(got, other, **tolerance)
