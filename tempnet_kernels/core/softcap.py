"""The softcap c of logits: a loss is taken of z' = c tanh(z / c). 0 stands for none."""

import numbers

import torch


def check_softcap(function, softcap):
    """As a number, 0 for None."""
    if softcap is None:
        return 0.0
    if not isinstance(softcap, numbers.Real):
        raise TypeError(
            f"{function}: softcap must be a number or None, got {type(softcap).__name__}"
        )
    limits = torch.finfo(torch.float32)  # in which the kernels divide by it
    if not limits.tiny <= softcap <= limits.max:
        raise ValueError(
            f"{function}: softcap must be a number > 0 that float32 holds, or None, got {softcap}"
        )
    return float(softcap)


def capped(z, softcap):
    return softcap * torch.tanh(z / softcap) if softcap else z
