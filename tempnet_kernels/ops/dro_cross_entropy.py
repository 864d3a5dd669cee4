"""Token loss with a temperature per row: schema, autograd, public function.

For a row of logits z (V columns), target y and temperature tau, with x = z / tau and p =
softmax(x):

    loss   = tau * (logsumexp(x) + rho - log V) - z_y
    d loss / d z   = p - onehot(y)
    d loss / d tau = rho - KL(p || uniform)

Qiu et al., "To Cool or not to Cool? Temperature Network Meets Large Foundation Models via DRO",
ICML 2024.
"""

from typing import Literal, overload

import torch
import torch.distributed as dist
from typing_extensions import Unpack

from tempnet_kernels.chunked.dro_cross_entropy import columns_of, sharded_fwd
from tempnet_kernels.core import register
from tempnet_kernels.core.autograd import apply
from tempnet_kernels.core.checks import (
    check_has_float64,
    first_backward,
    once_differentiable,
    radius,
    temperatures,
    unit_columns,
)
from tempnet_kernels.core.collectives import outside_graphs, several
from tempnet_kernels.core.fields import TokenOptions, TokenPart, TokenRow, accumulation_dtype
from tempnet_kernels.core.register import Backend
from tempnet_kernels.core.softcap import check_softcap
from tempnet_kernels.ops.overwrite import (
    overwrite,
    row_gradients,
    scale_saved_gradient,
    storage_to_overwrite,
)
from tempnet_kernels.ops.token_rows import (
    Reduction,
    TokenKeywords,
    TokenStats,
    check_arguments,
    reduced,
    row_scale,
    token_stats,
)


@overload
def dro_cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    tau: float | torch.Tensor = ...,
    rho: float | None = ...,
    *,
    return_stats: Literal[False] = ...,
    **keywords: Unpack[TokenKeywords],
) -> torch.Tensor: ...


@overload
def dro_cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    tau: float | torch.Tensor = ...,
    rho: float | None = ...,
    *,
    return_stats: Literal[True],
    **keywords: Unpack[TokenKeywords],
) -> tuple[torch.Tensor, TokenStats]: ...


@overload
def dro_cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    tau: float | torch.Tensor = ...,
    rho: float | None = ...,
    *,
    return_stats: bool,
    **keywords: Unpack[TokenKeywords],
) -> torch.Tensor | tuple[torch.Tensor, TokenStats]: ...


