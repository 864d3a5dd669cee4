"""Modules that trainers hold."""

from tempnet_kernels.nn.checkpoint import load_tempnet, save_tempnet
from tempnet_kernels.nn.contrastive_tempnet import ContrastiveTempNet
from tempnet_kernels.nn.dro_contrastive import ContrastiveTemperatureStats, RobustContrastiveLoss
from tempnet_kernels.nn.dro_cross_entropy import (
    DROCrossEntropyLoss,
    TempNetCausalLMLoss,
    TempNetCrossEntropyLoss,
)
from tempnet_kernels.nn.param_groups import tempnet_param_groups
from tempnet_kernels.nn.tempnet import TemperatureStats, TempNet

__all__ = [
    "ContrastiveTempNet",
    "ContrastiveTemperatureStats",
    "DROCrossEntropyLoss",
    "RobustContrastiveLoss",
    "TempNet",
    "TempNetCausalLMLoss",
    "TempNetCrossEntropyLoss",
    "TemperatureStats",
    "load_tempnet",
    "save_tempnet",
    "tempnet_param_groups",
]
