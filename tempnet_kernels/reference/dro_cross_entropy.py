"""The token loss in plain PyTorch, whole rows at a time."""

import math

import torch

from tempnet_kernels.core.checks import check_target
from tempnet_kernels.core.fields import TokenRow
from tempnet_kernels.core.softcap import capped

LN2 = math.log(2)
EMPTY = -1e30  # m of columns without a finite logit; finite, since -inf - -inf is NaN


def dro_cross_entropy_fwd(logits, target, tau, scale, *options):
    *numbers, want_grad, want_argmax = options
    loss, rows, argmax, grad = _forward(logits, target, tau, scale, *numbers, want_grad)
    n, v = logits.shape
    grad_logits = logits.new_empty((n if want_grad else 0, v))
    if want_grad:
        grad_logits.copy_(grad)
    return grad_logits, loss, rows, argmax if want_argmax else argmax.new_empty(0)


def dro_cross_entropy_fwd_(logits, target, tau, scale, *options):
    *numbers, want_argmax = options
    loss, rows, argmax, grad = _forward(logits, target, tau, scale, *numbers, True)
    logits.copy_(grad)
    return loss, rows, argmax if want_argmax else argmax.new_empty(0)


def dro_cross_entropy_stats(
    logits, target, tau, ignore_index, softcap, begin, vocab_size, want_mean, want_argmax
):
    given, y, held, live = _prepare(logits, target, tau, ignore_index, begin, vocab_size)
    z = capped(given, softcap)
    zmax = z.amax(1)  # (N,)
    a = 1 / (LN2 * tau)
    m = (zmax * a).clamp(min=EMPTY)
    u = _exponent(z, zmax, a, m)  # (N, V)
    e = torch.exp2(u)
    sx = torch.where(e == 0, 0, e * u).sum(1)
    z_y = torch.where(held, given.gather(1, y[:, None])[:, 0], -math.inf)
    mean_u = u.mean(1) if want_mean else torch.zeros_like(m)
    delta = _rounding(zmax, a, m)
    parts = torch.stack([given.amax(1), m, delta, e.sum(1), sx, z_y, mean_u])
    parts = torch.where(live, parts, math.nan)
    return parts, given.argmax(1) + begin if want_argmax else y.new_empty(0)


def dro_cross_entropy_bwd(logits, *args):
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format).copy_(logits)
    dro_cross_entropy_bwd_(grad, *args)
    return grad


def dro_cross_entropy_bwd_(
    logits, target, tau, scale, rows, ignore_index, label_smoothing, z_loss, softcap, begin,
    vocab_size,
):  # fmt: skip
    check_target(target, vocab_size, ignore_index)
    given, y, held, live = _prepare(logits, target, tau, ignore_index, begin, vocab_size)
    z = capped(given, softcap)
    smooth = label_smoothing, vocab_size
    grad = _gradient(
        z, y, held, live, tau, scale, rows[TokenRow.M], rows[TokenRow.LOG2_S], *smooth, z_loss,
        softcap,
    )  # fmt: skip
    logits.copy_(grad)


def scale_rows_(grad, scale):
    grad.copy_(torch.where(scale[:, None] == 0, 0, grad.to(scale.dtype) * scale[:, None]))


def _prepare(logits, target, tau, ignore_index, begin, vocab_size):
    """(logits in the accumulation dtype, NaN in bad rows; a column to gather from; whether it is
    the target's; rows not ignored)."""
    v = logits.shape[1]
    live = target != ignore_index
    bad = (live & ((target < 0) | (target >= vocab_size))) | ~((tau > 0) & (tau < math.inf))
    z = torch.where(bad[:, None], math.nan, logits.to(tau.dtype))  # (N, V)
    y = target.long() - begin
    return z, y.clamp(0, v - 1), (y >= 0) & (y < v), live


def _rounding(zmax, a, m):
    """zmax a - m with one rounding: what the rounding of m left out."""
    return (zmax.double() * a.double() - m.double()).to(m.dtype)


def _exponent(z, zmax, a, m):
    """u = z a - m. Centred on ``zmax`` before the product: exact near it, where the weight is."""
    top = torch.where(zmax == -math.inf, 0, zmax)  # -inf - -inf is NaN
    return (z - top[:, None]) * a[:, None] + _rounding(top, a, m)[:, None]


def _forward(
    logits, target, tau, scale, rho, ignore_index, label_smoothing, z_loss, softcap, want_grad
):
    v = logits.shape[1]
    check_target(target, v, ignore_index)
    given, y, held, live = _prepare(logits, target, tau, ignore_index, 0, v)
    z = capped(given, softcap)
    log_v = math.log(v)
    zmax = z.amax(1)  # (N,)
    a = 1 / (LN2 * tau)  # (N,)
    m = zmax * a
    # Centred before the product: exact near the maximum, where the weight is.
    u = (z - zmax[:, None]) * a[:, None]  # (N, V)
    e = torch.exp2(u)
    s = e.sum(1)
    log2_s = torch.log2(s)
    sx = torch.where(e == 0, 0, e * u).sum(1)
    entropy = (LN2 * (log2_s - sx / s)).clamp(0, log_v)
    lse = LN2 * (m + log2_s)

    z_y = z.gather(1, y[:, None])[:, 0]
    below = (1 - label_smoothing) * (zmax - z_y)  # zmax - sum_j q_j z_j
    if label_smoothing > 0:
        below = below + label_smoothing * (zmax[:, None] - z).mean(1)
    loss = below + tau * (LN2 * log2_s + rho - log_v) + z_loss * lse**2
    grad_tau = entropy + rho - log_v - 2 * z_loss * lse * (lse - entropy) / tau
    log_prob = (z_y - zmax) / tau - LN2 * log2_s
    log2_s = log2_s + _rounding(zmax, a, m)  # relative to the rounded m

    weighted = torch.where(scale == 0, 0, scale * loss)
    grad_tau = torch.where(scale == 0, 0, scale * grad_tau)
    nan = torch.full_like(loss, math.nan)
    grad = None
    if want_grad:
        stored = (scale != 0).to(tau.dtype) if logits.dtype == torch.float16 else scale
        grad = _gradient(
            z, y, held, live, tau, stored, m, log2_s, label_smoothing, v, z_loss, softcap
        )
    rows = torch.stack(
        [
            torch.where(live, loss, 0),
            torch.where(live, grad_tau, 0),
            torch.where(live, m, nan),
            torch.where(live, log2_s, nan),
            torch.where(live, entropy, nan),
            torch.where(live, log_prob, nan),
        ]
    )
    argmax = torch.where(live & torch.isfinite(log2_s), given.argmax(1), -1)
    return torch.where(live, weighted, 0), rows, argmax, grad


def _gradient(
    z, y, held, live, tau, scale, m, log2_s, label_smoothing, vocab_size, z_loss, softcap
):
    """scale * (c p - q), times 1 - (z / softcap)^2 of capped logits z; and exactly 0 for ignored
    rows and where the scale is 0."""
    a = 1 / (LN2 * tau)
    c = 1 + 2 * z_loss * LN2 * (m + log2_s) / tau  # (N,)
    p = torch.exp2(_exponent(z, z.amax(1), a, m) - log2_s[:, None])  # (N, V)
    grad = c[:, None] * p - label_smoothing / vocab_size
    own = held.to(grad.dtype) * (label_smoothing - 1)  # (N,)
    grad = grad.scatter_add(1, y[:, None], own[:, None])
    if softcap:
        grad = grad * (1 - (z / softcap) ** 2)
    return torch.where((live & (scale != 0))[:, None], grad * scale[:, None], 0)
