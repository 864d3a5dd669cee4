"""The temperature that a TempNet predicts, solved for: schema, public function.

For a row of logits z (V columns), with p = softmax(z / tau):

    kl(tau) = KL(p || uniform) = log V - H(p),    kl falls: d kl / d tau = -Var_p(z) / tau^3

The minimiser over tau of tau * log(mean_j exp(z_j / tau)) + tau * rho, the robust loss of the row,
has kl(tau) = rho. It does not depend on the target.
"""

import math
from typing import Literal, NamedTuple, overload

import torch

from tempnet_kernels.core import register
from tempnet_kernels.core.checks import check_has_float64, check_rows, temperatures, unit_columns
from tempnet_kernels.core.fields import accumulation_dtype
from tempnet_kernels.core.register import Backend


class SolverStats(NamedTuple):
    """What the solver found per row, each of the shape of the temperatures."""

    kl: torch.Tensor  # KL(softmax(z / tau) || uniform) at the returned tau, in nats
    iterations: torch.Tensor  # int32, how often kl was evaluated: at most 30


@overload
def optimal_temperature(
    logits: torch.Tensor,
    rho: float | torch.Tensor,
    tau_min: float,
    tau_max: float,
    *,
    return_stats: Literal[False] = ...,
    backend: Backend = ...,
) -> torch.Tensor: ...


@overload
def optimal_temperature(
    logits: torch.Tensor,
    rho: float | torch.Tensor,
    tau_min: float,
    tau_max: float,
    *,
    return_stats: Literal[True],
    backend: Backend = ...,
) -> tuple[torch.Tensor, SolverStats]: ...


@overload
def optimal_temperature(
    logits: torch.Tensor,
    rho: float | torch.Tensor,
    tau_min: float,
    tau_max: float,
    *,
    return_stats: bool,
    backend: Backend = ...,
) -> torch.Tensor | tuple[torch.Tensor, SolverStats]: ...


def optimal_temperature(
    logits: torch.Tensor,
    rho: float | torch.Tensor,
    tau_min: float,
    tau_max: float,
    *,
    return_stats: bool = False,
    backend: Backend = "auto",
) -> torch.Tensor | tuple[torch.Tensor, SolverStats]:
    r"""The temperature at which a row's softmax is ``rho`` away from uniform, clipped.

    Per row the ``tau`` in ``[tau_min, tau_max]`` with

        KL(softmax(logits / tau) || uniform) = log V - H(softmax(logits / tau)) = rho

    which minimises ``dro_cross_entropy`` over ``tau``, whatever the target. The KL falls with tau:
    where it is at most rho at ``tau_min`` the result is ``tau_min`` (a flat row, or k equal
    maxima with log(V / k) <= rho); where it is at least rho at ``tau_max``, ``tau_max``. In
    between the KL is met within 1e-5 (float64 logits: 1e-11). A -inf logit has weight 0 and counts
    in V. There is no gradient: logits and rho are detached.

    Args:
        logits: ``[..., V]`` float32, bfloat16, float16 or float64 (float64 on the CPU, or with
            backend "reference"). Any row stride is used in place; a column stride other than 1
            costs a copy.
        rho: KL radius >= 0 in nats: a number, a 0-d tensor or a tensor of shape ``[...]``.
        tau_min: lower bound > 0, a number.
        tau_max: upper bound >= tau_min, a number.
        return_stats: also return :class:`SolverStats`.
        backend: "auto", "native" (C++ on the CPU, CUDA C++ on a GPU), "triton" or "reference"
            (PyTorch, waits for the GPU in every iteration). "auto" is native; on a GPU without the
            compiled extension, Triton.

    Returns:
        ``[...]`` in float32 (float64 for float64 logits); with ``return_stats`` the pair ``(tau,
        SolverStats)``. A row of only -inf, one with a NaN or +inf logit, and one with ``rho < 0``
        or NaN in a tensor are NaN.

    Raises:
        ValueError, TypeError: an argument is off; the message names it, what was expected and what
            came.
        RuntimeError: the backend is not available here.

    Source: arXiv 2404.04575, the inner problem of the robust loss; the official
    ``GPT-2/megatron/model/tempnet.py`` holds a Newton iteration for it, commented out.
    """
    name = "optimal_temperature"
    check_rows(name, "logits", logits)
    acc = accumulation_dtype(logits.dtype)
    _check_bounds(name, tau_min, tau_max, acc)
    chosen = register.pick(name, name, backend, logits.device)
    check_has_float64(name, "logits", logits, chosen)

    *shape, v = logits.shape
    rows_rho = _radii(name, rho, tuple(shape), logits.device, acc)  # (N,)
    flat = unit_columns(logits.detach().reshape(rows_rho.shape[0], v))  # (N, V)
    found = _op(name, chosen)(flat, rows_rho, float(tau_min), float(tau_max))
    tau, *stats = (value.reshape(shape) for value in found)
    return (tau, SolverStats(*stats)) if return_stats else tau


def _check_bounds(name, tau_min, tau_max, acc):
    for argument, value in (("tau_min", tau_min), ("tau_max", tau_max)):
        if isinstance(value, torch.Tensor):
            raise TypeError(f"{name}: {argument} must be a number, got a tensor")
    range_ = torch.finfo(acc)
    if not range_.tiny <= tau_min <= tau_max <= range_.max:
        raise ValueError(
            f"{name}: tau_min and tau_max must satisfy 0 < tau_min <= tau_max < inf in {acc}, "
            f"got {tau_min} and {tau_max}"
        )


def _radii(name, rho, shape, device, dtype):
    """``rho``, a number, a 0-d tensor or one of ``shape``, as ``[n]`` in ``dtype``."""
    if isinstance(rho, torch.Tensor):
        return temperatures(name, "rho", rho.detach(), shape, device, dtype)
    if not rho >= 0:
        raise ValueError(f"{name}: rho must be a number >= 0, got {rho}")
    return torch.full((), rho, dtype=dtype, device=device).expand(math.prod(shape))


_op = register.operator


def _fake(logits, rho, tau_min, tau_max):
    n = logits.shape[0]
    return rho.new_empty((n,)), rho.new_empty((n,)), rho.new_empty((n,), dtype=torch.int32)


# logits [N, V] with column stride 1; rho [N] in the accumulation dtype, any stride. Returns (tau,
# kl, iterations). A row with rho < 0 or NaN is NaN.
register.define(
    "optimal_temperature(Tensor logits, Tensor rho, float tau_min, float tau_max) "
    "-> (Tensor, Tensor, Tensor)",
    _fake,
    "optimal_temperature",
)