def dro_cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    tau: float | torch.Tensor = 1.0,
    rho: float | None = None,
    *,
    row_weight: torch.Tensor | None = None,
    normalizer: float | torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: Reduction = "mean",
    return_stats: bool = False,
    overwrite_logits: bool = False,
    process_group: "dist.ProcessGroup | None" = None,
    backend: Backend = "auto",
) -> torch.Tensor | tuple[torch.Tensor, TokenStats]:
    r"""Distributionally robust cross entropy with a temperature per row.

    With ``x = logits / tau`` and ``q = (1 - label_smoothing) * onehot(target) + label_smoothing /
    V``, a row's loss is

        tau * (logsumexp(x) + rho - log V) - sum_j q_j logits_j + z_loss * logsumexp(x)^2

    With ``tau=1`` and ``rho=log V`` this is ``torch.nn.functional.cross_entropy``. The gradient of
    the logits is formed in the forward visit for ``reduction`` "mean" and "sum", and recomputed in
    the backward for "none".

    Args:
        logits: ``[..., V]`` float32, bfloat16, float16 or float64 (float64 on the CPU, or with
            backend "reference"). Any row stride is used in place (a padded vocabulary is the view
            ``logits[..., :V]``); a column stride other than 1 costs a copy.
        target: ``[...]`` int64 or int32 class indices.
        tau: temperature > 0: a number, a 0-d tensor or a tensor of the target's shape. A tensor
            gets a gradient.
        rho: KL radius >= 0 in nats, a number: where a row's KL is below it the temperature falls,
            above it rises. It must be given where ``tau`` wants a gradient; else it is 0 by
            default. At log V, which no KL reaches, and above every temperature falls; choose it
            near the mean ``kl`` of :class:`TokenStats`.
        row_weight: ``[...]`` real weight of each row's loss and gradients (masks, class weights,
            advantages); may want a gradient.
        normalizer: with "mean", what the sum is divided by, a number or a detached 0-d tensor (the
            token count of all accumulated batches); default the sum of the weights of the rows
            that are not ignored. Weights that may be negative need it: their sum can be 0 or
            negative, which is not checked (that would wait for the GPU).
        ignore_index: rows with this target have loss 0, gradient 0, and do not count in the mean.
        label_smoothing: in [0, 1].
        z_loss: factor >= 0 of ``logsumexp(x)^2``.
        softcap: c > 0: the loss is that of ``c * tanh(logits / c)`` (Gemma), and the gradient is
            that of the logits given. So are the statistics; ``argmax`` is the first of the largest
            logits given. A logit of -inf is -c then, and one of +inf c.
        reduction: "mean", "sum" or "none" (a loss of the target's shape).
        return_stats: also return :class:`TokenStats` from the same visit.
        overwrite_logits: put the gradient in the logits' storage, which saves the second tensor
            of their size. A later use of the logits, and a second backward, raise. Without
            gradients (``no_grad``) they are left alone. Under torch.compile pass logits that are
            no view; a later use is not detected there.
        process_group: the processes that share the vocabulary; see below. Default: this one alone.
        backend: "auto", "native" (C++ on the CPU, CUDA C++ on a GPU), "triton" or "reference"
            (PyTorch). "auto" is native; on a GPU without the compiled extension, Triton.

    Returns:
        The loss in float32 (float64 for float64 logits), 0-d or of the target's shape; with
        ``return_stats`` the pair ``(loss, TokenStats)``. The mean over no rows is NaN. A row with
        a NaN or +inf logit, or with ``tau`` in a tensor not in (0, inf), has loss and gradient NaN.

    With ``process_group``, each of its W ranks passes as many consecutive columns, in the order of
    the ranks, and V above is W times their number. Everything else is the same on every rank:
    targets count over all columns, and tau must be equal (of a TempNet: see its ``shard``). Loss,
    statistics and the gradients of tau and row_weight come out equal on every rank, and are the
    whole ones; that of the logits is the one of the rank's columns. The forward exchanges 28 bytes
    per row (32 with ``return_stats``; twice that for float64) in one collective, the backward
    nothing. A rank's logits are read in both, or twice in the forward with ``overwrite_logits``.
    Numbers of columns that differ raise ValueError on every rank; on a GPU the loss is NaN. Every
    rank must make the call, which breaks a compiled graph; an error of one rank alone leaves the
    others waiting. ``torch.func`` transforms are for one process.

    Raises:
        ValueError, TypeError: an argument is off; the message names it, what was expected and what
            came.
        IndexError: a target outside [0, V) other than ``ignore_index`` in CPU tensors. On a GPU
            that row is NaN instead.
        RuntimeError: the backend is not available here.

    Source: arXiv 2404.04575; official code ``GPT-2/megatron/model/tempnet.py``.
    """
    name = "dro_cross_entropy"
    check_arguments(
        name, logits, target, row_weight, normalizer, label_smoothing, z_loss, reduction
    )
    group = None if process_group is None else several(name, process_group)
    v = logits.shape[-1]
    vocab_size = columns_of(v, group)[1]
    acc = accumulation_dtype(logits.dtype)
    chosen = register.pick(name, "dro_cross_entropy_fwd", backend, logits.device)
    check_has_float64(name, "logits", logits, chosen)

    rows_target = target if target.dim() == 1 else target.reshape(-1)  # (N,)
    n = rows_target.shape[0]
    rows_tau = temperatures(name, "tau", tau, tuple(target.shape), logits.device, acc)  # (N,)
    scale, total = row_scale(
        rows_target, row_weight, normalizer, ignore_index, reduction, acc, chosen
    )  # (N,), (1,) or None

    learner = "tau" if torch.is_grad_enabled() and rows_tau.requires_grad else None
    options = TokenOptions(
        radius(name, rho, learner), ignore_index, float(label_smoothing), float(z_loss),
        check_softcap(name, softcap),
    )  # fmt: skip
    track = torch.is_grad_enabled() and logits.requires_grad
    each_row = reduction == "none"
    if overwrite_logits and track:
        base, stride = storage_to_overwrite(name, logits, reduction)
        loss, rows, argmax, _ = overwrite(
            base, rows_target, rows_tau, scale, total, options, v, stride, return_stats, group,
            chosen,
        )  # fmt: skip
    else:
        flat = unit_columns(logits if logits.dim() == 2 else logits.reshape(n, v))
        want_grad = track and not each_row
        args = rows_target, rows_tau, scale, total, options, each_row, want_grad, return_stats
        if group is None:
            loss, rows, argmax, _ = apply(DROCrossEntropy, flat, *args, group, chosen)
        else:
            loss, rows, argmax, _ = _apply_across_ranks(flat, *args, group, chosen)

    if each_row:
        loss = loss.reshape(target.shape)
    if not return_stats:
        return loss
    return loss, token_stats(rows, argmax, rows_tau, vocab_size, target.shape)


