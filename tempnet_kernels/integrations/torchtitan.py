"""torchtitan: a TempNet in the language model's head, and the loss that trains both."""

import copy
import dataclasses
from dataclasses import dataclass
from functools import partial

import spmd_types as spmd
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torchtitan.components.lora import LoRAConverter
from torchtitan.components.loss import IGNORE_INDEX, BaseLoss, ChunkedLossWrapper
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import ParamGroupConfig
from torchtitan.models.common.decoder_sharding import dense_param_placement
from torchtitan.models.common.linear import Linear
from torchtitan.protocols.module import Module, Sequential
from torchtitan.protocols.sharding import ShardingConfig

from tempnet_kernels.core.checks import check_reachable, radius
from tempnet_kernels.nn import TemperatureStats, TempNet
from tempnet_kernels.ops.linear_dro_cross_entropy import loss_and_temperatures

SETTINGS = ("tau_min", "tau_max", "hidden_size", "center", "dropout")
NAMES = "lm_head.tempnet."  # of the TempNet's parameters in the model


class TitanTempNet(TempNet, Module):
    """:class:`tempnet_kernels.nn.TempNet` whose parts torchtitan can initialise and shard."""

    def __init__(self, config):
        v, h = config.out_features, config.hidden_size
        super().__init__(v, **{name: getattr(config, name) for name in SETTINGS})
        replicated = dense_param_placement(tp=spmd.R)
        self._param_init = {"scaler": nn.init.zeros_}
        self._sharding_config = ShardingConfig(state_shardings={"scaler": replicated})
        ones = {"weight": nn.init.ones_, "bias": nn.init.zeros_}
        columns = dense_param_placement(tp=spmd.S(1))
        self.proj = Sequential(
            _linear(v, h, columns), _Sigmoid(), _Dropout(config.dropout), _linear(h, h, replicated)
        )
        self.last = _linear(h, 1, replicated, ones)

    def parallelize(self, parallel_dims):
        super().parallelize(parallel_dims)
        if parallel_dims.tp_enabled:
            if self.vocab_size % parallel_dims.tp:
                raise ValueError(
                    f"add_tempnet: the vocabulary ({self.vocab_size}) must be a multiple of "
                    f"parallelism.tensor_parallel_degree ({parallel_dims.tp}): pad it"
                )
            self.process_group = parallel_dims.get_mesh("tp").get_group()


class _Sigmoid(nn.Sigmoid, Module):
    pass


class _Dropout(nn.Dropout, Module):
    pass


def _linear(in_features, out_features, placement, param_init=None):
    """Initialised as nn.Linear, whose reset_parameters would take the width of a shard for D."""
    bound = in_features**-0.5
    uniform = partial(nn.init.uniform_, a=-bound, b=bound)
    shardings = {"weight": placement, "bias": dense_param_placement(tp=spmd.R)}
    return Linear.Config(
        in_features=in_features, out_features=out_features, bias=True,
        param_init=param_init or {"weight": uniform, "bias": uniform},
        sharding_config=ShardingConfig(state_shardings=shardings),
    ).build()  # fmt: skip


class TempNetLinear(Linear):
    """The head of a model with a TempNet: ``lm_head.tempnet``. :func:`add_tempnet` puts it there.

    FSDP, the checkpoint, the optimizer and the last pipeline stage take the TempNet with the head.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Linear.Config):
        tau_min: float = 0.5
        tau_max: float = 2.0
        hidden_size: int = 256
        center: str | None = None
        dropout: float = 0.5

    def __init__(self, config):
        super().__init__(config)
        self.tempnet = TitanTempNet(config)
        self._last = None

    def forward(self, input, labels=None, **options):
        """input ``[B, L, D]`` -> logits ``[B, L, V]``; with ``labels [B, L]`` the loss, 0-d, and
        temperatures ``[B, L]``, without logits."""
        if labels is None:
            if self.training and torch.is_grad_enabled():
                raise RuntimeError(
                    "TempNetLinear: the model is trained without its TempNet: set config.loss to "
                    "TempNetLoss.Config(rho=...), or train a model without add_tempnet"
                )
            return super().forward(input)
        if isinstance(labels, DTensor):
            raise ValueError(
                "TempNetLoss: labels must be a plain tensor, got a DTensor: set "
                "parallelism.spmd_backend to 'spmd_types' or 'partial_dtensor', not 'full_dtensor'"
            )
        hidden, weight, bias = _local(input), _local(self.weight), _local(self.bias)
        call = partial(
            loss_and_temperatures, hidden, weight, labels, bias=bias,
            process_group=self.tempnet.process_group, ignore_index=IGNORE_INDEX, **options,
        )  # fmt: skip
        with spmd.no_typecheck():
            if isinstance(self.weight, DTensor):
                local = {name: _local(p) for name, p in self.tempnet.named_parameters()}
                inside = {"inside": call}
                loss, tau = torch.func.functional_call(self.tempnet, local, (), inside)
            else:
                loss, tau = call(self.tempnet)
        tau = tau.detach()
        self._last = tau, labels
        # A pair: a single tensor would be taken for logits, whose columns are sharded.
        return loss, tau

    def temperature_stats(self):
        """:class:`tempnet_kernels.nn.TemperatureStats` of the last micro-batch of this rank."""
        if self._last is None:
            raise RuntimeError("TempNetLinear: temperature_stats needs a call of TempNetLoss first")
        tau, labels = self._last
        low, high = self.tempnet.tau_min, self.tempnet.tau_max
        return TemperatureStats.of(tau, low, high, labels != IGNORE_INDEX)


def _local(x):
    """Of a replicated or sharded DTensor its local part, whose gradient is placed as it is."""
    return x.to_local() if isinstance(x, DTensor) else x


class TempNetLoss(ChunkedLossWrapper):
    """Sum of the token losses at the TempNet's temperatures, over ``global_valid_tokens``.

    As torchtitan's ``ChunkedLossWrapper``, which it takes the place of, it gets the hidden states
    and the head, and never holds the logits (:func:`tempnet_kernels.linear_dro_cross_entropy`).
    The model must have been through :func:`add_tempnet`.

    Config:
        rho: KL radius in nats, in [0, log V).
        label_smoothing, z_loss, chunk_rows, backend: as in ``linear_dro_cross_entropy``.

    torch.compile's "loss" component has nothing to compile here.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        rho: float
        label_smoothing: float = 0.0
        z_loss: float = 0.0
        chunk_rows: int | None = None
        backend: str = "auto"

    def __init__(self, config, *, compile_config=None):
        self.options = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        self.options["rho"] = radius("TempNetLoss", self.options["rho"], "a tempnet")
        self.lm_head = None

    def set_lm_head(self, lm_head):
        if not isinstance(lm_head, TempNetLinear):
            raise TypeError(
                f"TempNetLoss: lm_head must be a TempNetLinear, got {type(lm_head).__name__}: set "
                "config.model_spec = add_tempnet(config.model_spec) after every other converter"
            )
        check_reachable("TempNetLoss", self.options["rho"], lm_head.tempnet.vocab_size, "columns")
        self.lm_head = lm_head

    def __call__(self, pred, labels, global_valid_tokens=None, **kwargs):
        """pred: hidden states ``[B, L, D]``; labels ``[B, L]``, shifted. -> (loss, no metrics)."""
        if self.lm_head is None:
            raise RuntimeError(
                "TempNetLoss: set_lm_head(model.lm_head) must be called first, and "
                "model._skip_lm_head be True; torchtitan's trainer does both"
            )
        if pred.shape[-1] != self.lm_head.in_features:
            raise ValueError(
                f"TempNetLoss: pred must be hidden states of width {self.lm_head.in_features}, "
                f"got shape {tuple(pred.shape)}: set model._skip_lm_head = True"
            )
        reduction = "sum" if global_valid_tokens is None else "mean"
        options = {"reduction": reduction, "normalizer": global_valid_tokens, **self.options}
        typed = spmd.is_type_checking()
        loss, _ = self.lm_head(pred, labels, **options)
        if typed:
            spmd.assert_type(loss, {"dp": spmd.P, "cp": spmd.P, "tp": spmd.I})
        return loss, {}


