"""The contrastive loss as a module that holds its state."""

import math
from typing import NamedTuple

import torch
from torch import nn

from tempnet_kernels._checks import check_integers, in_backward, temperature_bounds
from tempnet_kernels.dro_contrastive import dro_contrastive
from tempnet_kernels.nn.tempnet import TemperatureStats
from tempnet_kernels.reference.official import official_contrastive

# The initial temperature of each method that has one, as in the official code.
TAU = {"clip": 0.07, "sogclr": 0.07, "isogclr": 0.01}
METHODS = (*TAU, "tempnet")

# iSogCLR's rule for its table of temperatures: u <- (1 - MOMENTUM) u + MOMENTUM clip(k, +-CLIP),
# tau <- clip(tau - RATE u, tau_min, tau_max).
ISOGCLR_RATE, ISOGCLR_MOMENTUM, ISOGCLR_CLIP = 0.03, 0.5, 5.0

# As open_clip bounds its scale: a temperature of 0.01.
MAX_LOGIT_SCALE = math.log(100)


class PerSampleState(nn.Module):
    """Float32 tensors ``[num_samples]``: in the state dict, moved with the module, but no buffers,
    which DDP would broadcast and ``half()`` round.

    Args:
        num_samples: their length.
        initial: name -> the value of a sample that was never visited.
    """

    def __init__(self, num_samples, initial):
        super().__init__()
        self.initial = initial
        self.values = {name: torch.full((num_samples,), x) for name, x in initial.items()}

    def __getitem__(self, name):
        return self.values[name]

    @torch.no_grad()
    def write(self, ids, **new):
        """``values[name][ids] = new[name]``; of equal ids the last one counts, on every device."""
        ordered, order = torch.sort(ids, stable=True)
        last = order[torch.searchsorted(ordered, ids, right=True) - 1]
        for name, value in new.items():
            self.values[name][ids] = value[last].to(torch.float32)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        for name, value in self.values.items():
            device = fn(value.new_empty(0)).device
            if value.is_meta and device.type != "meta":
                self.values[name] = torch.full_like(value, self.initial[name], device=device)
            elif value.device != device:
                self.values[name] = value.to(device)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination.update((prefix + name, value) for name, value in self.values.items())

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors
    ):
        for name, value in self.values.items():
            loaded = state_dict.get(prefix + name)
            if loaded is None:
                missing.append(prefix + name)
            elif loaded.shape != value.shape:
                errors.append(
                    f"{prefix}{name} is of {tuple(loaded.shape)} samples, "
                    f"the loss of {tuple(value.shape)}"
                )
            else:
                value.copy_(loaded)
        own = {prefix + name for name in self.values}
        unexpected += [key for key in state_dict if key.startswith(prefix) and key not in own]

    def extra_repr(self):
        return ", ".join(f"{name}: {tuple(value.shape)}" for name, value in self.values.items())


class ContrastiveTemperatureStats(NamedTuple):
    """:class:`TemperatureStats` of either side."""

    image: TemperatureStats
    text: TemperatureStats


