"""What follows the TempNet's first layer, and its gradient by hand: it runs inside operators."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

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


def merged_moments(parts):
    """(shift, sum of (z - shift)^2) of rows from those of several parts of their columns,
    ``[parts, 4, N]`` as row_moments gives them."""
    shift, squares, total, count = parts.unbind(1)  # (parts, N) each
    top = shift.amax(0)  # keeps NaN
    # A part whose columns are all -inf has no sums to move. Neither d nor a sum is ever positive.
    d = torch.where(count == 0, 0, shift - top)
    return top, (squares + d * (count * d + 2 * total)).sum(0)


def hashed_dropout(key, ids, width, probability, dtype):
    """Dropout factors, 0 or 1 / (1 - probability), ``[n, width]``: a function of ``key`` (0-d
    int64), of each row's id ``[n]`` and of the column alone."""
    rows = _mix(_mix(key) ^ ids)  # (n,)
    columns = _mix(torch.arange(width, device=ids.device))  # (width,)
    bits = rows.int()[:, None] + columns.int()  # (n, width), of the last round's 32 bits
    bits ^= _shift_right(bits, 16)
    bits *= -2048144789  # 0x85ebca6b
    bits ^= _shift_right(bits, 13)
    bits *= -1028477387  # 0xc2b2ae35
    bits ^= _shift_right(bits, 16)
    kept = bits >= int(probability * 2**32) - 2**31
    return kept.to(dtype).div_(1 - probability)


def _shift_right(x, count):
    """A logical shift of int32."""
    return (x >> count) & ((1 << (32 - count)) - 1)


def _mix(x):
    """A bijection of int64 whose output bits each depend on all input bits (the finaliser of
    splitmix64); products wrap."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * -4658895280553007687  # 0xbf58476d1ce4e5b9
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * -7723592293110705685  # 0x94d049bb133111eb
    return x ^ ((x >> 31) & ((1 << 33) - 1))
