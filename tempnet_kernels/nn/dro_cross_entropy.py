"""The token loss as modules."""

import inspect
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from tempnet_kernels.chunked.dro_cross_entropy import columns_of
from tempnet_kernels.core.checks import check_reachable, radius
from tempnet_kernels.core.collectives import SharesGroup
from tempnet_kernels.core.fields import accumulation_dtype
from tempnet_kernels.core.register import Backend
from tempnet_kernels.core.softcap import capped, check_softcap
from tempnet_kernels.nn.tempnet import TemperatureStats, TempNet
from tempnet_kernels.ops.dro_cross_entropy import dro_cross_entropy
from tempnet_kernels.ops.linear_dro_cross_entropy import loss_and_temperatures
from tempnet_kernels.ops.token_rows import Reduction, TokenStats, check_arguments


class DROCrossEntropyLoss(SharesGroup, nn.Module):
    """Module form of :func:`tempnet_kernels.dro_cross_entropy`; the options are its keywords.
    ``rho`` may be left out where no temperature learns.

    With a ``process_group`` the loss cannot be pickled, and its copies share the group.
    """

    def __init__(
        self,
        rho: float | None = None,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        reduction: Reduction = "mean",
        return_stats: bool = False,
        overwrite_logits: bool = False,
        process_group: "dist.ProcessGroup | None" = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        if rho is not None:
            rho = radius("DROCrossEntropyLoss", rho)
        check_softcap("DROCrossEntropyLoss", softcap)
        self.rho = rho
        self.process_group = process_group
        self.options: dict[str, Any] = {
            "ignore_index": ignore_index,
            "label_smoothing": label_smoothing,
            "z_loss": z_loss,
            "softcap": softcap,
            "reduction": reduction,
            "return_stats": return_stats,
            "overwrite_logits": overwrite_logits,
            "backend": backend,
        }

    def forward(
        self,
        logits: torch.Tensor,
        target: torch.Tensor,
        tau: float | torch.Tensor = 1.0,
        *,
        row_weight: torch.Tensor | None = None,
        normalizer: float | torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, TokenStats]:
        """As :func:`tempnet_kernels.dro_cross_entropy`."""
        return dro_cross_entropy(
            logits,
            target,
            tau,
            self.rho,
            row_weight=row_weight,
            normalizer=normalizer,
            process_group=self.process_group,
            **self.options,
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in {"rho": self.rho, **self.options}.items())


# Where DDP and FSDP, torch.compile, and a wrapper for checkpoints keep what they wrap.
_WRAPPED = ("module", "_orig_mod", "_checkpoint_wrapped_module")


def _layers(tempnet):
    """``tempnet`` and what it wraps, from the outside in."""
    layers = [tempnet]
    while not isinstance(layers[-1], TempNet):
        within = [getattr(layers[-1], name, None) for name in _WRAPPED]
        within = [x for x in within if isinstance(x, nn.Module)]
        if not within:
            break
        layers.append(within[0])
    return layers


def _takes_ignored(tempnet):
    """Whether every layer passes the keyword of :meth:`TempNet.forward` on to one."""
    layers = _layers(tempnet)
    every = [inspect.signature(x.forward).parameters for x in layers]
    passed = all(
        "ignored" in names or any(x.kind is x.VAR_KEYWORD for x in names.values())
        for names in every
    )
    return passed and isinstance(layers[-1], TempNet)


class _PredictedTemperatures(nn.Module):
    """Holds the TempNet, so that an optimizer, DDP and a checkpoint of this module see its
    parameters, and the temperatures of the last batch."""

    tempnet: Any  # an nn.Module, maybe wrapped in one
    options: dict[str, Any]  # of the loss function

    def __init__(self, tempnet: nn.Module, rho: float) -> None:
        super().__init__()
        name = type(self).__name__
        if not isinstance(tempnet, nn.Module):
            raise TypeError(
                f"{name}: tempnet must be a module from logits [..., V] to temperatures [...], as "
                f"tempnet_kernels.nn.TempNet(vocab_size) is, got {type(tempnet).__name__}"
            )
        self.tempnet = tempnet
        self._takes_ignored = _takes_ignored(tempnet)
        self.rho = radius(name, rho, "a tempnet")
        # At once, where the network says its size; and in every forward, since rho may be changed.
        vocab_size = self._of_network("vocab_size")
        if vocab_size is not None:
            check_reachable(name, self.rho, vocab_size, "columns")
        self._tau = None
        self._ignored = None

    def _of_network(self, attribute):
        """That of the network, or else of the innermost wrapper that has one; None without any."""
        for layer in reversed(_layers(self.tempnet)):
            if hasattr(layer, attribute):
                return getattr(layer, attribute)
        return None

    def _check_rho(self, columns):
        """Of this rank's number of columns."""
        vocab_size = columns_of(columns, self.process_group)[1]
        check_reachable(type(self).__name__, self.rho, vocab_size, "columns")

    def _predict(self, logits, target, ignore_index):
        name = type(self).__name__
        check_arguments(name, logits, target, None, None, 0.0, 0.0, "mean")
        self._ignored = target == ignore_index
        # What is in an ignored row must not reach the network's gradient, not even as 0 * NaN.
        if self._takes_ignored:
            tau = self.tempnet(logits, ignored=self._ignored)
        else:
            tau = self.tempnet(logits.masked_fill(self._ignored[..., None], 0))
        self._tau = tau.detach()
        return tau

    @property
    def process_group(self) -> "dist.ProcessGroup | None":
        """That of ``tempnet.shard``. DDP and FSDP have one of that name, which is another."""
        network = _layers(self.tempnet)[-1]
        return network.process_group if isinstance(network, TempNet) else None

    def temperature_stats(self) -> TemperatureStats:
        """:class:`TemperatureStats` of the last batch, without waiting for a GPU."""
        if self._tau is None:
            name = type(self).__name__
            raise RuntimeError(f"{name}: temperature_stats needs a forward first")
        low, high = self._of_network("tau_min"), self._of_network("tau_max")
        return TemperatureStats.of(self._tau, low, high, ~self._ignored)

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in {"rho": self.rho, **self.options}.items())


