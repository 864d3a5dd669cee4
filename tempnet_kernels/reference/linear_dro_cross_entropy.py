"""Linear layer, TempNet and token loss in plain PyTorch, with all logits at once."""

import torch

from tempnet_kernels.core.checks import check_target
from tempnet_kernels.core.fields import LinearOptions, LinearWants, TokenRow
from tempnet_kernels.core.matmul import unit_of
from tempnet_kernels.core.softcap import capped
from tempnet_kernels.core.tempnet import NORM_MIN, Head, head, head_gradients, row_moments
from tempnet_kernels.reference.dro_cross_entropy import dro_cross_entropy_fwd

__all__ = ["linear_dro_cross_entropy_fwd", "row_moments"]  # the operators


def linear_dro_cross_entropy_fwd(
    hidden, weight, bias, target, tau, scale, tempnet, keep, wants, want_argmax, *options
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
        shift, squares, _, _ = row_moments(z, center, options.softcap)
        norm = squares.sqrt().clamp_min(NORM_MIN)
        x = capped(z.to(acc), options.softcap)
        x = torch.where(x == -torch.inf, 0, x - shift[:, None]) / norm[:, None]  # (N, V)
        share, saved = head(x @ w1.to(acc).T, p, keep)
        tau = tau_min + (tau_max - tau_min) * share

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
        grad_pre, grads = head_gradients(
            rows[TokenRow.GRAD_TAU] * (tau_max - tau_min), saved, p, keep
        )
        grads = [grad_pre.T @ x if want.w1 else x.new_empty((0, 0)), *grads]
    taus = torch.where(live, tau, torch.nan)
    return loss, rows, argmax, taus, grad_hidden, grad_weight, grad_bias, grads