class RobustContrastiveLoss(nn.Module):
    """Contrastive loss with a moving average per sample and the temperatures of one of four
    methods, all on the kernel of :func:`tempnet_kernels.dro_contrastive`.

    ========= ============================== =================================================
    method    temperatures                   loss
    ========= ============================== =================================================
    clip      one, learned                   softmax with the positive; no state, no rho
    sogclr    one, fixed                     robust, ``rho = 0``
    isogclr   a table, by iSogCLR's rule     robust
    tempnet   predicted from the features    robust
    ========= ============================== =================================================

    Args:
        num_samples: number of pairs of the training set; the state is one float32 per sample and
            side. 0 for ``method="clip"``.
        gamma: weight of a batch in the moving averages, in (0, 1].
        rho: KL radius in nats (isogclr, tempnet).
        method: see above.
        tau: the temperature that clip, sogclr or isogclr begins with; by default 0.07, 0.07, 0.01.
        tau_min, tau_max: bounds of isogclr's temperatures.
        image_temp_gen, text_temp_gen: with "tempnet", a :class:`ContrastiveTempNet` for each side:
            modules from (features ``[B, D]``, ids ``[B]``) to temperatures ``[B]``, with
            ``tau_min`` and ``tau_max``. The names are those of the official loss: its state dict,
            which holds the networks only, loads with ``strict=False``.
        estimator: "log" keeps the logarithm of the moving average. "official" is the official
            code's estimate in plain PyTorch, to compare with: it scales a first visit after epoch 0
            by gamma, does not recover from an underflow, takes every other pair for a negative,
            and returns a number with the right gradient, not the loss. Its forward needs ``epoch``.
        backend: as in :func:`tempnet_kernels.dro_contrastive`.

    The state is in the state dict (``state.*``), stays float32, and is not a buffer. ``eval()``
    leaves it as it is.

    Source: arXiv 2404.04575; official code ``Bimodal_CL/models/losses.py``. iSogCLR: arXiv
    2305.11965. SogCLR: arXiv 2202.12387.
    """

    def __init__(
        self, num_samples, gamma=0.8, rho=7.0, *, method="tempnet", tau=None, tau_min=0.005,
        tau_max=0.05, image_temp_gen=None, text_temp_gen=None, estimator="log", backend="auto",
    ):  # fmt: skip
        super().__init__()
        name = "RobustContrastiveLoss"
        if method not in METHODS:
            raise ValueError(f"{name}: method must be one of {METHODS}, got {method!r}")
        if estimator not in ("log", "official"):
            raise ValueError(f"{name}: estimator must be 'log' or 'official', got {estimator!r}")
        if num_samples < (method != "clip"):
            raise ValueError(f"{name}: num_samples must be >= 1, got {num_samples}")
        if not 0 < gamma <= 1:
            raise ValueError(f"{name}: gamma must be in (0, 1], got {gamma}")
        if estimator == "official" and (method == "clip" or backend not in ("auto", "reference")):
            raise ValueError(
                f"{name}: estimator='official' is for sogclr, isogclr and tempnet on the reference "
                f"backend, got method={method!r} and backend={backend!r}"
            )
        networks = (image_temp_gen, text_temp_gen)
        if any((network is not None) != (method == "tempnet") for network in networks):
            raise ValueError(
                f"{name}: image_temp_gen and text_temp_gen go with method='tempnet', "
                f"got method={method!r} and {networks}"
            )
        temperature_bounds(name, tau_min, tau_max)
        tau = TAU.get(method) if tau is None else tau
        if tau is not None and not 0 < tau < math.inf:
            raise ValueError(f"{name}: tau must be a finite number > 0, got {tau}")
        self.num_samples, self.gamma = num_samples, gamma
        self.rho = rho if method in ("isogclr", "tempnet") else 0.0
        self.method, self.estimator, self.backend = method, estimator, backend
        self.tau_min, self.tau_max = tau_min, tau_max
        self.image_temp_gen, self.text_temp_gen = networks
        state = {}
        if method == "clip":
            self.logit_scale = nn.Parameter(torch.tensor([-math.log(tau)]))
        elif estimator == "official":
            state = dict.fromkeys(("s_I", "b_I", "s_T", "b_T"), 0.0)
        else:
            state = dict.fromkeys(("log_s_image", "log_s_text"), math.nan)
        if method == "sogclr":
            self.tau = tau
        if method == "isogclr":
            state |= {"tau_image": tau, "tau_text": tau, "u_image": 0.0, "u_text": 0.0}
        self.state = PerSampleState(num_samples, state)
        self._taus = None

    def forward(
        self, image, text, ids=None, *, image_ids=None, text_ids=None, negative_mask=None,
        update_state=True, epoch=None, return_stats=False,
    ):  # fmt: skip
        """The loss of a batch of pairs.

        Args:
            image, text: ``[B, D]`` features, normalised.
            ids: ``[B]`` integers in [0, num_samples), the pairs' places in the training set. Pairs
                with the same id are not negatives of each other; the last one's state is kept.
                clip does without.
            image_ids, text_ids: ``[B]`` ids of the images and of the texts where several pairs
                share one (captions of one image); default ids.
            negative_mask: ``[B, B]`` bool, False where a pair is known not to be a negative.
            update_state: False for a repeated call on the same batch. In eval mode there is no
                update either.
            epoch: for ``estimator="official"``.
            return_stats: also return :class:`tempnet_kernels.ContrastiveStats`.

        Raises:
            ValueError, TypeError, IndexError: an argument is off; the message names it.
            RuntimeError: the call is repeated within a backward pass, by activation checkpointing,
                and would update the state a second time.
        """
        update = update_state and self.training and self.method != "clip"
        self._check(image, ids, update, epoch, image_ids, text_ids, negative_mask, return_stats)
        taus = self._temperatures(image, text, ids)
        self._taus = tuple(tau.detach() for tau in taus)
        if self.estimator == "official":
            return self._official(image, text, taus, ids, epoch, update)
        clip = self.method == "clip"
        log_s = (None, None) if clip else (self.state[f"log_s_{x}"][ids] for x in ("image", "text"))
        value, stats = dro_contrastive(
            image, text, *taus, self.rho,
            **dict(zip(("log_s_image", "log_s_text"), log_s, strict=True)),
            gamma=1.0 if clip else self.gamma, include_positive=clip,
            image_ids=ids if image_ids is None else image_ids,
            text_ids=ids if text_ids is None else text_ids,
            negative_mask=negative_mask, return_stats=True, backend=self.backend,
        )  # fmt: skip
        if update:
            self.state.write(ids, log_s_image=stats.log_s_image, log_s_text=stats.log_s_text)
            if self.method == "isogclr":
                self._move_table(ids, taus, stats[4:6], stats[2:4])
        if clip:
            value = value / (2 * taus[0])
            # What is left to cross entropy, log n, has no gradient.
            cross_entropy = (stats.log_s_image + stats.log_s_text).mean() / 2
            value = value + (cross_entropy - value).detach()
        return (value, stats) if return_stats else value

    def temperature_stats(self):
        """:class:`ContrastiveTemperatureStats` of the last batch, without waiting for a GPU."""
        if self._taus is None:
            raise RuntimeError("RobustContrastiveLoss: temperature_stats needs a forward first")
        networks = (self.image_temp_gen or self, self.text_temp_gen or self)
        return ContrastiveTemperatureStats(
            *(
                TemperatureStats.of(tau, x.tau_min, x.tau_max)
                for tau, x in zip(self._taus, networks, strict=True)
            )
        )

    def _check(self, image, ids, update, epoch, image_ids, text_ids, negative_mask, return_stats):
        name = "RobustContrastiveLoss"
        if ids is None:
            if self.method != "clip":
                raise ValueError(f"{name}: ids must be given for method {self.method!r}")
        else:
            check_integers(name, "ids", ids, image.shape[:1], image.device)
            if ids.device.type == "cpu" and not torch.compiler.is_compiling():
                outside = (ids < 0) | (ids >= self.num_samples)
                if self.method != "clip" and outside.any():
                    row = int(outside.nonzero()[0])
                    raise IndexError(
                        f"{name}: ids[{row}] must be in [0, {self.num_samples}), "
                        f"got {int(ids[row])}"
                    )
        if update and in_backward():
            raise RuntimeError(
                f"{name}: forward runs again within a backward pass (activation checkpointing) and "
                "would update the state twice: leave the loss out of the checkpointed region, or "
                "pass update_state=False"
            )
        if self.estimator == "official":
            if epoch is None:
                raise ValueError(f"{name}: epoch must be given with estimator='official'")
            unused = (image_ids, text_ids, negative_mask)
            if return_stats or any(x is not None for x in unused):
                raise ValueError(
                    f"{name}: estimator='official' has no image_ids, text_ids, negative_mask and "
                    "return_stats"
                )

    def _temperatures(self, image, text, ids):
        """Of the anchors of both sides, each ``[B]`` or one number as 0-d."""
        if self.method == "tempnet":
            return self.image_temp_gen(image.detach(), ids), self.text_temp_gen(text.detach(), ids)
        if self.method == "isogclr":
            return self.state["tau_image"][ids], self.state["tau_text"][ids]
        if self.method == "clip":
            tau = torch.exp(-self.logit_scale.clamp(max=MAX_LOGIT_SCALE)).squeeze(0)
        else:
            tau = torch.full((), self.tau, device=image.device)
        return tau, tau

    def _official(self, image, text, taus, ids, epoch, update):
        taus = [tau.expand(image.shape[0]) for tau in taus]
        state = dict(self.state.values)
        if not update:
            state = {name: value.clone() for name, value in state.items()}
        value, *k = official_contrastive(
            image, text, *taus, self.rho, self.gamma, state, ids, epoch, return_k=True
        )
        if update and self.method == "isogclr":
            self._move_table(ids, taus, k, k)
        return value

    def _move_table(self, ids, taus, ks, counted):
        """iSogCLR's step; ``counted`` is NaN at an anchor that has no term."""
        for side, tau, k, counts in zip(("image", "text"), taus, ks, counted, strict=True):
            old = self.state[f"u_{side}"][ids]
            u = torch.lerp(old, k.clamp(-ISOGCLR_CLIP, ISOGCLR_CLIP).to(old), ISOGCLR_MOMENTUM)
            u = torch.where(torch.isnan(counts), old, u)
            new = (tau - ISOGCLR_RATE * u).clamp(self.tau_min, self.tau_max)
            new = torch.where(torch.isnan(counts), tau, new)
            self.state.write(ids, **{f"u_{side}": u, f"tau_{side}": new})

    def extra_repr(self):
        options = ("num_samples", "gamma", "rho", "method", "estimator", "backend")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in options)