_op = register.operator


class DROCrossEntropy(torch.autograd.Function):
    """(logits [N, V], tau [N], scale [N]) -> the sum of scale * loss, or with ``each_row`` those
    [N]; and rows and argmax without a gradient. With ``group``, of several processes, the logits
    are this rank's columns."""

    @staticmethod
    def forward(
        logits, target, tau, scale, total, options, each_row, want_grad, want_argmax, group, backend
    ):
        args = logits, target, tau, scale
        if group is not None:
            loss, rows, argmax = sharded_fwd(backend, *args, options, group, want_argmax)
            grad = logits.new_empty((0, logits.shape[1]))
        else:
            fwd = _op("dro_cross_entropy_fwd", backend)
            grad, loss, rows, argmax = fwd(*args, *options, want_grad, want_argmax)
        return reduced(loss, total, each_row, backend), rows, argmax, grad

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, target, tau, scale, _, ctx.options, _, want_grad, _, ctx.group, ctx.backend = inputs
        ctx.want_grad = want_grad and ctx.group is None
        _, rows, argmax, grad = output
        ctx.mark_non_differentiable(rows, argmax, grad)
        ctx.set_materialize_grads(False)
        # What the backward needs of the logits: their gradient, or the logits themselves to make
        # it (reduction "none", or with a group, whose ranks visit their logits twice in any case).
        wide = grad if ctx.want_grad else logits if ctx.needs_input_grad[0] else None
        ctx.save_for_backward(wide, target, tau, scale, rows)

    @staticmethod
    @once_differentiable("dro_cross_entropy")
    def backward(ctx, grad_loss, *_):
        if ctx.want_grad:
            instead = "pass reduction='none', which makes it anew in each"
            first_backward("dro_cross_entropy", ctx, instead)
        wide, target, tau, scale, rows = ctx.saved_tensors
        if grad_loss is None:
            return (None,) * 11
        grad_logits = None
        if ctx.needs_input_grad[0] and ctx.want_grad:
            grad_logits = wide
            scale_saved_gradient(grad_logits, grad_loss, scale, ctx.backend)
        elif ctx.needs_input_grad[0]:
            grad_logits = _op("dro_cross_entropy_bwd", ctx.backend)(
                wide, target, tau, grad_loss * scale, rows, *ctx.options[1:],
                *columns_of(wide.shape[1], ctx.group),
            )  # fmt: skip
        grad_tau, grad_scale = row_gradients(ctx, grad_loss, rows)
        return (grad_logits, None, grad_tau, grad_scale) + (None,) * 7


_apply_across_ranks = outside_graphs(DROCrossEntropy.apply)


def _fake_fwd(logits, target, tau, scale, *options):
    *numbers, want_grad, want_argmax = options
    n, v = logits.shape
    loss, rows, argmax = _fake_fwd_(logits, target, tau, scale, *numbers, want_argmax)
    return logits.new_empty((n if want_grad else 0, v)), loss, rows, argmax


