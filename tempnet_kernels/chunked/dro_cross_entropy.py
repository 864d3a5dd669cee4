"""The token loss where each of several processes has some columns of the logits: what they exchange
about a row, and the row's result from it."""

import math

import torch

from tempnet_kernels.core import register
from tempnet_kernels.core.checks import check_target
from tempnet_kernels.core.collectives import all_gather
from tempnet_kernels.core.fields import TokenPart
from tempnet_kernels.core.softcap import capped

_op = register.operator


def columns_of(v, group):
    """(begin, vocab_size): the first of this rank's ``v`` columns, and the number of all."""
    return (0, v) if group is None else (group.rank() * v, group.size() * v)


def sharded_fwd(backend, logits, target, tau, scale, options, group, want_argmax):
    """(scale * loss, rows, argmax) as dro_cross_entropy_fwd gives them, of logits of which this
    rank has the columns ``columns_of(V, group)``. Everything but the logits is the same on every
    rank, and so is the result, bit by bit. The gradient is then that of dro_cross_entropy_bwd."""
    v = logits.shape[1]
    begin, vocab_size = columns_of(v, group)
    parts, argmax = _op("dro_cross_entropy_stats", backend)(
        logits, target, tau, options.ignore_index, options.softcap, begin, vocab_size,
        options.label_smoothing > 0, want_argmax,
    )  # fmt: skip
    parts, argmax, widths = _exchange(parts, argmax, v, group)
    if target.device.type == "cpu":
        _check_widths(widths.tolist())
        check_target(target, vocab_size, options.ignore_index)
    # To read it would be to wait for a GPU; there the loss becomes NaN instead.
    parts[:, TokenPart.S].masked_fill_((widths != v).any(), math.nan)
    return merged(parts, argmax, target, tau, scale, options, vocab_size)


def merged(parts, argmax, target, tau, scale, options, vocab_size):
    """(scale * loss, rows, argmax) as dro_cross_entropy_fwd gives them, from parts [world, 7, N]
    and argmax [world, N or 0]."""
    loss, grad_tau, m, *state = _finish(
        parts.double(), tau.double(), options, math.log(vocab_size)
    )  # (N,) each, NaN in ignored rows
    live = target != options.ignore_index
    counts = live & (scale != 0)
    scaled_loss = torch.where(counts, scale * loss, 0)
    scaled_grad_tau = torch.where(counts, scale * grad_tau, 0)
    rows = torch.stack([torch.where(live, loss, 0), scaled_grad_tau, m, *state]).to(tau.dtype)
    if argmax.shape[1]:
        zmax = parts[:, TokenPart.ZMAX]  # (world, N)
        first = torch.where(zmax == zmax.amax(0), argmax, vocab_size).amin(0)
        argmax = torch.where(torch.isfinite(state[0]), first, -1)
    else:
        argmax = argmax.new_empty(0)
    return scaled_loss.to(tau.dtype), rows, argmax


def sharded_fwd_(backend, logits, target, tau, scale, options, group, want_argmax):
    """The same as dro_cross_entropy_fwd_ gives it: with the gradient in the storage of the
    logits."""
    loss, rows, argmax = sharded_fwd(
        backend, logits, target, tau, scale, options, group, want_argmax
    )
    stored = (scale != 0).to(scale.dtype) if logits.dtype == torch.float16 else scale
    _op("dro_cross_entropy_bwd_", backend)(
        logits, target, tau, stored, rows, *options[1:], *columns_of(logits.shape[1], group)
    )
    return loss, rows, argmax


def _exchange(parts, argmax, v, group):
    """(parts [world, 7, N], argmax [world, N or 0], v [world]) of every rank, in one collective."""
    # Integers go as the bits of floats: a float does not count beyond 2^24.
    word = torch.int64 if parts.dtype == torch.float64 else torch.int32
    integers = torch.cat([argmax, argmax.new_full((1,), v)]).to(word)
    table = all_gather(torch.cat([parts.flatten(), integers.view(parts.dtype)]), group)
    floats, bits = table.split([parts.numel(), integers.numel()], 1)
    integers = bits.view(word).long()
    return floats.unflatten(1, parts.shape), integers[:, :-1], integers[:, -1]


def _check_widths(widths):
    if min(widths) < max(widths):
        raise ValueError(
            "dro_cross_entropy: logits must have as many columns on every rank of process_group, "
            f"got {widths} by rank"
        )


def _finish(parts, tau, options, log_v):
    """``merge`` and ``finish`` of csrc/online_softmax.h: (loss, d loss / d tau, m, log2 s, entropy,
    log p_y). In float64, since these are a few numbers per row."""
    rho, _, label_smoothing, z_loss, softcap = options
    zmax, m, delta, s, sx, z_y, mean_u = parts.unbind(1)  # (world, N) each
    ln2 = math.log(2)
    # amax keeps NaN. The m of columns that are all -inf is finite, and so is d; s is 0 there.
    m_row = m.amax(0)  # (N,)
    d = m - m_row  # (world, N)
    f = torch.exp2(d)
    s_row = (f * s).sum(0)
    sx_row = (f * (sx + s * d)).sum(0)
    # Of the ranks whose m was rounded to the same number, the one with the largest logit.
    delta = torch.where(m == m_row, delta, -math.inf).amax(0)
    log2_s = torch.log2(s_row)
    centred_lse = ln2 * (log2_s - delta)
    lse = ln2 * (m_row + log2_s)
    entropy = (ln2 * (log2_s - sx_row / s_row)).clamp(0, log_v)  # keeps NaN
    zmax, z_y = (capped(z.amax(0), softcap) for z in (zmax, z_y))
    below = zmax - z_y  # zmax - sum_j q_j z_j
    if label_smoothing > 0:
        mean_below = ln2 * tau * (delta - (mean_u + d).mean(0))
        below = (1 - label_smoothing) * below + label_smoothing * mean_below
    loss = below + tau * (centred_lse + rho - log_v) + z_loss * lse**2
    grad_tau = entropy + rho - log_v - 2 * z_loss * lse * (lse - entropy) / tau
    log_prob = (z_y - zmax) / tau - centred_lse
    return loss, grad_tau, m_row, log2_s, entropy, log_prob
