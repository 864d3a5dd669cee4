"""The temperature networks around their matrix products: schemas, and the gradient of each network.

``x = mask * sigmoid(factor pre + bias)`` is what goes into a network's last product h, and with
``q = h / norms`` or h, ``f = sigmoid(q)`` or q:

    w   = softmax(q / exp(scaler))
    tau = tau_min + (tau_max - tau_min) * sigmoid(sum_k weight_k (w_k - 1/K) f_k + bias)

Dropout masks are those of :mod:`tempnet_kernels.core.dropout`, made where they are applied.
"""

import torch

from tempnet_kernels.core import register
from tempnet_kernels.core.autograd import apply
from tempnet_kernels.core.checks import once_differentiable
from tempnet_kernels.core.fields import Moments, accumulation_dtype
from tempnet_kernels.core.tempnet import (
    Dropout,
    Head,
    HeadSums,
    gradients,
    predict,
    row_blocks,
)

_op = register.operator


def backend_for(device, dtype):
    """The backend of a network whose sums are in ``dtype``. Where no kernels are it is the
    definition: a network has no backend to choose, and its time is its matrix products'."""
    if device.type == "cuda" and dtype == torch.float64:
        return "reference"  # the kernels for a GPU have no float64
    return register.pick("", "temperature_head", "auto", device, otherwise="reference")


class _AfterFirstLayer(torch.autograd.Function):
    """(pre ``[N, H]``, the parameters of a :class:`Head`) -> temperatures ``[N]``."""

    @staticmethod
    def forward(pre, key, probability, bounds, backend, *head):
        return predict(backend, pre, Head(*head), Dropout(key, probability), bounds)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, _, ctx.probability, ctx.bounds, ctx.backend, *head = inputs
        _, *saved = output
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved, *head)

    @staticmethod
    @once_differentiable("TempNet")
    def backward(ctx, grad_tau, *_):
        if grad_tau is None:
            return (None,) * len(ctx.needs_input_grad)
        dropped, h, *head = ctx.saved_tensors
        p = Head(*head)
        with torch.autocast(h.device.type, enabled=False):  # that of the caller of backward
            grad_pre, grad_h, sums, grad_b1 = gradients(
                ctx.backend, grad_tau, dropped, h, p, ctx.probability, ctx.bounds
            )
            grad_w2 = grad_h.T @ dropped
        total = HeadSums.of(sums.sum(0))
        grads = Head(
            grad_b1.sum(0), grad_w2, total.grad_b2, total.grad_scaler,
            total.grad_weight.view(p.last_weight.shape), total.grad_bias,
        )  # fmt: skip
        return grad_pre, None, None, None, None, *grads


def after_first_layer(pre, head, key, probability, bounds, backend):
    """The temperatures ``[N]`` of a TempNet from ``pre = W1 x`` ``[N, H]``."""
    return apply(_AfterFirstLayer, pre, key, probability, bounds, backend, *head)[0]


class _OfFeatures(torch.autograd.Function):
    """(the parameters of a ContrastiveTempNet, features ``[B, D]``) -> temperatures ``[B]``."""

    @staticmethod
    def forward(
        features, key, ids, probability, bounds, backend, proj_weight, proj_bias, prototypes, *last
    ):
        x = _op("sigmoid_dropout", backend)(
            features @ proj_weight.T, proj_bias, None, key, ids, 0, probability
        )  # (B, D)
        norms = torch.linalg.vector_norm(prototypes, dim=1)  # (K,)
        h = x @ prototypes.T  # (B, K)
        tau = _op("temperature_head", backend)(h, norms, *last, True, *bounds)
        return tau, x, norms, h

    @staticmethod
    def setup_context(ctx, inputs, output):
        features, _, _, ctx.probability, ctx.bounds, ctx.backend, _, _, *rest = inputs
        _, *saved = output
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(features, *saved, *rest)

    @staticmethod
    @once_differentiable("ContrastiveTempNet")
    def backward(ctx, grad_tau, *_):
        if grad_tau is None:
            return (None,) * len(ctx.needs_input_grad)
        features, x, norms, h, prototypes, scaler, weight, bias = ctx.saved_tensors
        grad_h, sums = _op("temperature_head_bwd", ctx.backend)(
            grad_tau, h, norms, scaler, weight, bias, True, *ctx.bounds
        )
        total = HeadSums.with_norms(sums.sum(0))
        with torch.autocast(h.device.type, enabled=False):  # that of the caller of backward
            grad_pre, grad_bias = _op("sigmoid_dropout_bwd", ctx.backend)(
                grad_h @ prototypes, x, None, ctx.probability
            )
            grad_weight, grad_prototypes = grad_pre.T @ features, grad_h.T @ x
        return (
            *[None] * 6, grad_weight, grad_bias.sum(0),
            torch.addcmul(grad_prototypes, total.along[:, None], prototypes), total.grad_scaler,
            total.grad_weight.view(weight.shape), total.grad_bias,
        )  # fmt: skip


