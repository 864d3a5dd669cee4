"""The temperature networks around their matrix products in plain PyTorch."""

import torch

from tempnet_kernels.core.dropout import hashed_dropout
from tempnet_kernels.core.tempnet import NORM_MIN, row_blocks


def sigmoid_dropout(pre, bias, factor, key, ids, first_row, probability):
    n, width = pre.shape
    x = torch.sigmoid((pre if factor is None else factor[:, None] * pre) + bias)
    if key is None:
        return x
    if ids is None:
        ids = torch.arange(first_row, first_row + n, device=pre.device)
    return x * hashed_dropout(key, ids, width, probability, x.dtype)


def sigmoid_dropout_bwd(grad, dropped, factor, probability):
    # dropped = mask * sigmoid, and the mask is 0 or 1 / (1 - probability).
    grad_x = grad.contiguous() * dropped * (1 - dropped * (1 - probability))
    return grad_x if factor is None else factor[:, None] * grad_x, _block_sums(grad_x)


def _forward(h, norms, scaler, weight, bias, squash):
    q = h if norms is None else h / norms.clamp_min(NORM_MIN)  # (N, K)
    f = torch.sigmoid(q) if squash else q
    w = torch.softmax(q / scaler.exp(), 1)
    mixed = (w - 1 / h.shape[1]) * f
    return q, f, w, mixed, torch.sigmoid(mixed @ weight.view(-1) + bias)


def temperature_head(h, norms, scaler, weight, bias, squash, tau_min, tau_max):
    share = _forward(h, norms, scaler, weight, bias, squash)[-1]
    return tau_min + (tau_max - tau_min) * share


def temperature_head_bwd(
    grad_tau, h, norms, scaler, weight, bias, squash, tau_min, tau_max
):  # fmt: skip
    q, f, w, mixed, share = _forward(h, norms, scaler, weight, bias, squash)
    grad_t = (grad_tau * (tau_max - tau_min) * share * (1 - share))[:, None]  # (N, 1)
    grad_mixed = grad_t * weight.view(1, -1)  # (N, K)
    grad_w = grad_mixed * f
    grad_x = w * (grad_w - (grad_w * w).sum(1, keepdim=True)) / scaler.exp()  # of q, through w
    grad_f = grad_mixed * (w - 1 / h.shape[1])
    grad_q = grad_x + (grad_f * f * (1 - f) if squash else grad_f)
    grad_h = grad_q if norms is None else grad_q / norms.clamp_min(NORM_MIN)
    # Of softmax(q / T) only differences of q count; the largest is 0 here, and nothing cancels.
    centred = q - q.amax(1, keepdim=True)
    sums = [grad_h, grad_t * mixed, -(grad_x * centred).sum(1, keepdim=True), grad_t]
    if norms is not None:
        along = torch.where(norms < NORM_MIN, 0, -1 / norms.square())
        sums.append(grad_q * q * along)
    return grad_h, _block_sums(torch.cat(sums, 1))


def _block_sums(x):
    """Of blocks of rows ``[N, F]`` -> ``[P, F]``."""
    blocks, rows = row_blocks(x.shape[0])
    padded = torch.nn.functional.pad(x, (0, 0, 0, blocks * rows - x.shape[0]))
    return padded.view(blocks, rows, x.shape[1]).sum(1)
