"""torchtitan's language models trained with a TempNet."""

import dataclasses
from dataclasses import dataclass

import spmd_types as spmd
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torchtitan.components.loss import IGNORE_INDEX, BaseLoss
from torchtitan.models.common.decoder_sharding import dense_param_placement
from torchtitan.models.common.linear import Linear
from torchtitan.protocols.model import ModelConfigConverter
from torchtitan.protocols.module import Module, Sequential
from torchtitan.protocols.sharding import ShardingConfig

from tempnet_kernels.dro_cross_entropy import dro_cross_entropy
from tempnet_kernels.nn import TempNet

__all__ = ["TempNetConverter", "TempNetLMHead", "TempNetLoss", "TempNetModule"]


def _replicated(*names):
    """What torchtitan wants to know of parameters that only FSDP splits."""
    return ShardingConfig(state_shardings={x: dense_param_placement(tp=spmd.R) for x in names})


def _linear(in_features, out_features, param_init=None):
    return Linear.Config(
        in_features=in_features, out_features=out_features, bias=True, param_init=param_init,
        sharding_config=_replicated("weight", "bias"),
    ).build()  # fmt: skip


class _Sigmoid(nn.Sigmoid, Module):
    pass


class _Dropout(nn.Dropout, Module):
    pass


class TempNetModule(TempNet, Module):
    """:class:`tempnet_kernels.nn.TempNet` under torchtitan's Module protocol, which builds it on
    the meta device. Its parameters have the published names."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        vocab_size: int
        tau_min: float
        tau_max: float
        hidden_size: int = 256
        center: str | None = None
        dropout: float = 0.5

    def __init__(self, config: Config):
        super().__init__(
            config.vocab_size, config.tau_min, config.tau_max, hidden_size=config.hidden_size,
            center=config.center, dropout=config.dropout,
        )  # fmt: skip
        h = config.hidden_size
        self.proj = Sequential(
            _linear(config.vocab_size, h), _Sigmoid(), _Dropout(config.dropout), _linear(h, h)
        )
        self.last = _linear(h, 1, {"weight": nn.init.ones_, "bias": nn.init.zeros_})
        self._sharding_config = _replicated("scaler")

    def reset_parameters(self):
        """Of torchtitan's ``init_states``; the layers have their own."""
        nn.init.zeros_(self.scaler)


class TempNetLMHead(Linear):
    """An LM head that holds a TempNet and returns ``(logits, tau)``.

    The temperatures are predicted within its forward, where FSDP has gathered the parameters.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Linear.Config):
        tempnet: TempNetModule.Config

    def __init__(self, config: Config):
        super().__init__(config)
        self.tempnet = config.tempnet.build()

    def parallelize(self, parallel_dims):
        """As torchtitan's, which it is without tensor parallelism."""
        if parallel_dims.tp > 1 or parallel_dims.spmd_backend == "full_dtensor":
            raise ValueError(
                "TempNetLMHead: the head cannot be split by tensor parallelism, got "
                f"tensor_parallel_degree {parallel_dims.tp} and spmd_backend "
                f"{parallel_dims.spmd_backend!r}: set parallelism.tensor_parallel_degree to 1 "
                "(FSDP and context parallelism stay) and spmd_backend to 'partial_dtensor' or "
                "'spmd_types'"
            )
        super().parallelize(parallel_dims)

    def forward(self, input):
        """Hidden states ``[B, T, D]`` -> logits ``[B, T, V]`` and temperatures ``[B, T]``."""
        logits = super().forward(input)
        return logits, self.tempnet(logits)


class TempNetConverter(ModelConfigConverter):
    """Gives a model's LM head a TempNet, as one of the ``converters`` of a ``model_registry``.

    The TempNet is then a part of the model, ``lm_head.tempnet``: the optimizers, FSDP and the
    checkpoints have its parameters, and the model returns ``(logits, tau)``.

    Config:
        tau_min, tau_max, hidden_size, center, dropout: as in :class:`TempNet`.

    Raises:
        ValueError: the model's config has no ``lm_head``, or one that another converter changed.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ModelConfigConverter.Config):
        tau_min: float
        tau_max: float
        hidden_size: int = 256
        center: str | None = None
        dropout: float = 0.5

    def __init__(self, config: Config):
        self.config = config

    def convert(self, model_config):
        """A copy of ``model_config`` with the TempNet."""
        head = getattr(model_config, "lm_head", None)
        if type(head) is not Linear.Config:
            raise ValueError(
                "TempNetConverter: the model's config must have an lm_head that is a "
                f"Linear.Config, got {type(head).__qualname__}: leave lm_head out of the other "
                "converters (LoRA's target_modules, the quantisers' filter)"
            )
        options = {f.name: getattr(self.config, f.name) for f in dataclasses.fields(self.config)}
        tempnet = TempNetModule.Config(vocab_size=head.out_features, **options)
        own = {f.name: getattr(head, f.name) for f in dataclasses.fields(head)}
        return dataclasses.replace(
            model_config, lm_head=TempNetLMHead.Config(**own, tempnet=tempnet)
        )


class TempNetLoss(BaseLoss):
    """The token loss at the TempNet's temperatures, in place of ``CrossEntropyLoss``; also within
    ``ChunkedLossWrapper``, which then never holds all logits.

    Config:
        rho: KL radius in nats.
        label_smoothing, z_loss, backend: as in :func:`tempnet_kernels.dro_cross_entropy`.

    The metrics ``tau/mean``, ``tau/min`` and ``tau/max`` are over the tokens that count; the mean's
    sum is divided by ``global_valid_tokens``, so that those of chunks and ranks add up.

    Source: arXiv 2404.04575; torchtitan 0.3.0, ``components/loss.py``.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        rho: float
        label_smoothing: float = 0.0
        z_loss: float = 0.0
        backend: str = "auto"

    def __init__(self, config: Config, *, compile_config=None):
        options = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}

        def summed(logits, tau, labels):
            return dro_cross_entropy(
                logits, labels, tau, ignore_index=IGNORE_INDEX, reduction="sum", **options
            )

        self.fn = summed
        self._maybe_compile(compile_config)

    def __call__(self, pred, labels, global_valid_tokens=None, **kwargs):
        """pred: ``(logits [B, T, V], tau [B, T])``, of a :class:`TempNetLMHead`; labels ``[B, T]``.
        Returns the sum of the tokens' losses, divided by ``global_valid_tokens`` if given, and the
        metrics."""
        if not isinstance(pred, tuple) or len(pred) != 2:
            raise ValueError(
                "TempNetLoss: pred must be (logits, tau), got "
                f"{type(pred).__name__}: build the model with "
                "model_registry(..., converters=[TempNetConverter.Config(tau_min=..., "
                "tau_max=...)])"
            )
        logits, tau = pred
        if isinstance(logits, DTensor):
            raise ValueError(
                f"TempNetLoss: logits must be a plain tensor, got a DTensor of {logits.placements}:"
                " set parallelism.tensor_parallel_degree to 1 and spmd_backend to "
                "'partial_dtensor' or 'spmd_types'"
            )
        loss = self.fn(logits, tau, labels)
        tau, live = tau.detach(), labels != IGNORE_INDEX
        count = live.sum() if global_valid_tokens is None else global_valid_tokens
        metrics = {
            "tau/mean": torch.where(live, tau, 0).sum() / count,
            "tau/min": torch.where(live, tau, torch.inf).amin(),
            "tau/max": torch.where(live, tau, -torch.inf).amax(),
        }
        return loss if global_valid_tokens is None else loss / global_valid_tokens, metrics
