"""What a user would pick instead. Each is a function (logits, target, tau, rho) -> loss; what it
leaves out is said."""

import importlib.util

import torch
import torch.nn.functional as F

from tempnet_kernels import dro_cross_entropy
from tempnet_kernels.reference.official import official_cross_entropy

_compiled_official = torch.compile(official_cross_entropy, dynamic=False)


def official_compiled(logits, target, tau, rho):
    return _compiled_official(logits, target, tau, rho)


def cross_entropy(logits, target, tau, rho):
    """No temperature at all."""
    return F.cross_entropy(logits, target)


def ours(logits, target, tau, rho):
    return dro_cross_entropy(logits, target, tau, rho)


TOKEN_LOSSES = {
    "official eager": official_cross_entropy,
    "official compiled": official_compiled,
    "F.cross_entropy": cross_entropy,
    "tempnet_kernels": ours,
}

# What has no temperature, and what puts the gradient into the logits it is given.
NO_TEMPERATURE = ["F.cross_entropy"]
OVERWRITES = []

if torch.cuda.is_available():

    def ours_in_triton(logits, target, tau, rho):
        return dro_cross_entropy(logits, target, tau, rho, backend="triton")

    TOKEN_LOSSES["tempnet_kernels, triton"] = ours_in_triton

if torch.cuda.is_available() and importlib.util.find_spec("liger_kernel"):
    from liger_kernel.transformers.functional import liger_cross_entropy

    def liger(logits, target, tau, rho):
        return liger_cross_entropy(logits, target)

    TOKEN_LOSSES["Liger-Kernel"] = liger
    NO_TEMPERATURE.append("Liger-Kernel")
    OVERWRITES.append("Liger-Kernel")

if torch.cuda.is_available() and importlib.util.find_spec("quack"):
    from quack.cross_entropy import cross_entropy as quack_cross_entropy

    def quack(logits, target, tau, rho):
        return quack_cross_entropy(logits, target, reduction="mean")

    TOKEN_LOSSES["quack"] = quack
    NO_TEMPERATURE.append("quack")
