"""The softcap c of logits: a loss is taken of z' = c tanh(z / c). 0 stands for none."""

import math

import torch


def check_softcap(function, softcap):
    """As a number, 0 for None."""
    if softcap is None:
        return 0.0
    if not 0 < softcap < math.inf:
        raise ValueError(f"{function}: softcap must be a finite number > 0 or None, got {softcap}")
    return float(softcap)


def capped(z, softcap):
    return softcap * torch.tanh(z / softcap) if softcap else z
