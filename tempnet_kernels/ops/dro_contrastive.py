"""Contrastive loss with a temperature per anchor, both directions: schema, autograd, public
function.

For an anchor i with similarities S_ij to its candidates, h_ij = S_ij - S_ii and temperature tau_i:

    g_i  = sum_{j != i} exp(h_ij / tau_i)
    s_i  = (1 - gamma) s_i(old) + gamma g_i          on a first visit g_i
    term = tau_i (log(s_i / n_i) + rho)              n_i: the number of negatives

and the loss is the mean of the images' terms plus the mean of the texts'.

Qiu et al., "To Cool or not to Cool? Temperature Network Meets Large Foundation Models via DRO",
ICML 2024.
"""

from typing import Literal, NamedTuple, overload

import torch
import torch.distributed as dist
from typing_extensions import Unpack

from tempnet_kernels.core import register
from tempnet_kernels.core.autograd import apply
from tempnet_kernels.core.checks import (
    check_has_float64,
    once_differentiable,
    radius,
    temperatures,
)
from tempnet_kernels.core.collectives import outside_graphs
from tempnet_kernels.core.fields import AnchorStatistics, accumulation_dtype
from tempnet_kernels.core.pairs import Ranks, all_sum, gather, meet, merge, reduce_scatter
from tempnet_kernels.core.register import Backend
from tempnet_kernels.ops import contrastive_anchors as _contrastive_anchors  # noqa: F401
from tempnet_kernels.ops.pair_arguments import (
    PairKeywords,
    check_features,
    checked_ids,
    columns_of_pairs,
    ids_of_pairs,
    log_averages,
    pair_mask,
)

# Similarities of at most this many bytes are kept in fp32 for the backward, which saves one of four
# matrix products.
KEEP_BYTES = 64 << 20


class ContrastiveStats(NamedTuple):
    """Detached statistics per anchor, each [M]."""

    log_s_image: torch.Tensor  # log of the moving average after this visit
    log_s_text: torch.Tensor
    kl_image: torch.Tensor  # KL(softmax(S / tau) || uniform) over the negatives, in nats
    kl_text: torch.Tensor
    k_image: torch.Tensor  # M times the loss's derivative by tau_image
    k_text: torch.Tensor


@overload
def dro_contrastive(
    image: torch.Tensor,
    text: torch.Tensor,
    tau_image: float | torch.Tensor,
    tau_text: float | torch.Tensor,
    rho: float | None = ...,
    *,
    return_stats: Literal[False] = ...,
    **keywords: Unpack[PairKeywords],
) -> torch.Tensor: ...


@overload
def dro_contrastive(
    image: torch.Tensor,
    text: torch.Tensor,
    tau_image: float | torch.Tensor,
    tau_text: float | torch.Tensor,
    rho: float | None = ...,
    *,
    return_stats: Literal[True],
    **keywords: Unpack[PairKeywords],
) -> tuple[torch.Tensor, ContrastiveStats]: ...


@overload
def dro_contrastive(
    image: torch.Tensor,
    text: torch.Tensor,
    tau_image: float | torch.Tensor,
    tau_text: float | torch.Tensor,
    rho: float | None = ...,
    *,
    return_stats: bool,
    **keywords: Unpack[PairKeywords],
) -> torch.Tensor | tuple[torch.Tensor, ContrastiveStats]: ...


