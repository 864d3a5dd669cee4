"""The tempered softmax in plain PyTorch, whole rows at a time."""

import math

import torch


def tempered_softmax_fwd(logits, tau, log):
    zmax, d, x = _centred(logits, tau)
    e = torch.exp(x)
    s = e.sum(1)
    mean_d = torch.where(e == 0, 0, e * d).sum(1) / s
    output = x - torch.log(s)[:, None] if log else e / s[:, None]
    return _empty(logits).copy_(output), torch.stack([zmax, s, mean_d])


def tempered_softmax_bwd(logits, tau, rows, grad_output, log, want_grad_logits):
    _, s, mean_d = rows[:, :, None]  # (N, 1) each
    _, _, x = _centred(logits, tau)
    e = torch.exp(x)  # (N, V)
    p = e / s
    g = grad_output.to(tau.dtype)
    if log:
        c = g - p * g.sum(1, keepdim=True)
    else:
        # A probability of 0 has no part in anything, not even with a g of inf or NaN. The sum is
        # divided by s, and not of p g: the rounding of the weights e then cancels.
        mean_g = torch.where(e == 0, 0, e * g).sum(1, keepdim=True) / s
        c = torch.where(p == 0, 0, p * (g - mean_g))
    centred = x - mean_d / tau[:, None]  # log p + H
    # 0 * -inf is NaN.
    grad_tau = -torch.where(c == 0, 0, c * centred).sum(1) / tau
    if not want_grad_logits:
        return logits.new_empty((0, logits.shape[1])), grad_tau
    return _empty(logits).copy_(c / tau[:, None]), grad_tau


def _centred(logits, tau):
    """(zmax [N], d = z - zmax [N, V], d / tau [N, V]) in the accumulation dtype; of a bad
    temperature the last is NaN."""
    z = logits.to(tau.dtype)
    zmax = z.amax(1)
    d = (
        z - zmax[:, None]
    )  # centred before the division: exact near the maximum, where the weight is
    return zmax, d, d / torch.where((tau > 0) & (tau < math.inf), tau, math.nan)[:, None]


def _empty(logits):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)
