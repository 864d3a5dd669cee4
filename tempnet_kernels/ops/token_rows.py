"""What the token losses share: their arguments, the weight of a row, the statistics."""

import math
from typing import Literal, NamedTuple, TypedDict

import torch
import torch.distributed as dist

from tempnet_kernels.core import register
from tempnet_kernels.core.autograd import apply
from tempnet_kernels.core.checks import check_like, check_rows, once_differentiable
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


_op = register.operator


def row_scale(target, row_weight, normalizer, ignore_index, reduction, acc, backend):
    """(scale [N], the sum it was divided by, [1], or None): a scale holds the row's weight and the
    normaliser."""
    mean = reduction == "mean"
    if row_weight is None and not mean:
        return torch.ones((), dtype=acc, device=target.device).expand(target.shape), None
    weight = None if row_weight is None else row_weight.to(acc).reshape(-1)
    divisor = -1.0
    if isinstance(normalizer, torch.Tensor):
        normalizer = normalizer.to(acc).reshape(1)
    elif normalizer is not None and torch.compiler.is_compiling():
        # As an operator's argument every number of tokens would be another graph.
        normalizer = torch.full((1,), normalizer, dtype=acc, device=target.device)
    elif normalizer is not None:
        normalizer, divisor = None, float(normalizer)
    args = target, normalizer, divisor, ignore_index, mean, acc == torch.float64, backend
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        scale, total = apply(_RowScale, weight, *args)
    else:
        scale, total = _scale(weight, *args)
    return scale, (total if mean else None)


def _scale(weight, target, normalizer, divisor, ignore_index, mean, wide, backend):
    fwd = _op("row_scale", backend)
    return fwd(target, weight, normalizer, divisor, ignore_index, mean, wide)


class _RowScale(torch.autograd.Function):
    """weight [N] -> the scale [N]; and without a gradient what it was divided by."""

    @staticmethod
    def forward(weight, *args):
        return _scale(weight, *args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, target, normalizer, divisor, ctx.ignore_index, ctx.mean, _, _ = inputs
        ctx.is_sum = normalizer is None and divisor < 0  # that the weights are divided by
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(target, *output)

    @staticmethod
    @once_differentiable("row_weight")
    def backward(ctx, grad_scale, _):
        target, scale, total = ctx.saved_tensors
        if grad_scale is None:
            return (None,) * 8
        grad = grad_scale
        if ctx.mean:
            if ctx.is_sum:
                # A row of weight 0 may have a loss of NaN.
                grad = grad - torch.where(scale == 0, 0, grad * scale).sum()
            grad = torch.where(total == 0, 0, grad / total)
        grad = torch.where(target != ctx.ignore_index, grad, 0)
        return (grad,) + (None,) * 7


def reduced(loss, total, each_row, backend):
    """The rows' losses ``[N]`` times their scale as what a loss function returns: themselves or
    their sum, NaN where ``total`` is 0, the mean over nothing."""
    if each_row:
        return loss
    if total is None:
        return loss.sum()
    return _op("sum_rows", backend)(loss, total)


def token_stats(rows, argmax, tau, vocab_size, shape):
    # Not M, which a maximum that drops NaN leaves finite, and which is finite of a row of -inf.
    none = rows[TokenRow.ENTROPY].isnan()
    lse = torch.where(none, torch.nan, (rows[TokenRow.M] + rows[TokenRow.LOG2_S]) * math.log(2))
    kl = math.log(vocab_size) - rows[TokenRow.ENTROPY]
    tau = torch.where(none, torch.nan, tau.detach())
    per_row = (lse, rows[TokenRow.ENTROPY], kl, rows[TokenRow.LOG_PROB], argmax, tau)
    return TokenStats(*(value.reshape(shape) for value in per_row))


def _fake_row_scale(target, weight, normalizer, divisor, ignore_index, mean, wide):
    acc = torch.float64 if wide else torch.float32
    strides = (0 if weight is None else 1,)
    scale = target.new_empty_strided(target.shape, strides, dtype=acc)
    return scale, target.new_empty(1, dtype=acc)


# What every row's loss and gradients are multiplied with. target [N] int32 or int64; weight [N] and
# normalizer [1] in the accumulation dtype, float64 where wide. With mean the weights (1 without) of
# the rows that are not ignored are divided by the normalizer, the divisor (negative for none) or
# their sum, and are 0 where that is 0. Returns the scales [N], of ignored rows 0 with weights and
# without them all the same number, of stride 0; and what they were divided by, [1].
register.define(
    "row_scale(Tensor target, Tensor? weight, Tensor? normalizer, float divisor, "
    "int ignore_index, bool mean, bool wide) -> (Tensor, Tensor)",
    _fake_row_scale,
    "token_rows",
)
# The sum (0-d) of rows [N]; NaN where total [1] is 0.
register.define(
    "sum_rows(Tensor rows, Tensor? total) -> Tensor",
    lambda rows, total: rows.new_empty(()),
    "token_rows",
)
