"""The contrastive loss as a module that holds its state."""

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from tempnet_kernels.core.checks import (
    check_integers,
    check_reachable,
    first_outside,
    in_backward,
    radius,
)
from tempnet_kernels.core.collectives import SharesGroup
from tempnet_kernels.core.fields import accumulation_dtype
from tempnet_kernels.core.pairs import all_sum, gather, meet
from tempnet_kernels.core.register import BACKENDS, Backend
from tempnet_kernels.nn.contrastive_methods import METHODS
from tempnet_kernels.nn.per_sample_state import PerSampleState
from tempnet_kernels.nn.tempnet import TemperatureStats
from tempnet_kernels.ops.dro_contrastive import ContrastiveStats, dro_contrastive
from tempnet_kernels.ops.pair_arguments import check_features
from tempnet_kernels.reference.official import official_contrastive


class ContrastiveTemperatureStats(NamedTuple):
    """:class:`TemperatureStats` of either side."""

    image: TemperatureStats
    text: TemperatureStats


class RobustContrastiveLoss(SharesGroup, nn.Module):
    """Contrastive loss with a moving average per sample and the temperatures of one of four
    methods, all on the kernel of :func:`tempnet_kernels.dro_contrastive`.

    ========= ============================== =================================================
    method    temperatures                   loss
    ========= ============================== =================================================
    clip      one, learned                   softmax with the positive; no state, gamma and rho
    sogclr    one, fixed                     robust; rho only adds ``2 tau rho`` to the value
    isogclr   a table, by iSogCLR's rule     robust
    tempnet   predicted from the features    robust
    ========= ============================== =================================================

    Args:
        num_samples: number of pairs of the training set; the state is one float32 per sample and
            side. 0 for ``method="clip"``; and for sogclr and tempnet without a state, where every
            visit is a first one, ids are not taken, and gamma is not read.
        gamma: weight of a batch in the moving averages, in (0, 1].
        rho: KL radius >= 0 in nats; must be given for isogclr and tempnet. An anchor's temperature
            falls while the KL of its weights from uniform is below rho. The KL of n negatives is
            below log n, so that in training a rho from log(pairs - 1) of the whole batch on raises;
            choose it near the mean ``kl_image`` and ``kl_text`` of ``return_stats``.
        method: see above.
        tau: the temperature that clip, sogclr or isogclr begins with; by default 0.07, 0.07, 0.01.
            clip's stays in [0.01, 1] as open_clip's.
        tau_min, tau_max: bounds of isogclr's temperatures; by default 0.005 and 0.05.
        image_temp_gen, text_temp_gen: with "tempnet", a :class:`ContrastiveTempNet` for each side:
            modules from (features ``[B, D]``, ids ``[B]``, new_mask) to temperatures ``[B]``,
            with ``tau_min`` and ``tau_max``. The names are those of the official loss: its state
            dict, which holds the networks only, loads with ``strict=False``.
        estimator: "log" keeps the logarithm of the moving average. "official" is the official
            code's estimate in plain PyTorch, to compare with: it scales a first visit after epoch 0
            by gamma, does not recover from an underflow, and takes every other pair for a negative.
            Its forward needs ``epoch``.
        process_group: the processes that share a batch: "world", all of them where
            ``torch.distributed`` is initialised when the loss is called; None, this one alone; or a
            ``ProcessGroup``, with which the loss cannot be pickled.
        backend: as in :func:`tempnet_kernels.dro_contrastive`.

    The state is in the state dict (``state.*``), stays float32, and is not a buffer; move the loss
    with ``.to(device)``. ``eval()`` leaves it as it is. It averages sums over a batch's negatives:
    train with batches of one size (``drop_last=True``).

    With several processes, each passes its own pairs, and gets the loss of all of them: see
    ``process_group`` of :func:`tempnet_kernels.dro_contrastive` for the gradients, which suit DDP.
    Every rank must make each call, in eval mode too (or set ``loss.process_group = None`` for the
    while). Every rank holds the state of all samples and writes what the others' pairs changed. The
    state dict of one rank is that of any; load it on every rank, on any number of them: DDP, which
    hands on the weights of rank 0, does not know the state. A state that is not the same on all
    ranks raises in the first call after it was loaded, and so do parameters in every call: those of
    the networks, and clip's temperature, want DDP as the encoders do.

    Activation checkpointing must not repeat a call that updates the state. That is an error, unless
    the loss is compiled within a region that is checkpointed in eager mode: then it goes unseen.

    Source: arXiv 2404.04575; official code ``Bimodal_CL/models/losses.py``. iSogCLR: arXiv
    2305.11965. SogCLR: arXiv 2202.12387.
    """

    image_temp_gen: Any
    text_temp_gen: Any

    def __init__(
        self,
        num_samples: int,
        gamma: float = 0.8,
        rho: float | None = None,
        *,
        method: Literal["clip", "sogclr", "isogclr", "tempnet"] = "tempnet",
        tau: float | None = None,
        tau_min: float | None = None,
        tau_max: float | None = None,
        image_temp_gen: nn.Module | None = None,
        text_temp_gen: nn.Module | None = None,
        estimator: Literal["log", "official"] = "log",
        process_group: "dist.ProcessGroup | Literal['world'] | None" = "world",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        name = "RobustContrastiveLoss"
        if method not in METHODS:
            raise ValueError(f"{name}: method must be one of {tuple(METHODS)}, got {method!r}")
        if estimator not in ("log", "official"):
            raise ValueError(f"{name}: estimator must be 'log' or 'official', got {estimator!r}")
        own = METHODS[method]
        least = int(own.needs_state or estimator == "official")
        if not isinstance(num_samples, int) or num_samples < least:
            raise ValueError(
                f"{name}: num_samples must be an integer >= {least}, got {num_samples}"
            )
        if not 0 < gamma <= 1:
            raise ValueError(f"{name}: gamma must be in (0, 1], got {gamma}")
        if backend not in ("auto", *BACKENDS):
            raise ValueError(
                f"{name}: backend must be one of {('auto', *BACKENDS)}, got {backend!r}"
            )
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
        if method != "isogclr" and (tau_min, tau_max) != (None, None):
            raise ValueError(f"{name}: tau_min and tau_max go with method='isogclr'")
        if method == "tempnet" and tau is not None:
            raise ValueError(f"{name}: tau goes with the other methods than 'tempnet', got {tau}")
        tau = own.tau if tau is None else tau
        self.tau_min, self.tau_max = own.bounds(tau, tau_min, tau_max)
        if tau is not None and not self.tau_min <= tau <= self.tau_max:
            raise ValueError(
                f"{name}: tau must be in [{self.tau_min}, {self.tau_max}] for method {method!r}, "
                f"got {tau}"
            )
        self.num_samples, self.gamma = num_samples, gamma
        learner = f"method {method!r}" if own.learns else None
        self.rho = radius(name, rho, learner, "negatives")
        self.method, self.estimator, self.backend = method, estimator, backend
        self.process_group = process_group
        self.image_temp_gen, self.text_temp_gen = networks
        if own.softmax:
            state = {}
        elif estimator == "official":
            state = dict.fromkeys(("s_I", "b_I", "s_T", "b_T"), 0.0)
        else:
            state = dict.fromkeys(("log_s_image", "log_s_text"), math.nan)
        state |= own.begin(self, tau)
        self.state = PerSampleState(num_samples, state)
        self._taus = None

    def forward(
        self,
        image: torch.Tensor,
        text: torch.Tensor,
        ids: torch.Tensor | None = None,
        *,
        image_ids: torch.Tensor | None = None,
        text_ids: torch.Tensor | None = None,
        negative_mask: torch.Tensor | None = None,
        update_state: bool = True,
        logit_scale: float | torch.Tensor | None = None,
        epoch: int | None = None,
        return_stats: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, ContrastiveStats]:
        """The loss of a batch of pairs.

        Args:
            image, text: ``[B, D]`` features, normalised.
            ids: ``[B]`` integers in [0, num_samples), the pairs' places in the training set,
                checked in CPU tensors in eager mode; elsewhere one outside is read as an infinite
                average, which the loss shows at gamma < 1, and not written. Pairs with the same id
                are not negatives of each other; the last one's state is kept. clip does without; so
                do sogclr and tempnet in eval mode, where it is a first visit of all: held-out
                pairs.
            image_ids, text_ids: ``[B]`` ids of the images and of the texts where several pairs
                share one (captions of one image); default ids.
            negative_mask: ``[B, B]`` bool, False where a pair is known not to be a negative; with
                several processes its columns are the pairs of all, in the order of the ranks.
            update_state: False for a repeated call on the same batch, which also repeats the
                dropout masks. In eval mode there is no update either.
            logit_scale: clip's, of a model that has its own: 1 / tau, a positive number or tensor
                of one element, taken as it is. This module's parameter then has no gradient: set
                ``loss.logit_scale = None`` before the optimizer is made.
            epoch: what ``estimator="official"`` needs; "log" does not read it.
            return_stats: also return :class:`tempnet_kernels.ContrastiveStats`.

        Raises:
            ValueError, TypeError, IndexError: an argument is off; the message names it.
            RuntimeError: the call is repeated within a backward pass, by activation checkpointing,
                and would update the state a second time.
        """
        own = METHODS[self.method]
        update = update_state and self.training and self.num_samples > 0 and not own.softmax
        if logit_scale is not None and self.method != "clip":
            raise ValueError(
                "RobustContrastiveLoss: logit_scale goes with method='clip', "
                f"got method={self.method!r}"
            )
        self._check(image, text, ids, update, image_ids=image_ids, text_ids=text_ids)
        ids = None if ids is None else ids.long()
        if self.estimator == "official":
            options = (image_ids, text_ids, negative_mask)
            return self._official(image, text, ids, epoch, update, options, return_stats)
        image_ids = ids if image_ids is None else image_ids
        text_ids = ids if text_ids is None else text_ids
        ranks = self._meet(image, text, image_ids, text_ids, update)
        pairs = image.shape[0] if ranks is None else ranks.pairs
        self._check_rho(pairs)
        taus = self._temperatures(image, text, ids, update, logit_scale)
        visit: dict[str, Any] = {"gamma": self.gamma, "rho": self.rho}
        if own.softmax:
            visit = {"gamma": 1.0, "rho": 0.0, "include_positive": True}
        elif ids is not None:
            names = ("log_s_image", "log_s_text")
            log_s = self.state.read(names, ids, self.backend)
            visit |= dict(zip(names, log_s, strict=True))
        value, stats = dro_contrastive(
            image, text, *taus, **visit, image_ids=image_ids, text_ids=text_ids,
            negative_mask=negative_mask, return_stats=True, process_group=ranks,
            backend=self.backend,
        )  # fmt: skip
        if update:
            new = {"log_s_image": stats.log_s_image, "log_s_text": stats.log_s_text}
            if own.has_step:
                k, counted = torch.stack(stats[4:6]), torch.stack(stats[2:4])
                new |= own.step(self, ids, taus, k, counted)
            values = torch.stack(list(new.values()))
            if ranks is not None:
                ids, values = gather(ids, ranks), gather(values.T, ranks).T
            self.state.write(new, ids, values, self.backend)
        if own.softmax:
            value = value / (2 * taus[0])
            # What is left to cross entropy, log n, has no gradient.
            cross_entropy = all_sum((stats.log_s_image + stats.log_s_text).sum(), ranks) / pairs / 2
            value = value + (cross_entropy - value).detach()
        return (value, stats) if return_stats else value

    def temperature_stats(self) -> ContrastiveTemperatureStats:
        """:class:`ContrastiveTemperatureStats` of the last batch, of this rank's pairs, without
        waiting for a GPU."""
        if self._taus is None:
            raise RuntimeError("RobustContrastiveLoss: temperature_stats needs a forward first")
        networks = (self.image_temp_gen or self, self.text_temp_gen or self)
        return ContrastiveTemperatureStats(
            *(
                TemperatureStats.of(tau, x.tau_min, x.tau_max)
                for tau, x in zip(self._taus, networks, strict=True)
            )
        )

    def _check(self, image, text, ids, update, **others):
        name = "RobustContrastiveLoss"
        check_features(name, image, text)
        if text.shape != image.shape:
            raise ValueError(
                f"{name}: text must have image's shape {tuple(image.shape)}, "
                f"got {tuple(text.shape)}"
            )
        for own in self.state.initial:
            device = getattr(self.state, own).device
            if device != image.device:
                raise ValueError(
                    f"{name}: image must be on the state's {device}, got {image.device}; "
                    "move the loss with .to(device)"
                )
        own = METHODS[self.method]
        if ids is None:
            if own.needs_state or (self.training and self.num_samples and not own.softmax):
                raise ValueError(
                    f"{name}: ids must be given for method {self.method!r} with num_samples="
                    f"{self.num_samples}: the pairs' places in the training set"
                )
        elif not own.softmax and not self.num_samples:
            raise ValueError(
                f"{name}: ids go with a state, got num_samples=0: pass the number of pairs of the "
                "training set, or image_ids and text_ids if they only say which pairs are equal"
            )
        else:
            check_integers(name, "ids", ids, image.shape[:1], image.device)
            row = None if own.softmax else first_outside(ids, self.num_samples)
            if row is not None:
                raise IndexError(
                    f"{name}: ids[{row}] must be in [0, {self.num_samples}), got {int(ids[row])}"
                )
        for argument, value in others.items():
            if value is not None:
                check_integers(name, argument, value, image.shape[:1], image.device)
        if update and in_backward():
            raise RuntimeError(
                f"{name}: forward runs again within a backward pass (activation checkpointing) and "
                "would update the state twice: leave the loss out of the checkpointed region, or "
                "pass update_state=False"
            )

    def _check_rho(self, pairs):
        if self.training and METHODS[self.method].learns and pairs > 1:
            check_reachable("RobustContrastiveLoss", self.rho, pairs - 1, "negatives")

    def _meet(self, image, text, image_ids, text_ids, update):
        """The ranks that share the batch; None for one process."""
        group = self._group()
        if group is None:
            return None
        ranks = meet(
            "RobustContrastiveLoss", group, image, text, method=list(METHODS).index(self.method),
            num_samples=self.num_samples, gamma=self.gamma, rho=self.rho, update_state=update,
            ids=image_ids is not None, text_ids=text_ids is not None,
            **{
                "the state (a state dict is to be loaded on every rank)": self.state.fingerprint,
                "the sum of the parameters (wrap the loss in DistributedDataParallel)":
                    self._sum_of_parameters,
            },
        )  # fmt: skip
        if ranks is not None:
            self.state.in_step = True
        return ranks

    @torch.no_grad()
    def _sum_of_parameters(self):
        """Differs where ranks train parameters apart; 0 where FSDP shares them out, which keeps
        them in step."""
        from torch.distributed.fsdp import FullyShardedDataParallel
        from torch.distributed.tensor import DTensor

        parameters = list(self.parameters())
        if any(isinstance(m, FullyShardedDataParallel) for m in self.modules()) or any(
            isinstance(p, DTensor) for p in parameters
        ):
            return 0
        total = sum(p.sum(dtype=torch.float64) for p in parameters)
        return torch.as_tensor(total).nan_to_num()  # NaN differs from itself

    def _group(self):
        if self.process_group != "world":
            return self.process_group
        return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None

    def _temperatures(self, image, text, ids, update, logit_scale=None):
        own = METHODS[self.method]
        taus = own.temperatures(self, image, text, ids, update, logit_scale)
        self._taus = tuple(tau.detach() for tau in taus)
        return taus

    def _official(self, image, text, ids, epoch, update, options, return_stats):
        name = "RobustContrastiveLoss: estimator='official'"
        if epoch is None or ids is None or image.shape[0] < 2:
            raise ValueError(f"{name} needs ids, epoch and at least two pairs")
        if return_stats or any(x is not None for x in options):
            raise ValueError(f"{name} has no image_ids, text_ids, negative_mask and return_stats")
        group = self._group()
        if group is not None and group.size() > 1:
            raise ValueError(
                f"{name} is of one process, got {group.size()}: gather the batch in each of them "
                "and pass process_group=None"
            )
        self._check_rho(image.shape[0])
        taus = self._temperatures(image, text, ids, update)
        acc = accumulation_dtype(image.dtype)
        state = {own: getattr(self.state, own) for own in self.state.initial}
        if not update:
            state = {own: value.clone() for own, value in state.items()}
        taus = [tau.to(acc).expand(image.shape[0]) for tau in taus]
        with torch.autocast(image.device.type, enabled=False):
            value, *k = official_contrastive(
                image.to(acc), text.to(acc), *taus, self.rho, self.gamma, state, ids, epoch,
                return_k=True,
            )  # fmt: skip
        own = METHODS[self.method]
        if update and own.has_step:
            k = torch.stack(k)
            new = own.step(self, ids, taus, k, k)
            self.state.write(new, ids, torch.stack(list(new.values())), self.backend)
        return value

    def extra_repr(self) -> str:
        options = ("num_samples", "gamma", "rho", "method", "estimator", "backend")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in options)
