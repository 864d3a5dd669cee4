"""Where the temperatures of a contrastive loss come from: a class for each of its methods."""

import math

import torch
from torch import nn

from tempnet_kernels.core.checks import temperature_bounds
from tempnet_kernels.core.fields import accumulation_dtype
from tempnet_kernels.nn.tempnet import reshape_scalar


class Method:
    """``loss`` is the module, which holds parameters, networks and state by their published
    names."""

    tau: float | None = None  # that it begins with by default
    needs_state = False
    softmax = False  # CLIP's loss: the positive counts, and nothing is remembered
    learns = False  # its temperatures from rho
    has_step = False

    def bounds(self, tau, tau_min, tau_max):
        """(tau_min, tau_max) from what was given."""
        return tau_min, tau_max

    def begin(self, loss, tau):
        """Give ``loss`` what is the method's own; returns the initial values of its state."""
        return {}

    def temperatures(self, loss, image, text, ids, update, logit_scale):
        """Of the anchors of both sides, each ``[B]`` or one number as 0-d."""
        raise NotImplementedError

    def step(self, loss, ids, taus, k, counted):
        """{name: the new values at ``ids``} of its state, from the derivative ``k [2, B]`` of both
        sides' terms by their temperatures. ``counted [2, B]`` is NaN at an anchor that has no
        term."""
        return {}


class CLIP(Method):
    """One temperature, a parameter, within open_clip's bounds; or the model's own."""

    tau = 0.07
    softmax = True

    def bounds(self, tau, tau_min, tau_max):
        return 0.01, 1.0

    def begin(self, loss, tau):
        loss.logit_scale = nn.Parameter(torch.tensor([-math.log(tau)]))
        loss.register_load_state_dict_pre_hook(_accept_open_clip_s_scale)
        return {}

    def temperatures(self, loss, image, text, ids, update, logit_scale):
        if logit_scale is not None:
            acc = accumulation_dtype(image.dtype)
            tau = 1 / torch.as_tensor(logit_scale, dtype=acc, device=image.device).reshape(())
        else:
            # Not the parameter, of which FSDP hands out a copy.
            low, high = (-math.log(tau) for tau in (loss.tau_max, loss.tau_min))
            tau = torch.exp(-_Bounded.apply(loss.logit_scale, low, high)).squeeze(0)
        return tau, tau


class SogCLR(Method):
    """One temperature, fixed."""

    tau = 0.07

    def bounds(self, tau, tau_min, tau_max):
        if not 0 < tau < math.inf:
            raise ValueError(f"RobustContrastiveLoss: tau must be a finite number > 0, got {tau}")
        return tau, tau

    def begin(self, loss, tau):
        loss.tau = tau
        return {}

    def temperatures(self, loss, image, text, ids, update, logit_scale):
        acc = accumulation_dtype(image.dtype)
        tau = torch.full((), loss.tau, dtype=acc, device=image.device)
        return tau, tau


class ISogCLR(Method):
    """A table of temperatures, by the rule u <- (1 - MOMENTUM) u + MOMENTUM clip(k, +-CLIP),
    tau <- clip(tau - RATE u, tau_min, tau_max)."""

    RATE, MOMENTUM, CLIP = 0.03, 0.5, 5.0

    tau = 0.01
    needs_state = learns = has_step = True

    def bounds(self, tau, tau_min, tau_max):
        tau_min = 0.005 if tau_min is None else tau_min
        tau_max = 0.05 if tau_max is None else tau_max
        temperature_bounds("RobustContrastiveLoss", tau_min, tau_max)
        return tau_min, tau_max

    def begin(self, loss, tau):
        return {"tau_image": tau, "tau_text": tau, "u_image": 0.0, "u_text": 0.0}

    def temperatures(self, loss, image, text, ids, update, logit_scale):
        return loss.state.read(("tau_image", "tau_text"), ids, loss.backend).unbind()

    def step(self, loss, ids, taus, k, counted):
        old, tau = loss.state.read(("u_image", "u_text"), ids, loss.backend), torch.stack(taus)
        # What is not finite must not reach the table.
        moves = torch.isfinite(k + counted)
        bounded = k.clamp(-self.CLIP, self.CLIP).to(old)
        u = torch.where(moves, torch.lerp(old, bounded, self.MOMENTUM), old)
        moved = (tau - self.RATE * u).clamp(loss.tau_min, loss.tau_max)
        moved = torch.where(moves, moved, tau)
        return {"tau_image": moved[0], "tau_text": moved[1], "u_image": u[0], "u_text": u[1]}


class Predicted(Method):
    """Of a :class:`ContrastiveTempNet` for each side, which holds the bounds."""

    learns = True

    def temperatures(self, loss, image, text, ids, update, logit_scale):
        return (
            loss.image_temp_gen(image.detach(), ids, new_mask=update),
            loss.text_temp_gen(text.detach(), ids, new_mask=update),
        )


METHODS = {"clip": CLIP(), "sogclr": SogCLR(), "isogclr": ISogCLR(), "tempnet": Predicted()}


class _Bounded(torch.autograd.Function):
    """``x`` clamped. At a bound the gradient vanishes only where a step against it leads further
    out: otherwise x would stay there for ever."""

    @staticmethod
    def forward(x, low, high):
        return x.clamp(low, high)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.low, ctx.high = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        outward = ((x <= ctx.low) & (grad > 0)) | ((x >= ctx.high) & (grad < 0))
        return grad.masked_fill(outward, 0), None, None


def _accept_open_clip_s_scale(module, state_dict, prefix, *_):
    reshape_scalar(state_dict, prefix + "logit_scale")
