"""What the authors' training code computes, in eager PyTorch, to compare with."""

import math

import torch
import torch.nn.functional as F


def official_cross_entropy(logits, target, tau, rho):
    """Mean token loss of the official code: logits ``[..., V]``, target ``[...]``, tau ``[...]``.

    The same number as :func:`tempnet_kernels.dro_cross_entropy` on rows that all count. It has no
    masks: an ignored row adds ``(rho - log V) * tau`` and counts in the mean.

    Source: ``GPT-2/megatron/model/tempnet.py``, function ``tau_cross_entropy``.
    """
    v = logits.shape[-1]
    tau = tau.reshape(-1, 1)
    cross_entropy = F.cross_entropy(
        logits.reshape(-1, v) / tau, target.reshape(-1), reduction="none"
    )
    return (tau[:, 0] * cross_entropy + (rho - math.log(v)) * tau[:, 0]).mean()


def official_contrastive(
    image, text, tau_image, tau_text, rho, gamma, state, ids, epoch, return_k=False
):
    """Contrastive loss of the official code, features ``[B, D]`` and temperatures ``[B]``.

    Value and gradients are those of :func:`tempnet_kernels.dro_contrastive` as long as every sample
    was visited in epoch 0 and no ``s`` underflows. Updates ``state``, a dict of ``s_I``, ``b_I``,
    ``s_T`` and ``b_T`` (zeros at first), at the samples ``ids``. With ``return_k`` also k, the
    gradient of each side's temperatures times B, detached.

    Source: ``Bimodal_CL/models/losses.py``, class ``iSogCLR_TempNet_Loss``.
    """
    b = image.shape[0]
    similarity = image @ text.T
    positive = similarity.diagonal()
    negatives = 1 - torch.eye(b, dtype=image.dtype, device=image.device)
    total, ks = 0, []
    for side, tau, diff in (
        ("I", tau_image, similarity - positive[:, None]),
        ("T", tau_text, (similarity - positive[None, :]).T),
    ):
        scaled = (diff / tau[:, None]).detach()
        old_s, old_b = state[f"s_{side}"][ids], state[f"b_{side}"][ids]
        new_b = torch.maximum(scaled, old_b[:, None]).amax(1)
        e = torch.exp(scaled - new_b[:, None]) * negatives
        s = e.sum(1)
        if epoch > 0:
            s = (1 - gamma) * old_s * torch.exp(old_b - new_b) + gamma * s
        state[f"s_{side}"][ids] = s.to(old_s.dtype)
        state[f"b_{side}"][ids] = new_b.to(old_b.dtype)
        s = s.clamp(min=1e-14)
        w = e / s[:, None]
        k = torch.log(s / (b - 1)) + new_b + rho - (w * scaled).sum(1)
        ks.append(k)
        total = total + (w * diff).sum(1).mean() + (k * tau).mean()
    return (total, *ks) if return_k else total
