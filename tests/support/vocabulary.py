"""Data of the tests of the token loss whose columns several processes share."""

import torch

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