def of_features(features, parameters, key, ids, probability, bounds, backend):
    """The temperatures ``[B]`` of a ContrastiveTempNet with the ``parameters`` proj.weight,
    proj.bias, prototypes, scaler, linear_1.weight, linear_1.bias."""
    return apply(_OfFeatures, features, key, ids, probability, bounds, backend, *parameters)[0]


def _fake_sigmoid_dropout(pre, bias, factor, key, ids, first_row, probability):
    return pre.new_empty(pre.shape)


def _fake_sigmoid_dropout_bwd(grad, dropped, factor, probability):
    n, width = dropped.shape
    return dropped.new_empty((n, width)), dropped.new_empty((row_blocks(n)[0], width))


def _fake_head(h, norms, scaler, weight, bias, squash, tau_min, tau_max):
    return h.new_empty(h.shape[:1])


def _fake_head_bwd(grad_tau, h, norms, scaler, weight, bias, squash, tau_min, tau_max):
    n, k = h.shape
    sums = 2 * k + 2 + (0 if norms is None else k)
    return h.new_empty((n, k)), h.new_empty((row_blocks(n)[0], sums))


def _fake_row_moments(logits, center, softcap):
    return logits.new_empty(
        (Moments.FIELDS, logits.shape[0]), dtype=accumulation_dtype(logits.dtype)
    )


def _fake_normalized_rows(logits, shift, inverse, softcap):
    return logits.new_empty(logits.shape, dtype=accumulation_dtype(logits.dtype))


# All floating-point tensors are in the accumulation dtype. pre [N, H], bias [H], factor [N]; key:
# 0-d int64, without which nothing is dropped; ids [N] int64, or the row's number from first_row on.
register.define(
    "sigmoid_dropout(Tensor pre, Tensor bias, Tensor? factor, Tensor? key, Tensor? ids, "
    "int first_row, float probability) -> Tensor",
    _fake_sigmoid_dropout,
    "temperature_head",
)
# grad and the output dropped [N, H]; probability: 0 where nothing was dropped. Returns the gradient
# of pre [N, H], and of blocks of rows the sums of that of bias [P, H].
register.define(
    "sigmoid_dropout_bwd(Tensor grad, Tensor dropped, Tensor? factor, float probability) "
    "-> (Tensor, Tensor)",
    _fake_sigmoid_dropout_bwd,
    "temperature_head",
)
# h [N, K], norms [K] or none, scaler [1], weight [1, K], bias [1]; squash: f = sigmoid(q), not q.
register.define(
    "temperature_head(Tensor h, Tensor? norms, Tensor scaler, Tensor weight, Tensor bias, "
    "bool squash, float tau_min, float tau_max) -> Tensor",
    _fake_head,
    "temperature_head",
)
# grad_tau [N] of any stride. Returns the gradient of h [N, K], and of blocks of rows the HeadSums
# [P, F].
register.define(
    "temperature_head_bwd(Tensor grad_tau, Tensor h, Tensor? norms, Tensor scaler, Tensor weight, "
    "Tensor bias, bool squash, float tau_min, float tau_max) -> (Tensor, Tensor)",
    _fake_head_bwd,
    "temperature_head",
)
# logits [N, V] with column stride 1 -> Moments [5, N] of the capped ones in the accumulation dtype.
register.define(
    "row_moments(Tensor logits, bool center, float softcap) -> Tensor",
    _fake_row_moments,
    "linear_dro_cross_entropy",
)
# The same logits, shift and inverse [N] -> (capped - shift) * inverse [N, V]; a -inf counts as 0,
# and a row whose inverse is negative is 0 whatever it holds.
register.define(
    "normalized_rows(Tensor logits, Tensor shift, Tensor inverse, float softcap) -> Tensor",
    _fake_normalized_rows,
    "linear_dro_cross_entropy",
)
