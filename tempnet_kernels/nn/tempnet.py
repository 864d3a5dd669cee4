"""The temperature network for language models."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from tempnet_kernels.core import register
from tempnet_kernels.core.checks import (
    check_like,
    check_rows,
    temperature_bounds,
    unit_columns,
)
from tempnet_kernels.core.collectives import SharesGroup, all_gather, several, sum_over_ranks
from tempnet_kernels.core.fields import accumulation_dtype
from tempnet_kernels.core.tempnet import Head, row_scaling
from tempnet_kernels.ops.temperature_head import after_first_layer, backend_for

# Where the published checkpoints keep the TempNet inside a full model's state dict.
PREFIXES = ("module.tempnet.", "tempnet.")


class TemperatureStats(NamedTuple):
    """Statistics of a batch's temperatures over the rows that are not ignored: detached 0-d
    tensors."""

    mean: torch.Tensor
    min: torch.Tensor
    max: torch.Tensor
    at_min: torch.Tensor  # share of rows within 1 % of the range of tau_min
    at_max: torch.Tensor  # share of rows within 1 % of the range of tau_max

    @classmethod
    def of(
        cls, tau: torch.Tensor, low: float, high: float, live: torch.Tensor | None = None
    ) -> "TemperatureStats":
        """Of temperatures in [low, high], where ``live`` is true; of none NaN."""
        if not tau.numel():
            return cls(*tau.new_full((5,), math.nan).unbind())
        live = torch.ones_like(tau, dtype=torch.bool) if live is None else live
        margin = 0.01 * (high - low)
        n = live.sum()
        return cls(
            mean=torch.where(live, tau, 0).sum() / n,
            min=torch.where(live, tau, torch.inf).amin(),
            max=torch.where(live, tau, -torch.inf).amax(),
            at_min=(live & (tau <= low + margin)).sum() / n,
            at_max=(live & (tau >= high - margin)).sum() / n,
        )

    def floats(self) -> dict[str, float]:
        """{name: number}, for which a GPU is waited for once."""
        return dict(zip(self._fields, torch.stack(self).tolist(), strict=True))


class TempNet(SharesGroup, nn.Module):
    r"""Predicts a temperature for every row of logits.

    With ``x = z / max(||z||, 1e-12)`` and ``h = proj(x)`` (a sigmoid layer, dropout, a linear
    layer):

        w   = softmax(h / exp(scaler))
        tau = tau_min + (tau_max - tau_min) * sigmoid(last((w - 1/hidden_size) * h))

    The logits are detached: the network learns from the temperature's gradient alone. A -inf logit
    counts as 0 after centring, so every temperature is finite where some logit of the row is.

    Args:
        vocab_size: V, the number of columns of the logits.
        tau_min, tau_max: bounds of the temperature, 0 < tau_min < tau_max.
        hidden_size: width of both layers; the published checkpoints have 256.
        center: ``"max"`` subtracts each row's largest logit first (LLaMA-2, and generation);
            ``None`` takes raw logits.
        dropout: probability, in training mode.

    The state dict has the published names: ``proj.0``, ``proj.3``, ``last``, ``scaler``.
    ``load_state_dict`` also takes the full state dict of a model that holds one under ``tempnet.``
    or ``module.tempnet.``, a scaler of shape ``()`` or ``[1]``, and any float dtype.

    It has no second derivative, no ``torch.func.vmap`` and no forward mode. Where neither the
    kernels nor Triton is there it is computed by plain PyTorch.

    Source: arXiv 2404.04575; official code ``GPT-2/megatron/model/tempnet.py``.
    """

    proj: Any  # layers, whose attributes a type checker does not find in an nn.Sequential
    process_group: "dist.ProcessGroup | None"

    def __init__(
        self,
        vocab_size: int,
        tau_min: float = 0.5,
        tau_max: float = 2.0,
        *,
        hidden_size: int = 256,
        center: Literal["max"] | None = None,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        if vocab_size < 1:
            raise ValueError(f"TempNet: vocab_size must be >= 1, got {vocab_size}")
        temperature_bounds("TempNet", tau_min, tau_max)
        if not 0 <= dropout < 1:
            raise ValueError(f"TempNet: dropout must be in [0, 1), got {dropout}")
        if center not in (None, "max"):
            raise ValueError(f"TempNet: center must be None or 'max', got {center!r}")
        self.vocab_size = vocab_size
        self.tau_min = tau_min
        self.tau_max = tau_max
        self.center = center
        self.process_group = None
        self.proj = nn.Sequential(
            nn.Linear(vocab_size, hidden_size),
            nn.Sigmoid(),
            nn.Dropout(dropout),
            nn.Linear(hidden_size, hidden_size),
        )
        self.scaler = nn.Parameter(torch.zeros(1))  # log 1; not 0-d, which FSDP2 refuses
        self.last = nn.Linear(hidden_size, 1)
        nn.init.ones_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        self.register_load_state_dict_pre_hook(_accept_published_layouts)

    def shard(self, process_group: "dist.ProcessGroup") -> "TempNet":
        """Leave this rank its columns of the first layer, for logits whose columns the ranks of
        ``process_group`` share; see :func:`tempnet_kernels.dro_cross_entropy`. Returns self.

        Call it on every rank once the network is loaded and on the device of the ranks' collectives
        (with NCCL its GPU), before the optimizer is made. The other
        parameters become those of the first rank, and their gradients are equal on every rank; a
        norm to clip by must be one of all ranks, or they drift apart. ``proj.0.weight`` is then
        ``[hidden_size, V / world_size]``, in the state dict too.
        """
        if self.process_group is not None:
            raise RuntimeError("TempNet: shard was called before")
        group = several("TempNet.shard", process_group)
        if group is None:
            return self
        if self.vocab_size % group.size():
            raise ValueError(
                f"TempNet: vocab_size must be a multiple of the {group.size()} ranks of "
                f"process_group, got {self.vocab_size}"
            )
        first = self.proj[0]
        own = first.weight.detach().chunk(group.size(), 1)[group.rank()].clone()
        with torch.no_grad():
            for p in self.parameters():
                if p is not first.weight:
                    p.copy_(all_gather(p, group)[0])
        first.weight = nn.Parameter(own, requires_grad=first.weight.requires_grad)
        first.in_features = own.shape[1]
        self.process_group = group
        return self

    def forward(
        self,
        logits: torch.Tensor | None = None,
        *,
        ignored: torch.Tensor | None = None,
        inside: Callable[["TempNet"], Any] | None = None,
    ) -> Any:
        """logits ``[..., V]`` of a float dtype, of a sharded network this rank's columns ->
        temperatures ``[...]`` in float32 (float64 for a float64 network).

        ignored: ``[...]`` bool, the rows that do not count, whose logits may be anything, NaN too:
        they have the temperature of a row of zeros, and add nothing to a gradient.
        inside: of :meth:`within`.
        """
        if inside is not None:
            return inside(self)
        check_rows("TempNet", "logits", logits)
        assert logits is not None  # for a type checker
        v = self.proj[0].in_features
        if logits.shape[-1] != v:
            raise ValueError(
                f"TempNet: logits must have {v} columns, got shape {tuple(logits.shape)}"
            )
        if ignored is not None:
            if not isinstance(ignored, torch.Tensor) or ignored.dtype != torch.bool:
                kind = getattr(ignored, "dtype", type(ignored).__name__)
                raise TypeError(f"TempNet: ignored must be a bool tensor, got {kind}")
            check_like("TempNet", "ignored", ignored, tuple(logits.shape[:-1]), logits.device)
        dtype = self.proj[0].weight.dtype
        # In float32 for 16-bit logits: the square of a logit above 256 overflows float16.
        acc = torch.promote_types(accumulation_dtype(logits.dtype), dtype)
        z = unit_columns(logits.detach().reshape(-1, v))  # (N, V)
        if acc == torch.float64:
            z = z.to(acc)
        backend = backend_for(z.device, acc)
        shift, inverse = row_scaling(backend, z, self.center == "max", 0.0, self.process_group)
        if ignored is not None:
            inverse = torch.where(ignored.reshape(-1), -1, inverse)
        x = register.operator("normalized_rows", backend)(z, shift, inverse, 0.0)
        acc = accumulation_dtype(dtype)
        pre = F.linear(x.to(dtype), self.proj[0].weight).to(acc)  # (N, hidden_size)
        if self.process_group is not None:
            pre = sum_over_ranks(pre, self.process_group)
        key = self.dropout_key(z.device)
        bounds = self.tau_min, self.tau_max
        with torch.autocast(pre.device.type, enabled=False):
            tau = after_first_layer(
                pre, self.head(acc), key, self.dropout_probability(key), bounds, backend
            )
        return tau.view(logits.shape[:-1])

    def head(self, dtype: torch.dtype) -> Head:
        """The parameters after the first layer's weight."""
        parameters = (
            self.proj[0].bias, self.proj[3].weight, self.proj[3].bias, self.scaler,
            self.last.weight, self.last.bias,
        )  # fmt: skip
        return Head(*(p.to(dtype) for p in parameters))

    def kernel_parameters(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """What an operator takes: the first layer's weight as it is, the others in ``dtype``."""
        return [self.proj[0].weight, *self.head(dtype)]

    def within(self, function: Callable[["TempNet"], Any]) -> Any:
        """``function(network)`` while the parameters are there: FSDP gathers them for the duration
        of a forward only."""
        return self(inside=function)

    def dropout_key(self, device: torch.device) -> torch.Tensor | None:
        """What the dropout mask of every row and column is a function of, 0-d int64, the same on
        every rank; None where dropout is off."""
        if not self.training or self.proj[2].p == 0:
            return None
        # A key is drawn, not a seed, which the host would wait for.
        key = torch.randint(1 << 62, (), device=device)
        return key if self.process_group is None else all_gather(key, self.process_group)[0]

    def dropout_probability(self, key: torch.Tensor | None) -> float:
        return 0.0 if key is None else self.proj[2].p

    def extra_repr(self) -> str:
        bounds = f"tau=[{self.tau_min}, {self.tau_max}]"
        return f"vocab_size={self.vocab_size}, {bounds}, center={self.center!r}"


def _accept_published_layouts(module, state_dict, prefix, *_):
    if prefix == "" and not any(key in state_dict for key in module.state_dict()):
        for candidate in PREFIXES:
            own = {
                key.removeprefix(candidate): state_dict[key]
                for key in list(state_dict)
                if key.startswith(candidate)
            }
            if own:
                # The rest of a full model's state dict is not this module's business.
                state_dict.clear()
                state_dict.update(own)
                break
    reshape_scalar(state_dict, prefix + "scaler")


def reshape_scalar(state_dict, name):
    """The official scaler, and open_clip's, is 0-d."""
    scalar = state_dict.get(name)
    if scalar is not None and scalar.dim() == 0:
        state_dict[name] = scalar.reshape(1)