class TempNetCrossEntropyLoss(_PredictedTemperatures):
    """Token loss at the temperatures that ``tempnet`` predicts from the detached logits.

    Holds the TempNet's parameters. The gradient of the logits is that of the loss at these
    temperatures; the TempNet learns from d loss / d tau = rho - KL.

    Args:
        tempnet: a module from logits ``[..., V]`` to temperatures ``[...]``, with ``tau_min`` and
            ``tau_max``. Ignored rows may hold anything, NaN too; one that is no :class:`TempNet`,
            nor wraps one, is given a copy of the logits with zeros there.
        rho: KL radius >= 0 in nats: a temperature falls while its row's KL is below it. The KL of
            V columns is below log V, so that rho must be, too; choose it near the mean ``kl`` of
            ``return_stats``.
        options: the keywords of :class:`DROCrossEntropyLoss` but ``process_group``, which is that
            of ``tempnet.shard``. With ``softcap`` the tempnet sees the capped logits, rounded to
            the dtype of those given.
    """

    def __init__(self, tempnet: nn.Module, rho: float, **options: Any) -> None:
        super().__init__(tempnet, rho)
        if "process_group" in options:
            raise ValueError(
                "TempNetCrossEntropyLoss: process_group is that of the tempnet, set by "
                "tempnet.shard(process_group)"
            )
        self.options = DROCrossEntropyLoss(rho, **options).options

    def forward(
        self,
        logits: torch.Tensor,
        target: torch.Tensor,
        *,
        row_weight: torch.Tensor | None = None,
        normalizer: float | torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, TokenStats]:
        """logits ``[..., V]``, target ``[...]`` -> the loss, or ``(loss, TokenStats)`` with
        ``return_stats``."""
        self._check_rho(logits.shape[-1])
        seen = logits.detach()
        if self.options["softcap"]:
            wide = seen.to(accumulation_dtype(seen.dtype))
            seen = capped(wide, self.options["softcap"]).to(seen.dtype)
        tau = self._predict(seen, target, self.options["ignore_index"])
        return dro_cross_entropy(
            logits, target, tau, self.rho, row_weight=row_weight, normalizer=normalizer,
            process_group=self.process_group, **self.options,
        )  # fmt: skip


