"""What a type checker finds of the public functions; it is read by mypy, in `make lint`."""

import torch

# In Python 3.10 typing does not have it.
from typing_extensions import assert_type

from tempnet_kernels import (
    ContrastiveStats,
    SolverStats,
    TokenStats,
    dro_contrastive,
    dro_cross_entropy,
    linear_dro_cross_entropy,
    optimal_temperature,
    tempered_softmax,
)
from tempnet_kernels.nn import TempNet, load_tempnet


def token_losses(x: torch.Tensor, target: torch.Tensor, asked: bool) -> None:
    assert_type(dro_cross_entropy(x, target), torch.Tensor)
    assert_type(dro_cross_entropy(x, target, x, 1.0, label_smoothing=0.1), torch.Tensor)
    with_stats = dro_cross_entropy(x, target, return_stats=True)
    assert_type(with_stats, tuple[torch.Tensor, TokenStats])
    either = dro_cross_entropy(x, target, return_stats=asked)
    assert_type(either, torch.Tensor | tuple[torch.Tensor, TokenStats])
    loss = linear_dro_cross_entropy(x, x, target, tempnet=TempNet(9), rho=1.0, reduction="sum")
    assert_type(loss, torch.Tensor)
    dro_cross_entropy(x, target, reduction="avg")  # type: ignore[call-overload]
    linear_dro_cross_entropy(x, x, target, overwrite_logits=True)  # type: ignore[call-overload]


def others(x: torch.Tensor, asked: bool) -> None:
    assert_type(dro_contrastive(x, x, 0.1, 0.1), torch.Tensor)
    _, stats = dro_contrastive(x, x, x, x, 1.0, gamma=0.8, return_stats=True)
    assert_type(stats, ContrastiveStats)
    assert_type(optimal_temperature(x, 1.0, 0.1, 2.0), torch.Tensor)
    assert_type(optimal_temperature(x, x, 0.1, 2.0, return_stats=True)[1], SolverStats)
    either = optimal_temperature(x, 1.0, 0.1, 2.0, return_stats=asked)
    assert_type(either, torch.Tensor | tuple[torch.Tensor, SolverStats])
    assert_type(tempered_softmax(x, 0.5), torch.Tensor)
    assert_type(load_tempnet("folder"), TempNet)
