"""Losses with a learned temperature: Triton, CUDA C++ and CPU C++ kernels behind PyTorch autograd
functions."""

from tempnet_kernels import nn
from tempnet_kernels.dro_contrastive import ContrastiveStats, dro_contrastive
from tempnet_kernels.dro_cross_entropy import TokenStats, dro_cross_entropy
from tempnet_kernels.linear_dro_cross_entropy import linear_dro_cross_entropy
from tempnet_kernels.optimal_temperature import SolverStats, optimal_temperature
from tempnet_kernels.tempered_softmax import tempered_log_softmax, tempered_softmax

__version__ = "0.1.0"
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
