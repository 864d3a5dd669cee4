"""Linear layer, TempNet and token loss in plain PyTorch, with all logits at once."""

import torch

from tempnet_kernels.core.checks import check_target
from tempnet_kernels.core.fields import LinearOptions, LinearWants, TokenRow, accumulation_dtype
from tempnet_kernels.core.matmul import unit_of
from tempnet_kernels.core.softcap import capped
from tempnet_kernels.core.tempnet import Head, inverse_norm
from tempnet_kernels.reference.dro_cross_entropy import dro_cross_entropy_fwd
from tempnet_kernels.reference.temperature_head import (
    sigmoid_dropout,
    sigmoid_dropout_bwd,
    temperature_head,
    temperature_head_bwd,
)


def row_moments(logits, center, softcap):
    acc = accumulation_dtype(logits.dtype)
    z = capped(logits.to(acc), softcap)
    counted = z != -torch.inf
    shift = z.amax(1) if center else z.new_zeros(z.shape[0])
    z = torch.where(counted, z - shift[:, None], 0)
    squares = (z * z).sum(1)
    total, count = (z.sum(1), counted.sum(1).to(acc)) if center else (shift, shift)
    return torch.stack([shift, squares, total, count, inverse_norm(squares)])


def normalized_rows(logits, shift, inverse, softcap):
    x = capped(logits.to(shift.dtype), softcap) - shift[:, None]
    inverse = inverse[:, None]
    return torch.where((x == -torch.inf) | (inverse < 0), 0, x * inverse)


def linear_dro_cross_entropy_fwd(
    hidden, weight, bias, target, tau, scale, tempnet, dropout_key, wants, want_argmax, *options
):
    options, want = LinearOptions(*options), LinearWants(*wants)
    ignore_index, center = options.ignore_index, options.center
    tau_min, tau_max = options.tau_min, options.tau_max
    acc = scale.dtype
    check_target(target, weight.shape[0], ignore_index, "linear_dro_cross_entropy")
    live = target != ignore_index
    h = torch.where(live[:, None], hidden, 0)  # (N, D), of an ignored row nothing is read
    z = torch.nn.functional.linear(h, weight, bias)  # (N, V)

    if tempnet:
        w1, *rest = tempnet
        p = Head(*(x.to(acc) for x in rest))
        shift, *_, inverse = row_moments(z, center, options.softcap)
        x = normalized_rows(z, shift, inverse, options.softcap)  # (N, V)
        dropout = options.dropout
        dropped = sigmoid_dropout(x @ w1.to(acc).T, p.b1, None, dropout_key, None, 0, dropout)
        y = torch.addmm(p.b2, dropped, p.w2.T)  # (N, H)
        last = None, p.scaler, p.last_weight, p.last_bias, False, tau_min, tau_max
        tau = temperature_head(y, *last)

    dz, loss, rows, argmax = dro_cross_entropy_fwd(
        z, target, tau, scale, *options.token, True, want_argmax
    )
    grad_hidden = (dz @ weight) if want.hidden else hidden.new_empty((0, hidden.shape[1]))
    wide = dz.to(acc)
    if hidden.dtype == torch.float16:  # c p - q, not scaled
        wide *= (scale / unit_of(scale))[:, None]
    grad_weight = wide.T @ h.to(acc) if want.weight else wide.new_empty((0, hidden.shape[1]))
    grad_bias = wide.sum(0) if want.bias else wide.new_empty(0)
    if hidden.dtype != torch.float16:
        grad_weight, grad_bias = grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)
    grads = []
    if want.tempnet:
        grad_y, sums = temperature_head_bwd(rows[TokenRow.GRAD_TAU], y, *last)
        grad_pre, grad_b1 = sigmoid_dropout_bwd(grad_y @ p.w2, dropped, None, dropout)
        grads = [
            grad_pre.T @ x if want.w1 else x.new_empty((0, 0)), grad_y.T @ dropped,
            torch.cat([sums, grad_b1], 1).sum(0),
        ]  # fmt: skip
    taus = torch.where(live, tau, torch.nan) if tempnet else scale.new_empty(0)
    return loss, rows, argmax, taus, grad_hidden, grad_weight, grad_bias, grads
