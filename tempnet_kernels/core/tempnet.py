"""The TempNet's arithmetic around its first layer, by the operators of a backend: what follows it,
with its gradient by hand, since it runs inside operators; and the norm of a row of logits."""

from typing import NamedTuple

import torch

from tempnet_kernels.core import register
from tempnet_kernels.core.collectives import all_gather
from tempnet_kernels.core.fields import Moments

NORM_MIN = 1e-12  # of a row of logits, or a prototype, that is divided by its norm
_op = register.operator


class Head(NamedTuple):
    """The parameters after ``W1``; H is the width. All of one dtype."""

    b1: torch.Tensor  # (H,)
    w2: torch.Tensor  # (H, H)
    b2: torch.Tensor  # (H,)
    scaler: torch.Tensor  # (1,)
    last_weight: torch.Tensor  # (1, H)
    last_bias: torch.Tensor  # (1,)


class Dropout(NamedTuple):
    """Which mask is drawn: of ``ids`` ``[N]``, or without them of the rows' numbers from
    ``first_row`` on. Without a key there is none, and the probability is 0."""

    key: torch.Tensor | None = None
    probability: float = 0.0
    ids: torch.Tensor | None = None
    first_row: int = 0


class HeadSums(NamedTuple):
    """What temperature_head_bwd sums over the rows of a block, F numbers one after the other."""

    grad_b2: torch.Tensor  # (K,), of h
    grad_weight: torch.Tensor  # (K,)
    grad_scaler: torch.Tensor  # (1,)
    grad_bias: torch.Tensor  # (1,)
    along: torch.Tensor  # (K,), what the gradient of a prototype has of itself; () without norms

    @classmethod
    def of(cls, sums):
        """Of the sums over all blocks ``[F]``, without norms."""
        k = sums.shape[0] // 2 - 1
        return cls(*sums.split([k, k, 1, 1, 0]))

    @classmethod
    def with_norms(cls, sums):
        k = (sums.shape[0] - 2) // 3
        return cls(*sums.split([k, k, 1, 1, k]))


def row_blocks(n):
    """(number of blocks, rows of a block) of the sums over ``n`` rows: some 256 blocks at most.
    They depend on nothing else, so that every number of threads adds in one order;
    csrc/temperature_head.h has the same."""
    rows = 8 * (n // 2049 + 1)
    return (n + rows - 1) // rows, rows


def predict(backend, pre, p, dropout, bounds, factor=None):
    """(temperatures ``[N]``, the second layer's input ``[N, H]`` and output ``[N, H]``) from ``pre
    = W1 z``, of which row i is multiplied by ``factor[i]``."""
    key, probability, ids, first_row = dropout
    dropped = _op("sigmoid_dropout", backend)(pre, p.b1, factor, key, ids, first_row, probability)
    h = torch.addmm(p.b2, dropped, p.w2.T)
    options = (None, p.scaler, p.last_weight, p.last_bias, False, *bounds)
    return _op("temperature_head", backend)(h, *options), dropped, h


def gradients(backend, grad_tau, dropped, h, p, probability, bounds, factor=None):
    """(gradient of ``pre`` ``[N, H]``, that of h ``[N, H]``, blocks' :class:`HeadSums` ``[P, F]``,
    blocks' sums of the gradient of b1 ``[P, H]``)."""
    options = (None, p.scaler, p.last_weight, p.last_bias, False, *bounds)
    grad_h, sums = _op("temperature_head_bwd", backend)(grad_tau, h, *options)
    grad_pre, grad_b1 = _op("sigmoid_dropout_bwd", backend)(
        grad_h @ p.w2, dropped, factor, probability
    )
    return grad_pre, grad_h, sums, grad_b1


def row_scaling(backend, logits, center, softcap, group):
    """(shift ``[N]``, 1 / norm of z - shift ``[N]``) of logits ``[N, V]``, capped, or of all
    columns of the ranks of ``group``."""
    moments = _op("row_moments", backend)(logits, center, softcap)
    if group is None:
        return moments[Moments.SHIFT], moments[Moments.INVERSE]
    return merged_moments(all_gather(moments[: Moments.INVERSE], group))


def inverse_norm(squares):
    """1 / the norm of rows with these sums of squares: 0 for a row of zeros, so that the rounding
    of what is multiplied by it is not divided by the least norm."""
    return torch.where(squares == 0, 0, squares.sqrt().clamp_min(NORM_MIN).reciprocal())


def merged_moments(parts):
    """(shift, 1 / norm of z - shift) of rows from the :class:`Moments` of several parts of their
    columns, ``[parts, 4, N]``, without INVERSE."""
    shift, squares, total, count = parts.unbind(1)  # (parts, N) each
    top = shift.amax(0)  # keeps NaN
    # A part whose columns are all -inf has no sums to move. Neither d nor a sum is ever positive.
    d = torch.where(count == 0, 0, shift - top)
    # A total that overflowed is not to be multiplied by 0.
    moved = torch.where(d == 0, 0, d * (count * d + 2 * total))
    return top, inverse_norm((squares + moved).sum(0))
