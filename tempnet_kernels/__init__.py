"""Losses with a learned temperature: Triton, CUDA C++ and CPU C++ kernels behind PyTorch autograd
functions."""

from importlib import metadata

from tempnet_kernels import nn
from tempnet_kernels.ops.dro_contrastive import ContrastiveStats, dro_contrastive
from tempnet_kernels.ops.dro_cross_entropy import dro_cross_entropy
from tempnet_kernels.ops.linear_dro_cross_entropy import linear_dro_cross_entropy
from tempnet_kernels.ops.optimal_temperature import SolverStats, optimal_temperature
from tempnet_kernels.ops.tempered_softmax import tempered_log_softmax, tempered_softmax
from tempnet_kernels.ops.token_rows import TokenStats

try:
    __version__ = metadata.version("tempnet_kernels")
except metadata.PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+unknown"

__all__ = [
    "ContrastiveStats",
    "SolverStats",
    "TokenStats",
    "dro_contrastive",
    "dro_cross_entropy",
    "linear_dro_cross_entropy",
    "nn",
    "optimal_temperature",
    "tempered_log_softmax",
    "tempered_softmax",
]