def dro_contrastive(
    image: torch.Tensor,
    text: torch.Tensor,
    tau_image: float | torch.Tensor,
    tau_text: float | torch.Tensor,
    rho: float | None = None,
    *,
    log_s_image: torch.Tensor | None = None,
    log_s_text: torch.Tensor | None = None,
    gamma: float = 1.0,
    include_positive: bool = False,
    image_ids: torch.Tensor | None = None,
    text_ids: torch.Tensor | None = None,
    negative_mask: torch.Tensor | None = None,
    positive: torch.Tensor | None = None,
    return_stats: bool = False,
    process_group: "dist.ProcessGroup | Ranks | None" = None,
    backend: Backend = "auto",
) -> torch.Tensor | tuple[torch.Tensor, ContrastiveStats]:
    r"""Robust global contrastive loss with a temperature per anchor, in both directions.

    With ``S = image @ text.T``, an image anchor i with its pair in column ``y = positive[i]`` has

        g_i  = sum_{j != y} exp((S_ij - S_iy) / tau_i)
        s_i  = (1 - gamma) * exp(log_s_image[i]) + gamma * g_i    (g_i where log_s_image[i] is NaN)
        term = tau_i * (log(s_i / n_i) + rho)                     n_i: its number of negatives

    and a text anchor the same over its column. The loss is the mean of the images' terms plus the
    mean of the texts'. Its gradient is that of ``mean_i sum_j sg(w_ij) (S_ij - S_iy) + sg(k_i)
    tau_i`` with ``w_ij = exp((S_ij - S_iy) / tau_i) / s_i``, ``k_i = log(s_i / n_i) + rho - sum_j
    w_ij (S_ij - S_iy) / tau_i`` and sg a stop-gradient: at ``gamma=1`` the derivative of the loss,
    otherwise the estimate that the moving average makes. With ``rho=0``, ``include_positive`` and
    one temperature, CLIP's loss is ``loss / (2 tau) + log B``.

    S is visited in tiles, once in the forward and once in the backward, and never held whole unless
    it fits in 64 MiB. S and all sums are in float32 (float64 for float64 features) and in a fixed
    order: equal input gives equal bits. A visit needs a tile of 4 MiB and, for 16-bit features,
    their float32 copies; on a GPU a tile of 256 MiB, and 128 MiB of weights for 16-bit features,
    which are multiplied as they are. float32 features multiply there as torch is told to:
    TensorFloat-32 (``torch.set_float32_matmul_precision``) errs by up to 1e-4 in S (simulated), so
    by 1e-4 / tau in an exponent.

    Args:
        image: ``[M, D]`` features, float32, bfloat16 or float16 (float64 on the CPU, or with
            backend "reference"); usually normalised, which is not checked.
        text: ``[N, D]`` features of the same dtype, N >= M. Columns that are no row's pair (a
            memory bank, gathered features) are negatives of the images and get no term of their
            own. To have more images than texts, exchange the two sides.
        tau_image, tau_text: temperature > 0 of each image anchor and of each text anchor: a number,
            a 0-d tensor or ``[M]`` in the order of the rows. A tensor gets a gradient.
        rho: KL radius >= 0 in nats, a number: where an anchor's KL is below it the temperature
            falls, above it rises. It must be given where ``tau_image`` or ``tau_text`` wants a
            gradient; else it is 0 by default. At log n, which no KL of n negatives reaches, and
            above every temperature falls.
        log_s_image, log_s_text: ``[M]`` logarithm of each anchor's moving average, NaN where there
            is none yet. Default: a first visit of all.
        gamma: weight of this batch in the moving average, in (0, 1].
        include_positive: count the positive in g and n, as CLIP does.
        image_ids, text_ids: ``[N]`` integers: two candidates with the same image id or the same
            text id are not negatives of each other, in both directions.
        negative_mask: ``[M, N]`` bool, False where a pair is known not to be a negative. The
            positives' entries are not read.
        positive: ``[M]`` integers, the column of each row's pair, all different. Default: column i
            for row i.
        return_stats: also return :class:`ContrastiveStats`.
        process_group: the processes that share the batch. Each passes its own pairs, and the loss
            is that of all of them; see below. Default: this process alone.
        backend: "auto", "native" (C++ on the CPU, CUDA C++ on a GPU), "triton" (GPU) or "reference"
            (PyTorch; holds S several times). "auto" is native; on a GPU without the compiled
            extension, Triton.

    Returns:
        The loss, 0-d float32 (float64 for float64 features); with ``return_stats`` the pair
        ``(loss, ContrastiveStats)``. An anchor without negatives has loss 0, gradient 0, KL NaN,
        and its ``log_s`` comes back as it was; so does one whose new value is not finite. The loss
        of no pairs is NaN. A tensor of temperatures with a value that is not in (0, inf) gives NaN.

    With ``process_group``, M and N above are a rank's own, as are all arguments, except that a row
    of ``negative_mask`` has the columns of all ranks, in their order. Numbers of pairs may differ,
    also be 0. A rank visits the similarities of its images with all texts, so each one is visited
    once, and every rank returns the loss of the whole batch and the statistics of its own pairs.
    The gradient is that of the sum of the ranks' (equal) losses: after the mean over ranks that DDP
    and FSDP take, parameters have the gradient of one process on the whole batch. Per pair of the
    batch, the ranks exchange the text features, the gradient of them in float32, and some 60 bytes.
    ``process_group`` must be the ranks that this mean is over. Every one of them must make the call
    and the backward; the call waits once for the device, and breaks a compiled graph. Options and
    dtypes that differ by rank raise on all; an error of one rank alone leaves the others waiting
    until the group's timeout. ``torch.func`` transforms are for one process.

    Raises:
        ValueError, TypeError: an argument is off; the message names it, what was expected and what
            came.
        IndexError: an entry of ``positive`` outside [0, N), in CPU tensors. On a GPU, and compiled,
            the loss is NaN instead, and equal entries are not found.
        RuntimeError: the backend is not available here.

    Source: arXiv 2404.04575; official code ``Bimodal_CL/models/losses.py``.
    """
    name = "dro_contrastive"
    check_features(name, image, text)
    m, n = image.shape[0], text.shape[0]
    acc = accumulation_dtype(image.dtype)
    if not 0 < gamma <= 1:
        raise ValueError(f"{name}: gamma must be in (0, 1], got {gamma}")
    device = image.device
    chosen = register.pick(name, "similarity_stats_", backend, device)
    check_has_float64(name, "image", image, chosen)

    row_tau = temperatures(name, "tau_image", tau_image, (m,), device, acc)
    text_tau = temperatures(name, "tau_text", tau_text, (m,), device, acc)
    learning = torch.is_grad_enabled() and (row_tau.requires_grad or text_tau.requires_grad)
    rho = radius(name, rho, "a temperature" if learning else None, "negatives")
    log_s_image = log_averages(name, "log_s_image", log_s_image, m, device, acc)
    log_s_text = log_averages(name, "log_s_text", log_s_text, m, device, acc)
    positive = columns_of_pairs(name, positive, m, n, device)
    image_ids = checked_ids(name, "image_ids", image_ids, n, device)
    text_ids = checked_ids(name, "text_ids", text_ids, n, device)
    ranks = None
    if process_group is not None:
        differentiable = any(t.requires_grad for t in (image, text, row_tau, text_tau))
        ranks = meet(
            name, process_group, image, text, rho=rho, gamma=gamma,
            include_positive=include_positive, image_ids=image_ids is not None,
            text_ids=text_ids is not None, **{"requires_grad of any argument": differentiable},
        )  # fmt: skip
    all_n = n if ranks is None else sum(ranks.sizes)
    ids = ids_of_pairs(image_ids, text_ids, all_n, ranks, device)
    mask = pair_mask(name, negative_mask, m, all_n, device)

    track = torch.is_grad_enabled() and (image.requires_grad or text.requires_grad)
    keep = track and m * all_n * acc.itemsize <= KEEP_BYTES
    args = (
        image, text, row_tau, text_tau, log_s_image, log_s_text, positive, ids, mask,
        bool(include_positive), rho, float(gamma), keep, ranks, chosen,
    )  # fmt: skip
    if ranks is None:
        value, stats, *_ = apply(_DROContrastive, *args)
    else:
        value, stats, *_ = _apply_across_ranks(*args)
    if not return_stats:
        return value
    # The backward has them, too: a caller may write into his.
    stats = stats.clone() if value.requires_grad else stats
    return value, ContrastiveStats(*stats.unbind())


