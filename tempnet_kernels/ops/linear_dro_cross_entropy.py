"""Token loss of a linear layer's outputs, which are never held whole: schema, autograd, public
function.

With z = W h + b for a row h, and tau given or predicted by a TempNet from z, the loss is that of
:mod:`tempnet_kernels.ops.dro_cross_entropy`. A chunk of rows at a time: logits, temperatures, loss,
the logits' gradient in their place, then d hidden = dz W and d weight += dz^T h. Three matrix
products, nothing is computed twice. The TempNet's first layer is folded into the linear one: W1 z =
(W1 W) h + W1 b, a product of width D instead of V.
"""

import functools
from typing import Literal, overload

import torch
import torch.distributed as dist
from typing_extensions import Unpack

from tempnet_kernels.chunked import linear_dro_cross_entropy as chunked
from tempnet_kernels.chunked.dro_cross_entropy import columns_of
from tempnet_kernels.core import register
from tempnet_kernels.core.autograd import apply
from tempnet_kernels.core.checks import (
    check_floats,
    check_has_float64,
    first_backward,
    once_differentiable,
    radius,
    temperatures,
)
from tempnet_kernels.core.collectives import outside_graphs, several
from tempnet_kernels.core.fields import (
    LinearOptions,
    LinearWants,
    TokenRow,
    accumulation_dtype,
)
from tempnet_kernels.core.matmul import unit_of
from tempnet_kernels.core.register import Backend
from tempnet_kernels.core.tempnet import HeadSums
from tempnet_kernels.ops import temperature_head  # noqa: F401 - its operators
from tempnet_kernels.ops.linear_arguments import check_layer, check_same_on_every_rank
from tempnet_kernels.ops.token_rows import (
    LinearKeywords,
    Reduction,
    TokenStats,
    check_arguments,
    reduced,
    row_scale,
    token_stats,
)

# Bytes of a chunk's logits. Every chunk adds to the weight's gradient, which is read and written in
# float32 each time: without that gradient a chunk can be smaller.
CHUNK_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
CHUNK_BYTES_WITHOUT_WEIGHT = {"cpu": 64 << 20, "cuda": 128 << 20}


@overload
def linear_dro_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    return_stats: Literal[False] = ...,
    **keywords: Unpack[LinearKeywords],
) -> torch.Tensor: ...


@overload
def linear_dro_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    return_stats: Literal[True],
    **keywords: Unpack[LinearKeywords],
) -> tuple[torch.Tensor, TokenStats]: ...


@overload
def linear_dro_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    return_stats: bool,
    **keywords: Unpack[LinearKeywords],
) -> torch.Tensor | tuple[torch.Tensor, TokenStats]: ...


