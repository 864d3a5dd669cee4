"""What a user would pick instead; what it leaves out is said. A token loss is a function
(logits, target, tau, rho) -> loss, a contrastive one (image, text, tau_image, tau_text) -> loss, a
softmax one (logits, tau) -> probabilities in the logits' dtype, a linear one
(hidden, weight, target, tempnet, rho) -> loss."""

import importlib.util

import torch
import torch.nn.functional as F

from tempnet_kernels import (
    dro_contrastive,
    dro_cross_entropy,
    linear_dro_cross_entropy,
    tempered_softmax,
)
from tempnet_kernels.reference.official import official_contrastive, official_cross_entropy

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


# A first visit with these: the moving average does not add work.
CONTRASTIVE_RHO, GAMMA = 7.0, 0.8
_compiled_official_contrastive = torch.compile(official_contrastive, dynamic=False)


def official_pairs(image, text, tau_image, tau_text, function=official_contrastive):
    ids = torch.arange(image.shape[0], device=image.device)
    zeros = torch.zeros(image.shape[0], device=image.device)
    state = {name: zeros.clone() for name in ("s_I", "b_I", "s_T", "b_T")}
    return function(image, text, tau_image, tau_text, CONTRASTIVE_RHO, GAMMA, state, ids, 0)


def official_pairs_compiled(*tensors):
    return official_pairs(*tensors, function=_compiled_official_contrastive)


def open_clip(image, text, tau_image, tau_text):
    """One temperature, softmax with the positive: the formula of ClipLoss on one process."""
    logits = image @ text.T / tau_image[0]
    y = torch.arange(image.shape[0], device=image.device)
    return (F.cross_entropy(logits, y) + F.cross_entropy(logits.T, y)) / 2


def ours_pairs(image, text, tau_image, tau_text):
    return dro_contrastive(image, text, tau_image, tau_text, CONTRASTIVE_RHO, gamma=GAMMA)


CONTRASTIVE_LOSSES = {
    "official eager": official_pairs,
    "official compiled": official_pairs_compiled,
    "open_clip's formula": open_clip,
    "tempnet_kernels": ours_pairs,
}

if torch.cuda.is_available():

    def ours_pairs_in_triton(image, text, tau_image, tau_text):
        return dro_contrastive(
            image, text, tau_image, tau_text, CONTRASTIVE_RHO, gamma=GAMMA, backend="triton"
        )

    CONTRASTIVE_LOSSES["tempnet_kernels, triton"] = ours_pairs_in_triton

if torch.cuda.is_available() and importlib.util.find_spec("inf_cl"):
    from inf_cl import cal_inf_loss

    def inf_cl(image, text, tau_image, tau_text):
        """One temperature, softmax with the positive; it upcasts 16-bit features."""
        a, b = image / tau_image[0], text / tau_image[0]
        return (cal_inf_loss(a, text) + cal_inf_loss(b, image)) / 2

    CONTRASTIVE_LOSSES["Inf-CL"] = inf_cl


def torch_softmax(logits, tau):
    """A float32 tau makes 16-bit logits float32 here, which their exponents need."""
    return torch.softmax(logits / tau[:, None], -1).to(logits.dtype)


_compiled_softmax = torch.compile(torch_softmax, dynamic=False)


def torch_softmax_compiled(logits, tau):
    return _compiled_softmax(logits, tau)


SOFTMAXES = {
    "torch.softmax eager": torch_softmax,
    "torch.softmax compiled": torch_softmax_compiled,
    "tempnet_kernels": tempered_softmax,
}

if torch.cuda.is_available():

    def tempered_softmax_in_triton(logits, tau):
        return tempered_softmax(logits, tau, backend="triton")

    SOFTMAXES["tempnet_kernels, triton"] = tempered_softmax_in_triton


def official_linear(hidden, weight, target, tempnet, rho):
    z = F.linear(hidden, weight)
    return official_cross_entropy(z, target, tempnet(z.detach()), rho)


_compiled_official_linear = torch.compile(official_linear, dynamic=False)


def official_linear_compiled(hidden, weight, target, tempnet, rho):
    return _compiled_official_linear(hidden, weight, target, tempnet, rho)


def ours_with_logits(hidden, weight, target, tempnet, rho):
    z = F.linear(hidden, weight)
    return dro_cross_entropy(z, target, tempnet(z.detach()), rho, overwrite_logits=z.requires_grad)


def ours_linear(hidden, weight, target, tempnet, rho):
    return linear_dro_cross_entropy(hidden, weight, target, tempnet=tempnet, rho=rho)


def ours_linear_given(hidden, weight, target, tempnet, rho):
    """No TempNet: one temperature."""
    return linear_dro_cross_entropy(hidden, weight, target, tau=0.8, rho=rho)


LINEAR_LOSSES = {
    "official eager": official_linear,
    "official compiled": official_linear_compiled,
    "tempnet_kernels, with the logits": ours_with_logits,
    "tempnet_kernels": ours_linear,
    "tempnet_kernels, tau given": ours_linear_given,
}

if torch.cuda.is_available() and importlib.util.find_spec("liger_kernel"):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def liger_linear(hidden, weight, target, tempnet, rho):
        """No temperature at all."""
        return liger_fused_linear_cross_entropy(hidden, weight, target)

    LINEAR_LOSSES["Liger-Kernel"] = liger_linear

if torch.cuda.is_available() and importlib.util.find_spec("cut_cross_entropy"):
    from cut_cross_entropy import linear_cross_entropy

    def cut_cross_entropy(hidden, weight, target, tempnet, rho):
        """No temperature at all."""
        return linear_cross_entropy(hidden, weight, target)

    LINEAR_LOSSES["cut-cross-entropy"] = cut_cross_entropy
