"""The TempNet's arithmetic around its first layer: the norm of a row of logits, and what follows
with its gradient by hand, since it runs inside operators."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from tempnet_kernels.core.fields import accumulation_dtype
from tempnet_kernels.core.softcap import capped

NORM_MIN = 1e-12  # of a row of logits that is divided by its norm


class Head(NamedTuple):
    """The parameters after ``W1``; H is the width. All of one dtype."""

    b1: torch.Tensor  # (H,)
    w2: torch.Tensor  # (H, H)
    b2: torch.Tensor  # (H,)
    scaler: torch.Tensor  # (1,)
    last_weight: torch.Tensor  # (1, H)
    last_bias: torch.Tensor  # (1,)


class Saved(NamedTuple):
    """What the gradient needs of a call of :func:`head`."""

    h1: torch.Tensor  # (N, H)
    dropped: torch.Tensor  # (N, H)
    h: torch.Tensor  # (N, H)
    w: torch.Tensor  # (N, H)
    share: torch.Tensor  # (N,)


def head(pre, p, keep=None):
    """(share of the range [tau_min, tau_max] in [0, 1], :class:`Saved`), from ``pre = W1 x``
    ``[N, H]`` and dropout factors ``keep`` ``[N, H]`` (0 or 1 / (1 - probability))."""
    h1 = torch.sigmoid(pre + p.b1)
    dropped = h1 if keep is None else h1 * keep
    h = F.linear(dropped, p.w2, p.b2)
    w = torch.softmax(h / p.scaler.exp(), -1)
    t = F.linear((w - 1 / h.shape[-1]) * h, p.last_weight, p.last_bias).squeeze(-1)  # (N,)
    share = torch.sigmoid(t)
    return share, Saved(h1, dropped, h, w, share)


def head_gradients(grad_share, saved, p, keep=None):
    """(gradient of ``pre`` ``[N, H]``, :class:`Head` of gradients) for ``grad_share`` ``[N]``."""
    h1, dropped, h, w, share = saved
    grad_t = grad_share * share * (1 - share)  # (N,)
    centred = w - 1 / h.shape[1]
    grad_mixed = grad_t[:, None] * p.last_weight  # (N, H)
    grad_w = grad_mixed * h
    temperature = p.scaler.exp()
    grad_x = w * (grad_w - (grad_w * w).sum(1, keepdim=True)) / temperature  # of h, through w
    grad_h = grad_mixed * centred + grad_x
    grad_dropped = grad_h @ p.w2
    grad_h1 = grad_dropped if keep is None else grad_dropped * keep
    grad_pre = grad_h1 * h1 * (1 - h1)
    return grad_pre, Head(
        b1=grad_pre.sum(0),
        w2=grad_h.T @ dropped,
        b2=grad_h.sum(0),
        scaler=-(grad_x * h).sum().view(1),
        last_weight=(grad_t @ (centred * h))[None],
        last_bias=grad_t.sum().view(1),
    )


def row_moments(logits, center, softcap=0.0):
    """:class:`Moments` of rows of logits ``[N, V]``, in plain PyTorch."""
    acc = accumulation_dtype(logits.dtype)
    z = capped(logits.to(acc), softcap)
    counted = z != -torch.inf
    shift = z.amax(1) if center else z.new_zeros(z.shape[0])
    z = torch.where(counted, z - shift[:, None], 0)
    squares = (z * z).sum(1)
    if not center:
        return torch.stack([shift, squares, shift, shift])
    return torch.stack([shift, squares, z.sum(1), counted.sum(1).to(acc)])


def merged_moments(parts):
    """(shift, sum of (z - shift)^2) of rows from the :class:`Moments` of several parts of their
    columns, ``[parts, 4, N]``."""
    shift, squares, total, count = parts.unbind(1)  # (parts, N) each
    top = shift.amax(0)  # keeps NaN
    # A part whose columns are all -inf has no sums to move. Neither d nor a sum is ever positive.
    d = torch.where(count == 0, 0, shift - top)
    return top, (squares + d * (count * d + 2 * total)).sum(0)
