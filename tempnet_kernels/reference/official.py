"""What the authors' training code computes, in eager PyTorch, to compare with."""

import math

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