_op = register.operator


class _Saved(NamedTuple):
    """What the backward needs beside the arguments and the statistics."""

    positive: torch.Tensor  # (M,), the column of each row's pair among those of all ranks
    pair: torch.Tensor  # (N,) int32, the row whose pair a column is, or -1
    rows: torch.Tensor  # (3, M), AnchorParameters
    columns: torch.Tensor  # (3, N)
    total: torch.Tensor  # (M,), of both anchors of each pair
    similarity: torch.Tensor  # (M, N), or (0, 0) where it was not kept
    candidates: torch.Tensor  # (N, D), the texts of all ranks; (0, 0) for those of one process


class _DROContrastive(torch.autograd.Function):
    """(image, text, tau_image [M], tau_text [M], ...) -> the value and, without a gradient,
    AnchorStatistics [6, M] and :class:`_Saved`.

    With ``ranks`` the rows are this rank's images and the columns the texts of all. Every rank has
    the states of its rows, exchanges those of the columns, and has the anchors of its own pairs,
    both sides.
    """

    @staticmethod
    def forward(
        image, text, tau_image, tau_text, log_s_image, log_s_text, positive, ids, mask,
        include_positive, rho, gamma, keep, ranks, backend,
    ):  # fmt: skip
        candidates = gather(text, ranks)  # (N, D)
        begin = 0 if ranks is None else ranks.begin
        every_pair = not ids.numel() and not mask.numel()
        row_a, column_a, rows, columns, place, pair = _op("anchor_states", backend)(
            tau_image, tau_text, positive, text, candidates, begin, include_positive, every_pair
        )
        similarity = _op("dro_contrastive_stats_", backend)(
            rows, columns, image, candidates, row_a, gather(column_a, ranks), place, ids, mask,
            include_positive, keep,
        )  # fmt: skip
        stats, term, total, of_rows, of_columns = _op("contrastive_anchors", backend)(
            rows, merge(columns, ranks), row_a, column_a, tau_image, tau_text, place, pair,
            log_s_image, log_s_text, begin, gamma, rho,
        )  # fmt: skip
        if ranks is None:
            value, candidates = term.mean(), text.new_empty((0, 0))
        else:
            value = all_sum(term.sum(), ranks) / ranks.pairs
            of_columns = gather(of_columns.T, ranks).T.contiguous()
        saved = _Saved(place, pair, of_rows, of_columns, total, similarity, candidates)
        return value, stats, *saved

    @staticmethod
    def setup_context(ctx, inputs, output):
        image, text, _, _, _, _, _, ids, mask, ctx.include_positive, *_ = inputs
        *_, ctx.ranks, ctx.backend = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        stats, saved = output[1], _Saved(*output[2:])
        if ctx.ranks is None:
            saved = saved._replace(candidates=text)
        ctx.save_for_backward(image, ids, mask, stats, *saved)

    @staticmethod
    @once_differentiable("dro_contrastive")
    def backward(ctx, grad_value, *_):
        if grad_value is None:
            return (None,) * 15
        image, ids, mask, stats, *saved = ctx.saved_tensors
        saved = _Saved(*saved)
        want = ctx.needs_input_grad
        # The gradient is that of the sum of the ranks' losses, which are equal. Of no pairs it is
        # 0, not NaN.
        scale = all_sum(grad_value, ctx.ranks) / max(1, _number(image, ctx.ranks))
        grads = [None] * 15
        if want[0] or want[1]:
            # The texts' is not rounded before it is summed over the ranks.
            grad_image, grad_text = _op("dro_contrastive_grad", ctx.backend)(
                image, saved.candidates, saved.similarity, saved.rows, saved.columns, saved.total,
                saved.positive, saved.pair, ids, mask, ctx.include_positive, scale,
                ctx.ranks is not None, want[0], want[1],
            )  # fmt: skip
            if want[0]:
                grads[0] = grad_image
            if want[1]:
                grads[1] = reduce_scatter(grad_text, ctx.ranks).to(image.dtype)
        if want[2] or want[3]:
            k = stats[AnchorStatistics.K_IMAGE : AnchorStatistics.K_TEXT + 1] * scale
            grads[2:4] = (x if w else None for x, w in zip(k, want[2:4], strict=True))
        return tuple(grads)