def linear_dro_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    tempnet: torch.nn.Module | None = None,
    tau: float | torch.Tensor = 1.0,
    rho: float | None = None,
    bias: torch.Tensor | None = None,
    row_weight: torch.Tensor | None = None,
    normalizer: float | torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: Reduction = "mean",
    softcap: float | None = None,
    chunk_rows: int | None = None,
    drop_ignored: bool | None = None,
    return_stats: bool = False,
    process_group: "dist.ProcessGroup | None" = None,
    backend: Backend = "auto",
) -> torch.Tensor | tuple[torch.Tensor, TokenStats]:
    r"""Distributionally robust cross entropy of ``z = hidden @ weight.T + bias``, without holding
    z.

    The loss, its statistics and what odd input gets are those of
    :func:`tempnet_kernels.dro_cross_entropy`. The gradients are formed with the loss, a chunk of
    rows at a time: three matrix products for both ``hidden`` and ``weight``, two for one of them,
    one for neither (a frozen model whose TempNet is trained). ``reduction="none"`` makes the logits
    again in the backward, with what ranks exchange. Only the gradients that something wants are
    computed, and the weight's is summed in float32.

    Args:
        hidden: ``[..., D]`` float32, bfloat16, float16 or float64. Under autocast it and the weight
            are cast as :func:`torch.nn.functional.linear` does.
        weight: ``[V, D]`` of the same dtype.
        target: ``[...]`` int64 or int32 class indices.
        tempnet: a :class:`tempnet_kernels.nn.TempNet` for V columns; the temperatures are then its,
            of the detached logits, and its parameters get their gradient through
            ``d loss / d tau``. Where ``D (N + V) < N V`` its first layer is applied through the
            head, ``(W1 weight) h``, at the cost of width D for V.
        tau: without a TempNet, the temperature: a number, a 0-d tensor or one of the target's
            shape, which gets a gradient.
        rho: KL radius >= 0 in nats, as in :func:`tempnet_kernels.dro_cross_entropy`: it must be
            given where ``tau`` or a parameter of the tempnet wants a gradient.
        row_weight, normalizer, ignore_index, label_smoothing, z_loss, reduction: as in
            :func:`tempnet_kernels.dro_cross_entropy`.
        bias: ``[V]`` of the same dtype; -inf switches a column off.
        softcap: c > 0: the loss is that of ``c * tanh(z / c)`` (Gemma), as in
            :func:`tempnet_kernels.dro_cross_entropy`, and the TempNet sees these capped logits,
            none of its layers folded; a bias of -inf makes a logit -c.
        chunk_rows: rows whose logits are held at a time. Default: as many as fit in 256 MiB on a
            CPU and 1 GiB on a GPU; without a gradient of the weight 64 and 128 MiB.
        drop_ignored: leave ignored rows out of the matrix products. None: on a CPU only, since the
            number of rows is then known to the host, which on a GPU waits for it.
        return_stats: also return :class:`tempnet_kernels.TokenStats`.
        process_group: the processes that share the vocabulary, each with as many rows of weight
            (and of bias), in the order of the ranks; see :func:`tempnet_kernels.dro_cross_entropy`.
            A tempnet must be sharded over it (:meth:`tempnet_kernels.nn.TempNet.shard`). All else
            is the same on every rank, and so are the loss and the gradients of hidden, tau,
            row_weight and the rest of the TempNet. Where it is not, CPU tensors raise ValueError on
            every rank, and a GPU may wait for ever. Exchanged are 28 bytes per row, 16 more with a
            TempNet, and the sum of the hidden gradient; once per call the folded first layer
            ``[H, D]``, or for every row the ``[H]`` outputs of one that is not folded.
        backend: "auto", "native", "triton" or "reference", which holds all logits of one process.

    Returns:
        The loss in float32 (float64 for float64), 0-d or of the target's shape; with
        ``return_stats`` the pair ``(loss, TokenStats)``.

    Raises:
        ValueError, TypeError: an argument is off; the message names it, what was expected and what
            came.
        IndexError: a target outside [0, V) other than ``ignore_index`` in CPU tensors. On a GPU
            that row is NaN instead, and so are the gradients of weight and bias.
        RuntimeError: the backend is not available here.

    Source: arXiv 2404.04575; official code ``GPT-2/megatron/model/tempnet.py``.
    """
    return loss_and_temperatures(
        hidden, weight, target, tempnet, tau=tau, rho=rho, bias=bias, row_weight=row_weight,
        normalizer=normalizer, ignore_index=ignore_index, label_smoothing=label_smoothing,
        z_loss=z_loss, reduction=reduction, softcap=softcap, chunk_rows=chunk_rows,
        drop_ignored=drop_ignored, return_stats=return_stats, process_group=process_group,
        backend=backend,
    )[0]  # fmt: skip


def loss_and_temperatures(hidden, weight, target, tempnet, **options):
    """(the public function's result, temperatures of the target's shape)."""
    if tempnet is None:
        return _loss(hidden, weight, target, None, **options)
    # Of the type: FSDP1 has the attributes of what it wraps, and would be gone around.
    if not hasattr(type(tempnet), "kernel_parameters"):
        raise TypeError(
            f"linear_dro_cross_entropy: tempnet must be a TempNet, got {type(tempnet).__name__}"
        )
    return tempnet.within(lambda network: _loss(hidden, weight, target, network, **options))


