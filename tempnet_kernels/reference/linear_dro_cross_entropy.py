"""Linear layer, TempNet and token loss in plain PyTorch, with all logits at once."""

import torch

from tempnet_kernels import _tempnet
from tempnet_kernels._checks import check_target
from tempnet_kernels._products import unit_of
from tempnet_kernels.reference.dro_cross_entropy import dro_cross_entropy_fwd


def row_moments(logits, center):
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    z = logits.to(acc)
    counted = z != -torch.inf
    shift = z.amax(1) if center else z.new_zeros(z.shape[0])
    z = torch.where(counted, z - shift[:, None], 0)
    squares = (z * z).sum(1)
    if not center:
        return torch.stack([shift, squares, shift, shift])
    return torch.stack([shift, squares, z.sum(1), counted.sum(1).to(acc)])


def linear_dro_cross_entropy_fwd(
    hidden, weight, bias, target, tau, scale, tempnet, keep, rho, ignore_index, label_smoothing,
    z_loss, softcap, tau_min, tau_max, center, fold, chunk_rows, drop_ignored, wants, want_argmax,
):  # fmt: skip
    acc = scale.dtype
    check_target(target, weight.shape[0], ignore_index, "linear_dro_cross_entropy")
    want_hidden, want_weight, want_bias, want_w1, want_head = wants
    live = target != ignore_index
    h = torch.where(live[:, None], hidden, 0)  # (N, D), of an ignored row nothing is read
    z = torch.nn.functional.linear(h, weight, bias)  # (N, V)
    tanh = torch.tanh(z / softcap) if softcap else None
    z = tanh * softcap if softcap else z

    if tempnet:
        w1, *rest = tempnet
        p = _tempnet.Head(*(x.to(acc) for x in rest))
        shift, squares, _, _ = row_moments(z, center)
        norm = squares.sqrt().clamp_min(_tempnet.NORM_MIN)
        x = z.to(acc) - shift[:, None]
        x = torch.where(z == -torch.inf, 0, x) / norm[:, None]  # (N, V)
        share, saved = _tempnet.head(x @ w1.to(acc).T, p, keep)
        tau = tau_min + (tau_max - tau_min) * share

    dz, loss, rows, argmax = dro_cross_entropy_fwd(
        z, target, tau, scale, rho, ignore_index, label_smoothing, z_loss, True, want_argmax
    )
    if softcap:
        dz = dz * (1 - tanh * tanh)
    grad_hidden = (dz @ weight) if want_hidden else hidden.new_empty((0, hidden.shape[1]))
    wide = dz.to(acc)
    if hidden.dtype == torch.float16:  # c p - q, not scaled
        wide *= (scale / unit_of(scale))[:, None]
    grad_weight = wide.T @ h.to(acc) if want_weight else wide.new_empty((0, hidden.shape[1]))
    grad_bias = wide.sum(0) if want_bias else wide.new_empty(0)
    if hidden.dtype != torch.float16:
        grad_weight, grad_bias = grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)
    grads = []
    if want_w1 or want_head:
        grad_pre, grads = _tempnet.head_gradients(rows[1] * (tau_max - tau_min), saved, p, keep)
        grads = [grad_pre.T @ x if want_w1 else x.new_empty((0, 0)), *grads]
    taus = torch.where(live, tau, torch.nan)
    return loss, rows, argmax, taus, grad_hidden, grad_weight, grad_bias, grads