_apply_across_ranks = outside_graphs(_DROContrastive.apply)


def _number(image, ranks):
    return image.shape[0] if ranks is None else ranks.pairs


def _fake_stats(
    rows, columns, image, text, row_a, column_a, positive, ids, mask, include_positive, keep
):
    return row_a.new_empty((image.shape[0], text.shape[0]) if keep else (0, 0))


def _fake_grad(
    image, text, similarity, rows, columns, total, positive, pair, ids, mask, include_positive,
    scale, wide_text, want_image, want_text,
):  # fmt: skip
    of_text = rows.dtype if wide_text else text.dtype
    return (
        image.new_empty(image.shape if want_image else (0, 0)),
        text.new_empty(text.shape if want_text else (0, 0), dtype=of_text),
    )


# Adds the rows and columns of S = image text^T to their states, and returns S where it is to be
# kept. image [M, D], text [N, D]; row_a [M] and column_a [N] are log2(e) / tau in the accumulation
# dtype; positive [M] int64, the column of each row's pair; ids [2, N] int32 or empty: two pairs
# that share an id of either kind are not negatives of each other; mask [M, N] bool or empty: false
# where a pair is no negative. The states count the pairs that ids and mask leave.
register.define(
    "dro_contrastive_stats_(Tensor(a!) rows, Tensor(b!) columns, Tensor image, Tensor text, "
    "Tensor row_a, Tensor column_a, Tensor positive, Tensor ids, Tensor mask, "
    "bool include_positive, bool keep) -> Tensor",
    _fake_stats,
    "dro_contrastive",
    chunked=True,
)
# (W text, W^T image) scale with W_ij = q_i 2^(S_ij a_i - m_i) + q_j 2^(S_ij a_j - m_j), less
# total_i at the positive. rows and columns: [3, M] and [3, N] of (a, m, q); total [M]; pair [N]
# int32, the row whose positive a column is, or -1. The second stays in the accumulation dtype with
# wide_text.
register.define(
    "dro_contrastive_grad(Tensor image, Tensor text, Tensor similarity, Tensor rows, "
    "Tensor columns, Tensor total, Tensor positive, Tensor pair, Tensor ids, Tensor mask, "
    "bool include_positive, Tensor scale, bool wide_text, bool want_image, bool want_text) "
    "-> (Tensor, Tensor)",
    _fake_grad,
    "dro_contrastive",
    chunked=True,
)
# One tile of each: of the states, which are updated in the order of the calls, and of W before the
# total is taken off.
register.define(
    "similarity_stats_(Tensor(a!) rows, Tensor(b!) columns, Tensor similarity, int row_begin, "
    "int column_begin, Tensor row_a, Tensor column_a, Tensor positive, Tensor ids, Tensor mask, "
    "bool include_positive) -> ()",
    lambda *args: None,
    "dro_contrastive",
)
register.define(
    "similarity_weights_(Tensor(a!) weights, Tensor similarity, int row_begin, int column_begin, "
    "Tensor rows, Tensor columns, Tensor positive, Tensor ids, Tensor mask, "
    "bool include_positive) -> ()",
    lambda *args: None,
    "dro_contrastive",
)