def _loss(
    hidden, weight, target, tempnet, *, rho=None, bias=None, tau=1.0, row_weight=None,
    normalizer=None, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, reduction="mean",
    softcap=None, chunk_rows=None, drop_ignored=None, return_stats=False, process_group=None,
    backend="auto",
):  # fmt: skip
    """Within the forward of ``tempnet``."""
    name = "linear_dro_cross_entropy"
    check_floats(name, "hidden", hidden)
    for argument, value in (("weight", weight), ("bias", bias)):
        if not isinstance(value, torch.Tensor) and (argument != "bias" or bias is not None):
            raise TypeError(f"{name}: {argument} must be a tensor, got {type(value).__name__}")
    device = hidden.device
    if torch.is_autocast_enabled(device.type) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    check_arguments(
        name, hidden, target, row_weight, normalizer, label_smoothing, z_loss, reduction,
        ("hidden", "D"),
    )  # fmt: skip
    group = None if process_group is None else several(name, process_group)
    check_layer(name, hidden, weight, bias, tau, softcap, chunk_rows, tempnet, group)
    v, d = weight.shape
    acc = accumulation_dtype(hidden.dtype)
    chosen = register.pick(name, "row_moments", backend, device)
    check_has_float64(name, "hidden", hidden, chosen)

    flat = hidden.reshape(-1, d)  # (N, D)
    rows_target = target.reshape(-1)  # (N,)
    n = rows_target.shape[0]
    scale, total = row_scale(
        rows_target, row_weight, normalizer, ignore_index, reduction, acc, chosen
    )  # (N,), (1,) or None
    rows_tau = scale.detach()  # (N,), which is not read where the tempnet makes them
    if tempnet is None:
        rows_tau = temperatures(name, "tau", tau, tuple(target.shape), device, acc)

    def wanted(x):
        return torch.is_grad_enabled() and x is not None and x.requires_grad

    tensors, key, dropout, bounds, center, fold = [], None, 0.0, (0.0, 0.0), False, False
    if tempnet is not None:
        tensors = tempnet.kernel_parameters(acc)
        key = tempnet.dropout_key(device)
        dropout = tempnet.dropout_probability(key)
        bounds, center = (tempnet.tau_min, tempnet.tau_max), tempnet.center == "max"
        fold = not softcap and folding_pays(n, v, d)
    wants = LinearWants(
        wanted(hidden), wanted(weight), wanted(bias),
        w1=any(map(wanted, tensors[:1])), head=any(map(wanted, tensors[1:])),
    )  # fmt: skip
    if chunk_rows is None:
        budget = (CHUNK_BYTES if wants.weight else CHUNK_BYTES_WITHOUT_WEIGHT)[device.type]
        chunk_rows = max(1, budget // (v * hidden.element_size()))
    if drop_ignored is None:
        drop_ignored = device.type == "cpu"
    if group is not None and device.type == "cpu":
        check_same_on_every_rank(name, group, v, d, n, chunk_rows, *wants)
    learner = "a tempnet" if wants.tempnet else "tau" if wanted(rows_tau) else None
    options = LinearOptions(
        radius(name, rho, learner), ignore_index, float(label_smoothing), float(z_loss),
        float(softcap or 0), *bounds, dropout, center, fold, chunk_rows, drop_ignored,
    )  # fmt: skip
    each_row = reduction == "none"
    args = (
        flat, weight, bias, rows_tau, scale, rows_target, total, key, options, wants, return_stats,
        each_row, chosen, group, *tensors,
    )  # fmt: skip
    if group is None:
        loss, rows, argmax, taus, *_ = apply(_LinearDROCrossEntropy, *args)
    else:
        loss, rows, argmax, taus, *_ = _apply_across_ranks(*args)
    taus = rows_tau.detach() if tempnet is None else taus
    if each_row:
        loss = loss.reshape(target.shape)
    if return_stats:
        loss = loss, token_stats(rows, argmax, taus, columns_of(v, group)[1], target.shape)
    return loss, taus.reshape(target.shape)


def folding_pays(n, v, d):
    """Whether ``(W1 W) h`` and ``W1 W`` are less work than ``W1 z``."""
    return d * (n + v) < n * v


_op = register.operator


def _fwd(backend, group, *args):
    if group is None:
        return _op("linear_dro_cross_entropy_fwd", backend)(*args)
    chunks = functools.partial(chunked.linear_dro_cross_entropy_fwd, group=group)
    return register.without_autocast(args[0].device.type, chunks, backend, *args)


_TEMPNET = 14  # where the TempNet's parameters begin in the arguments of the Function


class _LinearDROCrossEntropy(torch.autograd.Function):
    """(hidden, weight, bias, tau, scale, TempNet) -> the sum of scale * loss, or with ``each_row``
    scale * loss [N]; rows, argmax and temperatures without a gradient."""

    @staticmethod
    def forward(
        hidden, weight, bias, tau, scale, target, total, key, options, wants, want_argmax,
        each_row, backend, group, *tempnet,
    ):  # fmt: skip
        # The gradients of each row's loss are made in the backward, which knows their factors.
        now = [wanted and not each_row for wanted in wants]
        loss, rows, argmax, taus, *grads, grads_tempnet = _fwd(
            backend, group, hidden, weight, bias, target, tau, scale, list(tempnet), key, now,
            want_argmax, *options,
        )  # fmt: skip
        value = reduced(loss, total, each_row, backend)
        return value, rows, argmax, taus, *grads, *grads_tempnet

    @staticmethod
    def setup_context(ctx, inputs, output):
        (
            hidden, weight, bias, tau, scale, target, _, key, ctx.options, ctx.wants, _,
            ctx.each_row, ctx.backend, ctx.group, *tempnet,
        ) = inputs  # fmt: skip
        _, rows, argmax, taus, *grads = output
        ctx.mark_non_differentiable(rows, argmax, taus, *grads)
        ctx.set_materialize_grads(False)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias, *tempnet)]
        if ctx.each_row:
            grads = [hidden, weight, bias, tau, target, key, *tempnet] if any(ctx.wants) else []
        ctx.save_for_backward(rows, scale, *grads)

    @staticmethod
    @once_differentiable("linear_dro_cross_entropy")
    def backward(ctx, grad_loss, *_):
        if any(ctx.wants) and not ctx.each_row:
            instead = "pass reduction='none', which makes it anew in each"
            first_backward("linear_dro_cross_entropy", ctx, instead)
        rows, scale, *grads = ctx.saved_tensors
        needed = ctx.needs_input_grad
        if grad_loss is None:
            return (None,) * len(needed)
        factor, row_scale = grad_loss, scale
        if ctx.each_row:
            factor, row_scale = scale.new_ones(()), grad_loss * scale
        if ctx.each_row and any(ctx.wants):
            hidden, weight, bias, tau, target, key, *tempnet = grads
            *_, grad_hidden, grad_weight, grad_bias, grads_tempnet = _fwd(
                ctx.backend, ctx.group, hidden, weight, bias, target, tau, row_scale, tempnet, key,
                ctx.wants, False, *ctx.options,
            )  # fmt: skip
            grads = [grad_hidden, grad_weight, grad_bias, *grads_tempnet]
        factors = [factor] * len(grads)
        if ctx.dtypes[0] == torch.float16:
            unit = factor * unit_of(row_scale)
            factors[:3] = [factor * row_scale, unit, unit]
        for grad, by in zip(grads, factors, strict=True):
            _multiply(grad, by, ctx.backend)
        finished = grads[:3] or [None] * 3
        if len(grads) > 3:
            grad_w1, grad_w2, sums = grads[3:]
            grad_b1 = sums[-grad_w2.shape[0] :]
            total = HeadSums.of(sums[: -grad_w2.shape[0]])
            finished += [
                grad_w1, grad_b1, grad_w2, total.grad_b2, total.grad_scaler,
                total.grad_weight[None], total.grad_bias,
            ]  # fmt: skip
        wanted = (*needed[:3], *needed[_TEMPNET:])
        finished += [None] * (len(wanted) - len(finished))
        finished = [
            grad.to(dtype) if want and grad is not None else None
            for grad, dtype, want in zip(finished, ctx.dtypes, wanted, strict=True)
        ]
        grad_tau = grad_loss * rows[TokenRow.GRAD_TAU] if needed[3] else None
        grad_scale = grad_loss * rows[TokenRow.LOSS] if needed[4] else None
        return *finished[:3], grad_tau, grad_scale, *[None] * (_TEMPNET - 5), *finished[3:]