class TempNetMetrics(MetricsProcessor):
    """torchtitan's metrics, with ``temperature/mean``, ``min``, ``max``, ``at_min`` and ``at_max``
    of the rank's last micro-batch at each step that is logged."""

    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):
        pass

    def log(self, step, global_avg_loss, global_max_loss, grad_norm, extra_metrics=None):
        extra_metrics = dict(extra_metrics or {})
        for part in self.model_parts:
            head = getattr(part, "lm_head", None)
            if isinstance(head, TempNetLinear):
                stats = head.temperature_stats().floats()
                extra_metrics |= {f"temperature/{k}": v for k, v in stats.items()}
        super().log(step, global_avg_loss, global_max_loss, grad_norm, extra_metrics)


def add_tempnet(
    model_spec, *, tau_min=0.5, tau_max=2.0, hidden_size=256, center=None, dropout=0.5,
    freeze_model=False,
):  # fmt: skip
    """A copy of a ``ModelSpec`` whose head holds a TempNet, ``lm_head.tempnet.*``.

    Args:
        model_spec: what a ``model_registry`` of torchtitan returns, with all its converters.
        tau_min, tau_max, hidden_size, center, dropout: as in :class:`tempnet_kernels.nn.TempNet`.
        freeze_model: train the TempNet only.

    Checkpoints hold the TempNet; what goes to or comes from Hugging Face files does not.

    Raises:
        ValueError: the model has no lm_head, or one that another converter has changed.
    """
    model = copy.deepcopy(model_spec.model)
    head = getattr(model, "lm_head", None)
    if type(head) is not Linear.Config:
        raise ValueError(
            "add_tempnet: model_spec.model.lm_head must be torchtitan's Linear.Config, got "
            f"{type(head).__qualname__}: keep lm_head out of other converters "
            "(freeze_model=True freezes the model)"
        )
    fields = {f.name: getattr(head, f.name) for f in dataclasses.fields(head)}
    model.lm_head = TempNetLinear.Config(
        **fields, tau_min=tau_min, tau_max=tau_max, hidden_size=hidden_size, center=center,
        dropout=dropout,
    )  # fmt: skip
    if freeze_model:
        model = LoRAConverter.Config(target_modules=[]).build().convert(model)
    adapter = model_spec.state_dict_adapter
    return dataclasses.replace(
        model_spec, model=model, state_dict_adapter=adapter and _without_tempnet(adapter)
    )


def _without_tempnet(adapter):
    class WithoutTempNet(adapter):
        def to_hf(self, state_dict):
            return super().to_hf({k: v for k, v in state_dict.items() if NAMES not in k})

    return WithoutTempNet


def tempnet_param_group(lr, *, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8):
    """The ``ParamGroupConfig`` of the TempNet's parameters, AdamW. The first pattern that matches
    counts, so it is to stand before the catch-all:
    ``config.optimizer.param_groups.insert(0, tempnet_param_group(lr=1e-4))``.

    Not with pipeline parallelism, where torchtitan wants every pattern in every stage.
    """
    kwargs = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps}
    return ParamGroupConfig(
        pattern=r"lm_head\.tempnet\.", optimizer_name="AdamW", optimizer_kwargs=kwargs
    )
