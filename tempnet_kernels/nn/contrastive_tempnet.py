"""The temperature network for contrastive features."""

import math

import torch
from torch import nn

from tempnet_kernels.core.checks import (
    check_floats,
    check_integers,
    in_backward,
    temperature_bounds,
)
from tempnet_kernels.core.fields import accumulation_dtype
from tempnet_kernels.nn.tempnet import reshape_scalar
from tempnet_kernels.ops.temperature_head import backend_for, of_features


class ContrastiveTempNet(nn.Module):
    r"""Predicts a temperature for every feature vector of one side.

    With ``x = dropout(sigmoid(proj(f)))`` and ``q_k`` the product of x with the k-th of the
    normalised prototypes:

        w   = softmax(q / exp(scaler))
        tau = tau_min + (tau_max - tau_min) * sigmoid(linear_1((w - 1/K) * sigmoid(q)))

    The features are detached: the network learns from the temperature's gradient alone.

    Args:
        feature_dim: D, the width of the features.
        tau_min, tau_max: bounds of the temperature, 0 < tau_min < tau_max.
        num_prototypes: K; the official code has 256.
        dropout: probability, in training mode.
        seed: of the dropout masks of samples with ids, in [0, 2^31); each network has its own.

    The state dict has the official names, ``proj``, ``scaler``, ``prototypes``, ``linear_1``, and
    ``dropout_step``, which counts the masks drawn; a state dict without it counts from 0.
    ``load_state_dict`` takes a scaler of shape ``()`` or ``[1]`` in any float dtype.

    It has no second derivative, no ``torch.func.vmap`` and no forward mode. Where neither the
    kernels nor Triton is there it is computed by plain PyTorch.

    Source: arXiv 2404.04575; official code ``Bimodal_CL/models/losses.py``, class
    ``TempGenerator``.
    """

    def __init__(
        self,
        feature_dim: int,
        tau_min: float = 0.005,
        tau_max: float = 0.05,
        *,
        num_prototypes: int = 256,
        dropout: float = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for argument, value in (("feature_dim", feature_dim), ("num_prototypes", num_prototypes)):
            if value < 1:
                raise ValueError(f"ContrastiveTempNet: {argument} must be >= 1, got {value}")
        if not 0 <= dropout < 1:
            raise ValueError(f"ContrastiveTempNet: dropout must be in [0, 1), got {dropout}")
        if not 0 <= seed < 1 << 31:
            raise ValueError(f"ContrastiveTempNet: seed must be in [0, 2^31), got {seed}")
        temperature_bounds("ContrastiveTempNet", tau_min, tau_max)
        self.tau_min = tau_min
        self.tau_max = tau_max
        self.dropout = dropout
        self.seed = seed
        self.proj = nn.Linear(feature_dim, feature_dim)
        self.scaler = nn.Parameter(torch.full((1,), math.log(0.01)))  # not 0-d: FSDP2 refuses that
        self.prototypes = nn.Parameter(torch.randn(num_prototypes, feature_dim))
        self.linear_1 = nn.Linear(num_prototypes, 1)
        nn.init.ones_(self.linear_1.weight)
        nn.init.zeros_(self.linear_1.bias)
        self.register_buffer("dropout_step", torch.zeros(1, dtype=torch.int64))
        self.register_load_state_dict_pre_hook(_accept_official_layout)

    @torch.no_grad()
    def init_prototypes(self, features: torch.Tensor) -> None:
        """Replace the prototypes by the first K rows of ``features`` ``[>= K, D]``: before the
        first step, and before DDP or FSDP takes the module, with the same features on every rank.
        The official code gives each side's network features of the other side."""
        k = self.prototypes.shape[0]
        self._check(features)
        if features.shape[0] < k:
            raise ValueError(
                f"ContrastiveTempNet: features must have at least {k} rows for {k} prototypes, "
                f"got {features.shape[0]}"
            )
        self.prototypes.copy_(features[:k])

    def forward(
        self, features: torch.Tensor, ids: torch.Tensor | None = None, *, new_mask: bool = True
    ) -> torch.Tensor:
        """features ``[B, D]`` of a float dtype -> temperatures ``[B]`` in float32 (float64 for a
        float64 network), in which it computes, under autocast too.

        ids: ``[B]`` integers. In training mode a sample's dropout mask then depends on its id, the
        seed and the number of the call, not on the device, the process or the place in the batch:
        ranks that predict the same sample's temperature agree. Without ids it depends on the
        sample's row, and on what torch's generator then draws.
        new_mask: False repeats the masks of the last call, and does not count.
        """
        self._check(features)
        # What autocast would round is divided by exp(scaler), 0.01 at first.
        with torch.autocast(features.device.type, enabled=False):
            return self._temperatures(features.detach(), ids, new_mask)

    def _temperatures(self, features, ids, new_mask):
        # A 16-bit network is computed in float32: its parameters are few.
        acc = accumulation_dtype(self.proj.weight.dtype)
        parameters = (
            self.proj.weight, self.proj.bias, self.prototypes, self.scaler, self.linear_1.weight,
            self.linear_1.bias,
        )  # fmt: skip
        return of_features(
            features.to(acc),
            [p.to(acc) for p in parameters],
            *self._mask(features, ids, new_mask),
            (self.tau_min, self.tau_max),
            backend_for(features.device, acc),
        )

    def _check(self, features):
        check_floats("ContrastiveTempNet", "features", features)
        d = self.proj.in_features
        if features.dim() != 2 or features.shape[1] != d:
            raise ValueError(
                f"ContrastiveTempNet: features must have shape (B, {d}), "
                f"got {tuple(features.shape)}"
            )

    def _mask(self, features, ids, new_mask):
        """(key, ids, probability) of sigmoid_dropout."""
        if not self.training or self.dropout == 0:
            return None, None, 0.0
        if ids is None:
            return torch.randint(1 << 62, (), device=features.device), None, self.dropout
        check_integers("ContrastiveTempNet", "ids", ids, features.shape[:1], features.device)
        if new_mask:
            if in_backward():
                raise RuntimeError(
                    "ContrastiveTempNet: forward runs again within a backward pass (activation "
                    "checkpointing), where it would draw another dropout mask: leave the network "
                    "out of the checkpointed region, or pass new_mask=False"
                )
            self.dropout_step += 1
        key = self.dropout_step + (self.seed << 32)  # (1,)
        return key[0], ids.long(), self.dropout

    def extra_repr(self) -> str:
        return f"tau=[{self.tau_min}, {self.tau_max}], dropout={self.dropout}, seed={self.seed}"


def _accept_official_layout(module, state_dict, prefix, *_):
    if prefix + "prototypes" in state_dict:
        zero = torch.zeros_like(module.dropout_step)
        state_dict.setdefault(prefix + "dropout_step", zero)
    reshape_scalar(state_dict, prefix + "scaler")