_apply_across_ranks = outside_graphs(_LinearDROCrossEntropy.apply)


def _multiply(grad, factor, backend):
    """``grad *= factor``, one number or one for each row."""
    if grad.numel():
        by_rows = grad if grad.dim() == 2 else grad[None]
        _op("scale_rows_", backend)(by_rows, factor.expand(by_rows.shape[0]))


def _fake_fwd(
    hidden, weight, bias, target, tau, scale, tempnet, dropout_key, wants, want_argmax, *options
):
    (n, d), v = hidden.shape, weight.shape[0]
    acc = scale.dtype
    want = LinearWants(*wants)
    grad_dtype = acc if hidden.dtype == torch.float16 else hidden.dtype
    grads = []
    if want.tempnet:
        w1, b1, w2, *_ = tempnet
        h = b1.shape[0]
        shapes = [w1.shape if want.w1 else (0, 0), w2.shape, (3 * h + 2,)]
        grads = [scale.new_empty(shape) for shape in shapes]
    return (
        scale.new_empty(n),
        scale.new_empty((TokenRow.FIELDS, n)),
        target.new_empty(n if want_argmax else 0, dtype=torch.int64),
        scale.new_empty(n if tempnet else 0),
        hidden.new_empty((n if want.hidden else 0, d)),
        weight.new_empty((v if want.weight else 0, d), dtype=grad_dtype),
        weight.new_empty(v if want.bias else 0, dtype=grad_dtype),
        grads,
    )


# hidden [N, D], weight [V, D], bias [V] of one dtype; target, tau (not read with a TempNet) and
# scale [N] as in dro_cross_entropy_fwd. tempnet: W1 [H, V], b1, W2, b2, scaler, last.weight,
# last.bias, or nothing; dropout_key: of sigmoid_dropout, whose ids are the rows' numbers. wants:
# LinearWants. Returns scale * loss [N], rows [6, N], argmax, the TempNet's temperatures [N] (NaN in
# ignored rows), and the gradients; for float16 that of hidden lacks the factor scale of its row,
# those of weight and bias the factor unit_of(scale). The TempNet's are those of W1 and W2, and
# HeadSums before that of b1, in the accumulation dtype.
register.define(
    "linear_dro_cross_entropy_fwd(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, "
    "Tensor tau, Tensor scale, Tensor[] tempnet, Tensor? dropout_key, bool[] wants, "
    f"bool want_argmax, {register.arguments(LinearOptions)}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor[])",
    _fake_fwd,
    "linear_dro_cross_entropy",
    chunked=True,
)
