"""The token loss that puts the logits' gradient in their storage."""

import torch

from tempnet_kernels.chunked.dro_cross_entropy import sharded_fwd_
from tempnet_kernels.core import register
from tempnet_kernels.core.autograd import apply
from tempnet_kernels.core.checks import first_backward, once_differentiable
from tempnet_kernels.core.collectives import outside_graphs
from tempnet_kernels.core.fields import TokenRow
from tempnet_kernels.ops.token_rows import reduced

_op = register.operator


def storage_to_overwrite(name, logits, reduction):
    """(tensor that is no view, row stride): rows of that stride in it begin with the rows of
    ``logits``."""
    if reduction == "none":
        raise ValueError(f"{name}: overwrite_logits needs reduction 'mean' or 'sum', got 'none'")
    base = logits if torch.compiler.is_compiling() or logits._base is None else logits._base
    if base.is_leaf and base.requires_grad:
        raise ValueError(
            f"{name}: overwrite_logits needs logits that an operation made (the LM head's output), "
            f"got {'a leaf' if base is logits else 'a view of a leaf'} that requires a gradient, "
            "whose values autograd keeps; pass overwrite_logits=False"
        )
    if torch.compiler.is_compiling():
        # Traced, a view has no base to ask for; the compiler replays the write on it.
        stride, whole = logits.shape[-1], logits.is_contiguous()
    else:
        stride = logits.stride(-2) if logits.dim() > 1 else base.numel()
        whole = (
            base.is_contiguous()
            and (logits.stride(-1) == 1 or logits.shape[-1] == 1)
            and logits.storage_offset() == base.storage_offset()
            and stride >= logits.shape[-1]
            and base.numel() == logits[..., 0].numel() * stride
            and all(
                logits.stride(i) == logits.stride(i + 1) * logits.shape[i + 1]
                for i in range(logits.dim() - 2)
            )
        )
    if not whole:
        raise ValueError(
            f"{name}: overwrite_logits needs logits with column stride 1 whose rows fill their "
            "storage (the LM head's output, a reshape of it, or [..., :V] of it), got shape "
            f"{tuple(logits.shape)} with strides {tuple(logits.stride())} in a tensor of shape "
            f"{tuple(base.shape)}"
        )
    return base, stride


class DROCrossEntropyOverwrite(torch.autograd.Function):
    """As DROCrossEntropy, with the gradient in the storage of ``base``, whose rows of ``stride``
    begin with the V logits.

    ``base`` must not be a view: autograd tracks a write to a view only for functions with one
    output.
    """

    @staticmethod
    def forward(base, target, tau, scale, total, options, v, stride, want_argmax, group, backend):
        rows_of_base = base.view(-1, stride)
        args = rows_of_base[:, :v], target, tau, scale
        if group is None:
            loss, rows, argmax = _op("dro_cross_entropy_fwd_", backend)(
                *args, *options, want_argmax
            )
        else:
            loss, rows, argmax = sharded_fwd_(backend, *args, options, group, want_argmax)
        if v < stride:
            rows_of_base[:, v:].zero_()  # the padding has no gradient
        return reduced(loss, total, False, backend), rows, argmax, base

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, _, _, scale, _, _, ctx.v, ctx.stride, _, _, ctx.backend = inputs
        _, rows, argmax, base = output
        ctx.mark_dirty(base)
        ctx.mark_non_differentiable(rows, argmax)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(base, scale, rows)

    @staticmethod
    @once_differentiable("dro_cross_entropy")
    def backward(ctx, grad_loss, _rows, _argmax, grad_base):
        # The tracer of torch.compile feeds every output a gradient, used or not.
        if grad_base is not None and not torch.compiler.is_compiling():
            raise RuntimeError(
                "dro_cross_entropy: the logits were used after overwrite_logits=True put their "
                "gradient in them; use them before the loss, or pass overwrite_logits=False"
            )
        instead = "pass overwrite_logits=False and reduction='none', which makes it anew in each"
        first_backward("dro_cross_entropy", ctx, instead)
        base, scale, rows = ctx.saved_tensors
        if grad_loss is None:
            return (None,) * 11
        logits = base.view(-1, ctx.stride)[:, : ctx.v]
        scale_saved_gradient(logits, grad_loss, scale, ctx.backend)
        grad_tau, grad_scale = row_gradients(ctx, grad_loss, rows)
        return (base, None, grad_tau, grad_scale) + (None,) * 7


_apply_across_ranks = outside_graphs(DROCrossEntropyOverwrite.apply)


def overwrite(*args):
    """:class:`DROCrossEntropyOverwrite` of its arguments, of which the last but one is the
    group."""
    if args[-2] is None:
        return apply(DROCrossEntropyOverwrite, *args)
    return _apply_across_ranks(*args)


def scale_saved_gradient(grad, grad_loss, scale, backend):
    """grad_loss is 0-d."""
    n = scale.shape[0]
    by = grad_loss * scale if grad.dtype == torch.float16 else grad_loss.expand(n)
    _op("scale_rows_", backend)(grad, by)


def row_gradients(ctx, grad_loss, rows):
    grad_tau = grad_loss * rows[TokenRow.GRAD_TAU] if ctx.needs_input_grad[2] else None
    grad_scale = grad_loss * rows[TokenRow.LOSS] if ctx.needs_input_grad[3] else None
    return grad_tau, grad_scale
