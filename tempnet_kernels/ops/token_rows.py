"""What the token losses share: their arguments, the weight of a row, the statistics."""

import math
from typing import Literal, NamedTuple, TypedDict

import torch
import torch.distributed as dist

from tempnet_kernels.core.checks import check_like, check_rows
from tempnet_kernels.core.fields import TokenRow
from tempnet_kernels.core.register import Backend

REDUCTIONS = ("mean", "sum", "none")
Reduction = Literal["mean", "sum", "none"]


class RowKeywords(TypedDict, total=False):
    """The keywords of both token losses that do not change what they return."""

    row_weight: torch.Tensor | None
    normalizer: float | torch.Tensor | None
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float | None
    reduction: Reduction
    process_group: "dist.ProcessGroup | None"
    backend: Backend


class TokenKeywords(RowKeywords, total=False):
    """Those of :func:`tempnet_kernels.dro_cross_entropy`."""

    overwrite_logits: bool


class LinearKeywords(RowKeywords, total=False):
    """Those of :func:`tempnet_kernels.linear_dro_cross_entropy`."""

    tempnet: torch.nn.Module | None
    tau: float | torch.Tensor
    rho: float | None
    bias: torch.Tensor | None
    chunk_rows: int | None
    drop_ignored: bool | None


class TokenStats(NamedTuple):
    """Detached statistics per row, each of the target's shape.

    Ignored rows hold NaN (argmax -1), and so does a row without a finite softmax.
    """

    lse: torch.Tensor  # logsumexp(z / tau), in nats
    entropy: torch.Tensor  # of p = softmax(z / tau), in nats, in [0, log V]
    kl: torch.Tensor  # KL(p || uniform) = log V - entropy, in nats
    log_prob: torch.Tensor  # log p of the target
    argmax: torch.Tensor  # int64, the first column that holds the largest logit
    tau: torch.Tensor  # the temperature


def check_arguments(
    name, logits, target, row_weight, normalizer, label_smoothing, z_loss, reduction,
    letters=("logits", "V"),
):  # fmt: skip
    """``letters``: the name of what has the rows, and of its width."""
    wide, width = letters
    check_rows(name, wide, logits, width)
    if not isinstance(target, torch.Tensor):
        raise TypeError(f"{name}: target must be a tensor, got {type(target).__name__}")
    if target.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: target must be int64 or int32, got {target.dtype}")
    check_like(name, "target", target, tuple(logits.shape[:-1]), logits.device)
    if row_weight is not None:
        if not isinstance(row_weight, torch.Tensor):
            raise TypeError(f"{name}: row_weight must be a tensor, got {type(row_weight).__name__}")
        if row_weight.dtype.is_complex:
            raise TypeError(f"{name}: row_weight must be real, got {row_weight.dtype}")
        check_like(name, "row_weight", row_weight, tuple(target.shape), logits.device)
    if reduction not in REDUCTIONS:
        raise ValueError(f"{name}: reduction must be one of {REDUCTIONS}, got {reduction!r}")
    if normalizer is not None:
        if reduction != "mean":
            raise ValueError(
                f"{name}: normalizer needs reduction='mean', got reduction={reduction!r}"
            )
        if isinstance(normalizer, torch.Tensor):
            check_like(name, "normalizer", normalizer, (), logits.device)
            if normalizer.requires_grad:
                raise ValueError(f"{name}: normalizer must be detached, got one with a gradient")
        elif not 0 <= normalizer < math.inf:
            raise ValueError(f"{name}: normalizer must be finite and >= 0, got {normalizer}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{name}: label_smoothing must be in [0, 1], got {label_smoothing}")
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"{name}: z_loss must be finite and >= 0, got {z_loss}")


def row_scale(target, row_weight, normalizer, ignore_index, reduction, acc):
    """(scale [N], the sum it was divided by or None): a scale holds the row's weight and the
    normaliser."""
    n = target.shape[0]
    weight = None
    if row_weight is not None:
        # The weight of an ignored row may be anything, NaN too.
        weight = torch.where(target != ignore_index, row_weight.to(acc).reshape(-1), 0)
    if reduction != "mean":
        return (target.new_ones((), dtype=acc).expand(n) if weight is None else weight), None
    if normalizer is not None:
        # Filled on the device: copying a number there would wait for it.
        total = (
            normalizer.to(acc)
            if isinstance(normalizer, torch.Tensor)
            else torch.full((), normalizer, dtype=acc, device=target.device)
        )
    elif weight is None:
        total = (target != ignore_index).sum(dtype=acc)
        # Where it is 0 there is no row to divide. On a GPU every small kernel saved counts.
        return total.clamp(min=1).reciprocal().expand(n), total
    else:
        total = weight.sum()
    empty = total == 0
    # Divide by 1 where the sum is 0: a 0/0 in the branch not taken would reach the weights'
    # gradient as NaN.
    inverse = torch.where(empty, 0, 1 / torch.where(empty, 1, total))
    return (inverse.expand(n) if weight is None else weight * inverse), total


def token_stats(rows, argmax, tau, vocab_size, shape):
    # Not M, which a maximum that drops NaN leaves finite, and which is finite of a row of -inf.
    none = rows[TokenRow.ENTROPY].isnan()
    lse = torch.where(none, torch.nan, (rows[TokenRow.M] + rows[TokenRow.LOG2_S]) * math.log(2))
    kl = math.log(vocab_size) - rows[TokenRow.ENTROPY]
    tau = torch.where(none, torch.nan, tau.detach())
    per_row = (lse, rows[TokenRow.ENTROPY], kl, rows[TokenRow.LOG_PROB], argmax, tau)
    return TokenStats(*(value.reshape(shape) for value in per_row))