def _fake_fwd_(logits, target, tau, scale, *options):
    n, want_argmax = logits.shape[0], options[-1]
    acc = accumulation_dtype(logits.dtype)
    return (
        logits.new_empty((n,), dtype=acc),
        logits.new_empty((TokenRow.FIELDS, n), dtype=acc),
        logits.new_empty((n if want_argmax else 0,), dtype=torch.int64),
    )


def _fake_bwd(logits, *args):
    return logits.new_empty(logits.shape)


def _fake_stats(
    logits, target, tau, ignore_index, softcap, begin, vocab_size, want_mean, want_argmax
):
    n = logits.shape[0]
    argmax = logits.new_empty((n if want_argmax else 0,), dtype=torch.int64)
    return tau.new_empty((TokenPart.FIELDS, n)), argmax


# logits [N, V] with column stride 1; target [N] int32 or int64; tau and scale [N] in the
# accumulation dtype, any stride. scale is the row's weight over the normaliser. A row with target
# == ignore_index is not read; one with scale 0 has loss and gradients exactly 0. Returns
# (grad_logits, scale * loss, rows, argmax); grad_logits is scale * (c p - q) but for float16,
# where it is c p - q: p / N underflows and the backward multiplies instead.
register.define(
    "dro_cross_entropy_fwd(Tensor logits, Tensor target, Tensor tau, Tensor scale, "
    f"{register.arguments(TokenOptions)}, bool want_grad, bool want_argmax) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _fake_fwd,
    "dro_cross_entropy",
)
# The same, with grad_logits in the storage of the logits.
register.define(
    "dro_cross_entropy_fwd_(Tensor(a!) logits, Tensor target, Tensor tau, Tensor scale, "
    f"{register.arguments(TokenOptions)}, bool want_argmax) "
    "-> (Tensor, Tensor, Tensor)",
    _fake_fwd_,
    "dro_cross_entropy",
)
# grad_logits = scale * (c p - q) in one visit, from the state in rows; scaled for every dtype. The
# logits are the columns [begin, begin + V) of vocab_size, over which targets are counted and labels
# smoothed: see chunked/dro_cross_entropy.py.
register.define(
    "dro_cross_entropy_bwd(Tensor logits, Tensor target, Tensor tau, Tensor scale, Tensor rows, "
    "int ignore_index, float label_smoothing, float z_loss, float softcap, SymInt begin, "
    "SymInt vocab_size) "
    "-> Tensor",
    _fake_bwd,
    "dro_cross_entropy",
)
# The same, with grad_logits in the storage of the logits.
register.define(
    "dro_cross_entropy_bwd_(Tensor(a!) logits, Tensor target, Tensor tau, Tensor scale, "
    "Tensor rows, int ignore_index, float label_smoothing, float z_loss, float softcap, "
    "SymInt begin, SymInt vocab_size) -> ()",
    lambda *args: None,
    "dro_cross_entropy",
)
# grad[i] *= scale[i]; a row whose scale is 1 is not touched, one whose scale is 0 becomes exactly
# 0.
register.define(
    "scale_rows_(Tensor(a!) grad, Tensor scale) -> ()",
    lambda grad, scale: None,
    "dro_cross_entropy",
)
# (parts, argmax) of the columns [begin, begin + V) of vocab_size: arguments as in
# dro_cross_entropy_fwd, targets and argmax counted over all columns. An ignored row is not read;
# that and a row with a bad temperature or target is NaN in parts. On no device does a bad target
# raise here: another rank could be waiting for this one. MEAN_U holds anything unless want_mean;
# argmax, in a row with NaN.
register.define(
    "dro_cross_entropy_stats(Tensor logits, Tensor target, Tensor tau, int ignore_index, "
    "float softcap, SymInt begin, SymInt vocab_size, bool want_mean, bool want_argmax) "
    "-> (Tensor, Tensor)",
    _fake_stats,
    "dro_cross_entropy",
)
