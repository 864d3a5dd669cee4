"""Modules that trainers hold."""

from tempnet_kernels.nn.dro_cross_entropy import (
    DROCrossEntropyLoss,
    TemperatureStats,
    TempNetCrossEntropyLoss,
)
from tempnet_kernels.nn.tempnet import TempNet

__all__ = ["DROCrossEntropyLoss", "TempNet", "TempNetCrossEntropyLoss", "TemperatureStats"]
