"""Softmax and log-softmax with a temperature per row: schema, autograd, public functions.

For a row of logits z (V columns) and temperature tau, with p = softmax(z / tau), entropy H of p and
upstream gradient g. With q_j = p_j g_j for the softmax and q_j = g_j for the log-softmax:

    c_j = q_j - p_j sum_k q_k
    d / d z_j = c_j / tau
    d / d tau = -(1 / tau) sum_j c_j (log p_j + H)

The backward reads the logits again instead of a saved p: p in bfloat16 is off by 2^-9 and sums to 1
only to about 1e-3, which would be the error of H and of tau's gradient. Logits are no larger, and
with three numbers that the forward knows of a row p comes back as exact as it was, without another
maximum or sum.
"""

import torch

from tempnet_kernels.core import register
from tempnet_kernels.core.autograd import apply
from tempnet_kernels.core.checks import (
    check_has_float64,
    check_rows,
    once_differentiable,
    temperatures,
    unit_columns,
)
from tempnet_kernels.core.fields import accumulation_dtype
from tempnet_kernels.core.register import Backend


def tempered_softmax(
    logits: torch.Tensor, tau: float | torch.Tensor, *, backend: Backend = "auto"
) -> torch.Tensor:
    r"""Softmax over the last axis with a temperature per row, ``softmax(logits / tau)``.

    Computed in float32 (float64 for float64 logits), centred before every rounding: a large offset
    of the logits costs no digits, at a small temperature neither. The logits are kept for the
    backward, which gives both gradients in one visit.

    Args:
        logits: ``[..., V]`` float32, bfloat16, float16 or float64 (float64 on the CPU, or with
            backend "reference"). Any row stride is used in place; a column stride other than 1
            costs a copy.
        tau: temperature > 0: a number, a 0-d tensor or a tensor of shape ``[...]``. A tensor gets
            a gradient.
        backend: "auto", "native" (C++ on the CPU, CUDA C++ on a GPU), "triton" or "reference"
            (PyTorch). "auto" is native; on a GPU without the compiled extension, Triton.

    Returns:
        ``[..., V]`` in the logits' dtype. A logit of -inf has probability and gradient exactly 0,
        whatever its upstream gradient. A row of only -inf, one with a NaN or +inf logit, and one
        with ``tau`` in a tensor not in (0, inf) are NaN. A row whose largest logit is beyond
        ``1e9 * tau`` in magnitude may be NaN (one that is masked whole by a finite number).

    Raises:
        ValueError, TypeError: an argument is off; the message names it, what was expected and what
            came.
        RuntimeError: the backend is not available here; a second derivative.

    Source: arXiv 2404.04575, the softmax that TempNet's temperature is for.
    """
    return _softmax("tempered_softmax", logits, tau, False, backend)


def tempered_log_softmax(
    logits: torch.Tensor, tau: float | torch.Tensor, *, backend: Backend = "auto"
) -> torch.Tensor:
    r"""Log-softmax over the last axis with a temperature per row, ``log_softmax(logits / tau)``.

    Args:
        logits: ``[..., V]``, as in :func:`tempered_softmax`.
        tau: temperature > 0: a number, a 0-d tensor or a tensor of shape ``[...]``.
        backend: as in :func:`tempered_softmax`.

    Returns:
        ``[..., V]`` in the logits' dtype, in nats. A logit of -inf gives -inf; it adds nothing to
        tau's gradient where its upstream gradient is 0. Odd rows are NaN, as in
        :func:`tempered_softmax`.

    Raises:
        ValueError, TypeError, RuntimeError: as in :func:`tempered_softmax`.

    Source: arXiv 2404.04575.
    """
    return _softmax("tempered_log_softmax", logits, tau, True, backend)


def _softmax(name, logits, tau, log, backend):
    check_rows(name, "logits", logits)
    chosen = register.pick(name, "tempered_softmax_fwd", backend, logits.device)
    check_has_float64(name, "logits", logits, chosen)
    shape = tuple(logits.shape[:-1])
    acc = accumulation_dtype(logits.dtype)
    rows_tau = temperatures(name, "tau", tau, shape, logits.device, acc)  # (N,)
    flat = logits
    if logits.dim() != 2:
        flat = logits.reshape(rows_tau.shape[0], logits.shape[-1])  # (N, V)
    output, _ = apply(_TemperedSoftmax, unit_columns(flat), rows_tau, log, chosen)
    return output if logits.dim() == 2 else output.reshape(logits.shape)


_op = register.operator


class _TemperedSoftmax(torch.autograd.Function):
    """(logits [N, V], tau [N]) -> output [N, V], and rows without a gradient."""

    @staticmethod
    def forward(logits, tau, log, backend):
        return _op("tempered_softmax_fwd", backend)(logits, tau, log)

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, tau, ctx.log, ctx.backend = inputs
        _, rows = output
        ctx.mark_non_differentiable(rows)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, tau, rows)

    @staticmethod
    @once_differentiable("tempered_softmax")
    def backward(ctx, grad_output, _):
        if grad_output is None:
            return (None,) * 4
        logits, tau, rows = ctx.saved_tensors
        want_grad_logits, want_grad_tau = ctx.needs_input_grad[:2]
        bwd = _op("tempered_softmax_bwd", ctx.backend)
        grad_logits, grad_tau = bwd(
            logits, tau, rows, unit_columns(grad_output), ctx.log, want_grad_logits
        )
        return (
            grad_logits if want_grad_logits else None,
            grad_tau if want_grad_tau else None,
            None,
            None,
        )


# Fields of what the backward needs of a row, [3, N] in the accumulation dtype: the largest logit
# zmax, the sum of the weights exp((z - zmax) / tau), and the weighted mean of z - zmax. With that
# mean the exponents are centred, and nothing of tau's gradient cancels.
STATE = 3


def _fake_fwd(logits, tau, log):
    n = logits.shape[0]
    return logits.new_empty(logits.shape), tau.new_empty((STATE, n))


def _fake_bwd(logits, tau, rows, grad_output, log, want_grad_logits):
    n, v = logits.shape
    return logits.new_empty((n if want_grad_logits else 0, v)), tau.new_empty((n,))


# logits [N, V] with column stride 1; tau [N] in the accumulation dtype, any stride. Returns (output
# [N, V] in the logits' dtype, rows).
register.define(
    "tempered_softmax_fwd(Tensor logits, Tensor tau, bool log) -> (Tensor, Tensor)",
    _fake_fwd,
    "tempered_softmax",
)
# grad_output as the logits. Returns (grad_logits, grad_tau); without want_grad_logits, the first
# has no rows, and the logits are read once and nothing of their size is written.
register.define(
    "tempered_softmax_bwd(Tensor logits, Tensor tau, Tensor rows, Tensor grad_output, bool log, "
    "bool want_grad_logits) -> (Tensor, Tensor)",
    _fake_bwd,
    "tempered_softmax",
)
