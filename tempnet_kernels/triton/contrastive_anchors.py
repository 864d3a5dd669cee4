"""What stands before and behind the tiles of the contrastive loss in Triton: the states that they
begin with, what the anchors make of them, and the positives' share of the gradients."""

import math

import torch
import triton
import triton.language as tl

from tempnet_kernels.triton import device_of
from tempnet_kernels.triton.online_softmax import EMPTY, LN2, LOG2E

BLOCK = 128  # anchors of a program
NUM_WARPS = 4
FEATURES = 512  # of a row at a time
NO_ANCHOR = tl.constexpr(1e-30)
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _store_empty(states_ptr, size, at, inside, count):
    """AnchorState of no pair, with the number of pairs."""
    tl.store(states_ptr + at, EMPTY, mask=inside)
    tl.store(states_ptr + size + at, 0.0, mask=inside)
    tl.store(states_ptr + 2 * size + at, 0.0, mask=inside)
    tl.store(states_ptr + 3 * size + at, count, mask=inside)
    tl.store(states_ptr + 4 * size + at, 0.0, mask=inside)


@triton.jit(do_not_specialize=["m", "n", "columns", "begin"])
def start_kernel(
    tau_image_ptr, tau_image_stride, tau_text_ptr, tau_text_stride, given_ptr, row_a_ptr,
    column_a_ptr, rows_ptr, columns_ptr, positive_ptr, pair_ptr, m, n, columns, begin,
    GIVEN: tl.constexpr, EVERY_PAIR: tl.constexpr, EXCLUDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_rows, in_columns = t < m, t < columns
    place = t
    if GIVEN:
        place = tl.load(given_ptr + t, mask=in_rows, other=0)
    inside = (place >= 0) & (place < n)
    tau = tl.load(tau_image_ptr + t * tau_image_stride, mask=in_rows, other=1.0)
    tl.store(row_a_ptr + t, tl.where(inside, tl.div_rn(LOG2E, tau), float("nan")), mask=in_rows)
    place = tl.minimum(tl.maximum(place, 0), n - 1)
    tl.store(positive_ptr + t, begin + place, mask=in_rows)
    count = tl.zeros([BLOCK], tl.float32)
    if EVERY_PAIR:
        count += columns - EXCLUDED
    _store_empty(rows_ptr, m, t, in_rows, count)

    own = t - begin
    paired = (own >= 0) & (own < m) & (not GIVEN)  # given, the rows know: pair_columns_kernel
    tl.store(pair_ptr + t, tl.where(paired, own, -1).to(tl.int32), mask=in_columns)
    # Not every column is one of these rows' pairs: the other ranks have theirs.
    count = tl.zeros([BLOCK], tl.float32)
    if EVERY_PAIR:
        count += m - tl.where(paired, EXCLUDED, 0)
    _store_empty(columns_ptr, columns, t, in_columns, count)
    tau = tl.load(tau_text_ptr + own * tau_text_stride, mask=paired & in_columns, other=1.0)
    a = tl.where(paired, tl.div_rn(LOG2E, tau), NO_ANCHOR)
    tl.store(column_a_ptr + own, a, mask=in_columns & (own >= 0) & (own < n))


@triton.jit(do_not_specialize=["m", "n", "columns", "begin"])
def pair_columns_kernel(
    tau_text_ptr, tau_text_stride, column_a_ptr, columns_ptr, given_ptr, pair_ptr, m, n, columns,
    begin, COUNTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Tells the columns whose pair they are, after ``start_kernel``."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(given_ptr + i, mask=i < m, other=-1)
    inside = (place >= 0) & (place < n)
    tl.store(pair_ptr + begin + place, i.to(tl.int32), mask=inside)
    tau = tl.load(tau_text_ptr + i * tau_text_stride, mask=inside, other=1.0)
    tl.store(column_a_ptr + place, tl.div_rn(LOG2E, tau), mask=inside)
    if COUNTED:
        count = tl.zeros([BLOCK], tl.float32) + (m - 1)
        tl.store(columns_ptr + 3 * columns + begin + place, count, mask=inside)


@triton.jit
def _expm1(x):
    small = x * (1 + x * (0.5 + x * (1.0 / 6 + x * (1.0 / 24))))
    return tl.where(tl.abs(x) < 1e-3, small, tl.exp(x) - 1)


@triton.jit
def _log_of_sum(x, y):
    """log(e^x + e^y)"""
    larger = tl.where(x > y, x, y)
    return tl.where(x == y, x + LN2, larger + tl.log(1 + tl.exp(-tl.abs(x - y))))


@triton.jit
def _anchors(
    states_ptr, size, at, inside, s_positive, a, tau_ptr, tau_stride, log_s_ptr, i, gamma, rho,
    log_gamma, log_rest, HAS_LOG_S: tl.constexpr,
):  # fmt: skip
    """csrc/contrastive_anchors.h, anchor_result, in float64: (term, log_s, kl, k, q, total, live,
    m)."""
    m = tl.load(states_ptr + at, mask=inside, other=0.0)
    s = tl.load(states_ptr + size + at, mask=inside, other=1.0).to(tl.float64)
    sx = tl.load(states_ptr + 2 * size + at, mask=inside, other=0.0).to(tl.float64)
    count = tl.load(states_ptr + 3 * size + at, mask=inside, other=1.0).to(tl.float64)
    tau = tl.load(tau_ptr + i * tau_stride, mask=inside, other=1.0).to(tl.float64)
    live = count > 0
    shift = m.to(tl.float64) - s_positive.to(tl.float64) * a.to(tl.float64)
    mean = sx / s
    log_n, log2_s = tl.log(count), tl.log2(s)
    log_g = LN2 * (log2_s + shift)
    entropy = LN2 * (log2_s - mean)
    entropy = tl.where(entropy < 0, 0.0, tl.where(entropy > log_n, log_n, entropy))
    log_s = log_g
    old = tl.full(at.shape, float("nan"), tl.float64)
    if HAS_LOG_S:
        old = tl.load(log_s_ptr + i, mask=inside, other=0.0).to(tl.float64)
        averaged = log_g + log_gamma
        averaged = tl.where(gamma < 1, _log_of_sum(old + log_rest, averaged), averaged)
        log_s = tl.where(old == old, averaged, log_g)
    kl = log_n - entropy
    behind = log_g - log_s  # exactly 0 for gamma = 1 and on a first visit
    total = tl.exp(behind)
    term = tau * (log_s - log_n + rho)
    k = rho - kl - behind - _expm1(behind) * LN2 * (mean + shift)
    # What is not finite must not reach the state.
    log_s = tl.where(live & (tl.abs(log_s) < INFINITY), log_s, old)
    good = (a > 0) & (a < INFINITY)
    term = tl.where(live, tl.where(good, term, float("nan")), 0.0)
    kl = tl.where(live & good, kl, float("nan"))
    k = tl.where(live, tl.where(good, k, float("nan")), 0.0)
    q = tl.where(live, tl.where(good, total / s, float("nan")), 0.0)
    total = tl.where(live, tl.where(good, total, float("nan")), 0.0)
    return term, log_s, kl, k, q, total, live, m


@triton.jit
def _store_parameters(parameters_ptr, size, at, inside, a, m, q, live):
    """AnchorParameters."""
    tl.store(parameters_ptr + at, tl.where(live, a, NO_ANCHOR), mask=inside)
    tl.store(parameters_ptr + size + at, tl.where(live, m, 0.0), mask=inside)
    tl.store(parameters_ptr + 2 * size + at, q, mask=inside)


@triton.jit(do_not_specialize=["m", "n", "begin"])
def anchors_kernel(
    rows_ptr, columns_ptr, row_a_ptr, column_a_ptr, tau_image_ptr, tau_image_stride, tau_text_ptr,
    tau_text_stride, positive_ptr, pair_ptr, log_s_image_ptr, log_s_text_ptr, stats_ptr, term_ptr,
    total_ptr, row_parameters_ptr, column_parameters_ptr, m, n, begin, gamma, rho, log_gamma,
    log_rest, HAS_IMAGE: tl.constexpr, HAS_TEXT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Both anchors of every pair, and the columns that are no anchor."""
    t = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    unpaired = (t < n) & (tl.load(pair_ptr + begin + t, mask=t < n, other=0) < 0)
    _store_parameters(column_parameters_ptr, n, t, unpaired, NO_ANCHOR, 0.0, 0.0, unpaired)
    inside = t < m
    y = tl.load(positive_ptr + t, mask=inside, other=0) - begin
    s_positive = tl.load(rows_ptr + 4 * m + t, mask=inside, other=0.0)
    a = tl.load(row_a_ptr + t, mask=inside, other=1.0)
    term, log_s, kl, k, q, total, live, top = _anchors(
        rows_ptr, m, t, inside, s_positive, a, tau_image_ptr, tau_image_stride, log_s_image_ptr, t,
        gamma, rho, log_gamma, log_rest, HAS_IMAGE,
    )  # fmt: skip
    _store_parameters(row_parameters_ptr, m, t, inside, a, top, q, live)
    tl.store(stats_ptr + t, log_s.to(tl.float32), mask=inside)
    tl.store(stats_ptr + 2 * m + t, kl.to(tl.float32), mask=inside)
    tl.store(stats_ptr + 4 * m + t, k.to(tl.float32), mask=inside)
    a = tl.load(column_a_ptr + y, mask=inside, other=1.0)
    text_term, log_s, kl, k, q, text_total, live, top = _anchors(
        columns_ptr, n, y, inside, s_positive, a, tau_text_ptr, tau_text_stride, log_s_text_ptr, t,
        gamma, rho, log_gamma, log_rest, HAS_TEXT,
    )  # fmt: skip
    _store_parameters(column_parameters_ptr, n, y, inside, a, top, q, live)
    tl.store(stats_ptr + m + t, log_s.to(tl.float32), mask=inside)
    tl.store(stats_ptr + 3 * m + t, kl.to(tl.float32), mask=inside)
    tl.store(stats_ptr + 5 * m + t, k.to(tl.float32), mask=inside)
    tl.store(term_ptr + t, (term + text_term).to(tl.float32), mask=inside)
    tl.store(total_ptr + t, (total + text_total).to(tl.float32), mask=inside)


@triton.jit
def _gradient_row(
    grad_ptr, sum_ptr, others_ptr, other, total, inverse, scale, r, d, FEATURES: tl.constexpr
):
    for start in range(0, d, FEATURES):
        k = start + tl.arange(0, FEATURES)
        x = tl.load(sum_ptr + r * d + k, mask=k < d, other=0.0) * inverse
        x -= total * tl.load(others_ptr + other * d + k, mask=k < d, other=0.0).to(tl.float32)
        tl.store(grad_ptr + r * d + k, (x * scale).to(grad_ptr.dtype.element_ty), mask=k < d)


@triton.jit(do_not_specialize=["images"])
def gradients_kernel(
    grad_image_ptr, grad_text_ptr, image_sum_ptr, text_sum_ptr, image_ptr, text_ptr, total_ptr,
    positive_ptr, pair_ptr, unit_ptr, scale_ptr, images, d, HAS_UNIT: tl.constexpr,
    FEATURES: tl.constexpr,
):  # fmt: skip
    """A row of the images' gradient, of which there are `images`, or of the texts' behind them."""
    r = tl.program_id(0).to(tl.int64)
    scale, inverse = tl.load(scale_ptr), 1.0
    if HAS_UNIT:
        inverse = 1.0 / tl.load(unit_ptr)  # of a power of two
    if r < images:
        _gradient_row(
            grad_image_ptr, image_sum_ptr, text_ptr, tl.load(positive_ptr + r),
            tl.load(total_ptr + r), inverse, scale, r, d, FEATURES,
        )  # fmt: skip
    else:
        r -= images
        i = tl.load(pair_ptr + r).to(tl.int64)
        if i < 0:
            _gradient_row(
                grad_text_ptr, text_sum_ptr, image_ptr, 0, 0.0, inverse, scale, r, d, FEATURES
            )
        else:
            _gradient_row(
                grad_text_ptr, text_sum_ptr, image_ptr, i, tl.load(total_ptr + i), inverse, scale,
                r, d, FEATURES,
            )  # fmt: skip


def anchor_states(
    tau_image, tau_text, positive, text, candidates, begin, include_positive, every_pair
):
    m, n, all_n = tau_image.shape[0], text.shape[0], candidates.shape[0]
    row_a, column_a = tau_image.new_empty(m), tau_image.new_empty(n)
    rows, columns = tau_image.new_empty((5, m)), tau_image.new_empty((5, all_n))
    place = positive.new_empty(m)
    pair = positive.new_empty(all_n, dtype=torch.int32)
    if all_n == 0:
        return row_a, column_a, rows, columns, place, pair
    given, excluded = positive.numel() > 0, int(not include_positive)
    with device_of(tau_image):
        start_kernel[(triton.cdiv(all_n, BLOCK),)](
            tau_image, tau_image.stride(0), tau_text, tau_text.stride(0), positive, row_a, column_a,
            rows, columns, place, pair, m, n, all_n, begin, GIVEN=given, EVERY_PAIR=every_pair,
            EXCLUDED=excluded, BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip
        if given:
            pair_columns_kernel[(triton.cdiv(m, BLOCK),)](
                tau_text, tau_text.stride(0), column_a, columns, positive, pair, m, n, all_n,
                begin, COUNTED=every_pair and not include_positive, BLOCK=BLOCK,
                num_warps=NUM_WARPS,
            )  # fmt: skip
    return row_a, column_a, rows, columns, place, pair


def contrastive_anchors(
    rows, columns, row_a, column_a, tau_image, tau_text, positive, pair, log_s_image, log_s_text,
    begin, gamma, rho,
):  # fmt: skip
    m, n = row_a.shape[0], column_a.shape[0]
    stats, term, total = rows.new_empty((6, m)), rows.new_empty(m), rows.new_empty(m)
    row_parameters, column_parameters = rows.new_empty((3, m)), rows.new_empty((3, n))
    log_rest = math.log1p(-gamma) if gamma < 1 else -math.inf
    if n:
        with device_of(rows):
            anchors_kernel[(triton.cdiv(n, BLOCK),)](
                rows, columns, row_a, column_a, tau_image, tau_image.stride(0), tau_text,
                tau_text.stride(0), positive, pair, log_s_image, log_s_text, stats, term, total,
                row_parameters, column_parameters, m, n, begin, gamma, rho, math.log(gamma),
                log_rest, HAS_IMAGE=log_s_image.numel() > 0, HAS_TEXT=log_s_text.numel() > 0,
                BLOCK=BLOCK, num_warps=NUM_WARPS,
            )  # fmt: skip
    return stats, term, total, row_parameters, column_parameters


def pair_gradients_(
    grad_image, grad_text, image_sum, text_sum, image, text, total, positive, pair, unit, scale
):
    images = grad_image.shape[0] if grad_image.numel() else 0
    rows = images + (grad_text.shape[0] if grad_text.numel() else 0)
    d = image.shape[1]
    image, text = image.contiguous(), text.contiguous()
    if rows and d:
        with device_of(image):
            gradients_kernel[(rows,)](
                grad_image, grad_text, image_sum, text_sum, image, text, total, positive, pair,
                unit, scale, images, d, HAS_UNIT=unit.numel() > 0,
                FEATURES=min(FEATURES, max(16, triton.next_power_of_2(d))), num_warps=NUM_WARPS,
            )  # fmt: skip