class TempNetCausalLMLoss(_PredictedTemperatures):
    """Next-token loss of a causal language model, as a trainer of Hugging Face calls it.

    Position t is scored on label t + 1, and the sum of the losses is divided by the number of
    tokens of the whole batch, over all its micro-batches and ranks, where the trainer gives it.
    With ``weight`` the inputs are hidden states and the logits are never held
    (:func:`tempnet_kernels.linear_dro_cross_entropy`); without, they are logits.

    Args:
        tempnet: a :class:`TempNet` for V columns. Its parameters are this module's. Of a sharded
            one the ``process_group`` is used: weight, bias or logits are then the rank's columns.
        rho: KL radius in nats, in [0, log V).
        ignore_index: the label of tokens that do not count.
        label_smoothing, z_loss, backend: as in :func:`tempnet_kernels.dro_cross_entropy`.
        softcap, chunk_rows: as in :func:`tempnet_kernels.linear_dro_cross_entropy`; logits come
            capped, from the model.
    """

    def __init__(
        self,
        tempnet: nn.Module,
        rho: float,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        chunk_rows: int | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(tempnet, rho)
        check_softcap("TempNetCausalLMLoss", softcap)
        self.softcap = softcap
        self.chunk_rows = chunk_rows
        self.options: dict[str, Any] = {
            "ignore_index": ignore_index,
            "label_smoothing": label_smoothing,
            "z_loss": z_loss,
            "backend": backend,
        }

    def forward(
        self,
        inputs: torch.Tensor,
        labels: torch.Tensor | None,
        num_items_in_batch: float | torch.Tensor | None = None,
        *,
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        shift_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """inputs: hidden states ``[..., T, D]`` with ``weight [V, D]`` (and ``bias [V]``), or
        logits ``[..., T, V]``. labels ``[..., T]``, not shifted; or ``shift_labels`` of that shape,
        shifted already, and then ``labels`` is not read. num_items_in_batch: the number to divide
        by, a number or 0-d tensor; default: the labels that count here. Returns the loss, 0-d."""
        ignore_index = self.options["ignore_index"]
        target = shift_labels
        if target is None:
            if labels is None:
                raise TypeError("TempNetCausalLMLoss: labels or shift_labels must be given")
            target = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        # A model whose layers are on several devices has its labels on the first.
        target = target.to(inputs.device)
        normalizer = num_items_in_batch
        if isinstance(normalizer, torch.Tensor):
            normalizer = normalizer.to(inputs.device)
        elif normalizer is not None and not normalizer > 0:
            raise ValueError(
                "TempNetCausalLMLoss: num_items_in_batch must be > 0, the number of labels that "
                f"count in all micro-batches and ranks, got {normalizer}: leave out a batch of "
                "which every label is ignored"
            )
        options = {"rho": self.rho, "normalizer": normalizer, **self.options}
        options["process_group"] = self.process_group
        if weight is None:
            self._check_logits(inputs)
            self._check_rho(inputs.shape[-1])
            tau = self._predict(inputs.detach(), target, ignore_index)
            loss = dro_cross_entropy(inputs, target, tau, **options)
        else:
            loss, tau = loss_and_temperatures(
                inputs, weight, target, self.tempnet, bias=bias, softcap=self.softcap,
                chunk_rows=self.chunk_rows, **options,
            )  # fmt: skip
            self._tau, self._ignored = tau.detach(), target == ignore_index
        return loss

    def _check_logits(self, inputs):
        network = _layers(self.tempnet)[-1]
        if isinstance(network, TempNet) and inputs.shape[-1] != network.proj[0].in_features:
            raise ValueError(
                f"TempNetCausalLMLoss: inputs must be logits of {network.proj[0].in_features} "
                f"columns, got shape {tuple(inputs.shape)}; of hidden states pass weight=, that of "
                "the model's output layer"
            )

    def extra_repr(self) -> str:
        options = {"rho": self.rho, **self.options, "softcap": self.softcap}
        return ", ".join(f"{k}={v!r}" for k, v in options.items())
