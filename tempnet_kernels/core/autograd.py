"""Calls of autograd functions."""

import torch
from torch.autograd import forward_ad

_unwrap_if_dead = torch._C._functorch.unwrap_if_dead


def apply(function, *args):
    """``function.apply(*args)``; without gradients the forward alone. torch's own binds the
    arguments to the signature of ``forward`` anew in every call, for defaults that there may be,
    which takes longer than a small loss."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    if not torch.is_grad_enabled() and forward_ad._current_level < 0:
        return function.forward(*args)
    args = [_unwrap_if_dead(x) if type(x) is torch.Tensor else x for x in args]
    return super(torch.autograd.Function, function).apply(*args)
