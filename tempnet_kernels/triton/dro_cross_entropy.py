"""The token loss in Triton: one visit where a row fits in registers, two through the L2 cache
above."""

import math

import torch
import triton
import triton.language as tl

from tempnet_kernels.core.checks import check_target
from tempnet_kernels.triton import device_of
from tempnet_kernels.triton.online_softmax import (
    EMPTY,
    LN2,
    LOG2E,
    centred,
    finish,
    merge_all,
    softcapped,
    update,
    weighted_exponent,
)

ROWS = 6  # fields of a row's result, in the order of the stores in _store_row
PARTS = tl.constexpr(7)  # of the state of some columns, in that of stats_kernel
ONE_PASS_COLUMNS = 32768  # 64 fp32 registers a thread at 16 warps
LANE = tl.constexpr(8)  # columns of a thread's online step: their maximum needs no other thread
NO_COLUMN = tl.constexpr(2**31 - 1)


def config(v, extras, capped=False):
    """(kernel, BLOCK, num_warps) for rows of ``v`` columns.

    ``extras``: label smoothing or argmax, which keep more of the row alive, and ``capped``, whose
    tanh does: a thread then holds fewer columns.
    """
    if v <= ONE_PASS_COLUMNS // (4 if capped else 2 if extras else 1):
        block = max(16, triton.next_power_of_2(v))
        return one_pass_kernel, block, min(16, max(1, block // (512 if capped else 1024)))
    return two_pass_kernel, *((2048, 8) if capped else (4096 if extras else 8192, 16))


def stats_config(v, extras, capped=False):
    """(BLOCK, num_warps) of stats_kernel."""
    most = 2048 if capped else 4096 if extras else 8192
    block = min(most, max(16, triton.next_power_of_2(v)))
    return block, min(16, max(1, block // 256))


def bwd_warps(capped):
    return 16 if capped else 8


@triton.jit
def _begin_row(
    target_ptr, target_stride, tau_ptr, tau_stride, scale_ptr, scale_stride, v, ignore_index
):
    """(row, target clamped to the row, tau or NaN for a bad row, scale, ignored)."""
    i = tl.program_id(0).to(tl.int64)
    y = tl.load(target_ptr + i * target_stride).to(tl.int64)
    tau = tl.load(tau_ptr + i * tau_stride)
    scale = tl.load(scale_ptr + i * scale_stride)
    ignored = y == ignore_index
    outside = (y < 0) | (y >= v)
    # A NaN temperature makes everything of the row NaN.
    good = (tau > 0) & (tau < float("inf")) & (ignored | (outside == 0))
    tau = tl.where(good, tau, float("nan"))
    return i, tl.where(outside, 0, y), tau, scale, ignored


@triton.jit
def _store_row(loss_ptr, rows_ptr, i, n, scale, loss, grad_tau, m, log2_s, entropy, log_prob):
    tl.store(loss_ptr + i, tl.where(scale == 0, 0.0, scale * loss))
    tl.store(rows_ptr + i, loss)
    tl.store(rows_ptr + n + i, tl.where(scale == 0, 0.0, scale * grad_tau))
    tl.store(rows_ptr + 2 * n + i, m)
    tl.store(rows_ptr + 3 * n + i, log2_s)
    tl.store(rows_ptr + 4 * n + i, entropy)
    tl.store(rows_ptr + 5 * n + i, log_prob)


@triton.jit
def _store_ignored(loss_ptr, rows_ptr, argmax_ptr, grad_ptr, i, n, v, WANT_GRAD: tl.constexpr,
                   WANT_ARGMAX: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    nan = float("nan")
    _store_row(loss_ptr, rows_ptr, i, n, 0.0, 0.0, 0.0, nan, nan, nan, nan)
    if WANT_ARGMAX:
        tl.store(argmax_ptr + i, -1)
    if WANT_GRAD:
        for start in range(0, v, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            tl.store(
                grad_ptr + columns, tl.zeros([BLOCK], grad_ptr.dtype.element_ty), mask=columns < v
            )


@triton.jit
def _gradient(e, slope, columns, y, z_y, a, m, inverse_s, c, scale, v, label_smoothing):
    """scale * (c p - q) * slope with p = e / s; the target's column in fp32, since p_y - 1
    cancels."""
    p_y = tl.exp2(centred(z_y, a, m)) * inverse_s
    # Of one column exactly, however a GPU rounds the exponential and its inverse; NaN stays.
    p_y = tl.where((v == 1) & (p_y > 0), 1.0, p_y)
    grad_y = scale * ((c * p_y - 1) + label_smoothing * (1 - 1 / v))
    grad = e * (scale * c * inverse_s) - scale * label_smoothing / v
    grad = tl.where(columns == y, grad_y, grad) * slope
    return tl.where(scale == 0, 0.0, grad)


@triton.jit
def one_pass_kernel(
    logits_ptr, logits_stride, grad_ptr, grad_stride, target_ptr, target_stride, tau_ptr,
    tau_stride, scale_ptr, scale_stride, loss_ptr, rows_ptr, argmax_ptr, n, v, ignore_index, rho,
    log_v, label_smoothing, z_loss, UNSCALED: tl.constexpr, WANT_GRAD: tl.constexpr,
    WANT_ARGMAX: tl.constexpr, SMOOTH: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i, y, tau, scale, ignored = _begin_row(
        target_ptr, target_stride, tau_ptr, tau_stride, scale_ptr, scale_stride, v, ignore_index
    )
    grad_ptr += i * grad_stride
    if ignored:
        _store_ignored(
            loss_ptr, rows_ptr, argmax_ptr, grad_ptr, i, n, v, WANT_GRAD, WANT_ARGMAX, BLOCK
        )
        return
    logits_ptr += i * logits_stride
    columns = tl.arange(0, BLOCK)
    inside = columns < v
    a = LOG2E / tau
    given = tl.load(logits_ptr + columns, mask=inside, other=float("-inf")).to(tl.float32)
    z, slope = softcapped(given, inside, SOFTCAP)  # (BLOCK,)
    z_y = softcapped(tl.load(logits_ptr + y).to(tl.float32), True, SOFTCAP)[0]
    zmax = tl.max(z, 0)  # drops NaN, which reaches s
    m = tl.maximum(zmax * a, EMPTY)
    u = centred(z, a, m)  # (BLOCK,), -inf outside
    e = tl.exp2(u)
    s = tl.sum(e, 0)
    sx = tl.sum(weighted_exponent(e, u), 0)
    mean_u = 0.0
    if SMOOTH:
        mean_u = tl.sum(tl.where(inside, u, 0.0), 0) / v
    loss, grad_tau, log2_s, entropy, log_prob, c = finish(
        m, s, sx, zmax, z_y, mean_u, a, tau, rho, log_v, label_smoothing, z_loss
    )
    _store_row(loss_ptr, rows_ptr, i, n, scale, loss, grad_tau, m, log2_s, entropy, log_prob)
    if WANT_ARGMAX:
        first = tl.min(tl.where(given == tl.max(given, 0), columns, NO_COLUMN), 0)
        finite = (log2_s - log2_s) == 0
        tl.store(argmax_ptr + i, tl.where(finite, first, -1).to(tl.int64))
    if WANT_GRAD:
        stored = scale
        if UNSCALED:
            stored = tl.where(scale == 0, 0.0, 1.0)
        grad = _gradient(e, slope, columns, y, z_y, a, m, 1 / s, c, stored, v, label_smoothing)
        tl.debug_barrier()  # in place: the target's logit is read by every thread before any store
        tl.store(grad_ptr + columns, grad.to(grad_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _reduce_row(
    logits_ptr, v, a, WANT_ARGMAX: tl.constexpr, SMOOTH: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """(m, s, sx, largest logit given, mean of u, its first column) of a row of any length."""
    LANES: tl.constexpr = BLOCK // LANE
    tile = tl.arange(0, LANES)[:, None] * LANE + tl.arange(0, LANE)[None, :]  # (LANES, LANE)
    m = tl.full([LANES], EMPTY, tl.float32)
    s = tl.zeros([LANES], tl.float32)
    sx = tl.zeros([LANES], tl.float32)
    sz = tl.zeros([LANES], tl.float32)  # sum of a (z - z_0), for label smoothing
    zmax = tl.full([LANES], float("-inf"), tl.float32)
    first = tl.full([LANES], NO_COLUMN, tl.int32)
    z_0 = softcapped(tl.load(logits_ptr).to(tl.float32), True, SOFTCAP)[0]
    z_0 = tl.where(z_0 == float("-inf"), 0.0, z_0)  # -inf - -inf is NaN
    for start in range(0, v, BLOCK):
        columns = start + tile
        inside = columns < v
        given = tl.load(
            logits_ptr + columns, mask=inside, other=float("-inf"), eviction_policy="evict_last"
        ).to(tl.float32)
        z = softcapped(given, inside, SOFTCAP)[0]
        m_new = tl.maximum(m, tl.max(z, 1) * a)
        z_lane = tl.max(given, 1)
        u = centred(z, a, m_new[:, None])
        e = tl.exp2(u)
        m, s, sx = update(m, s, sx, m_new, tl.sum(e, 1), tl.sum(weighted_exponent(e, u), 1))
        if SMOOTH:
            sz += tl.sum(tl.where(inside, z - z_0, 0.0), 1)
        if WANT_ARGMAX:
            candidate = tl.min(tl.where(given == z_lane[:, None], columns, NO_COLUMN), 1)
            first = tl.where(z_lane > zmax, candidate, first)
        zmax = tl.maximum(zmax, z_lane)
    m, s, sx = merge_all(m, s, sx)
    z_row = tl.max(zmax, 0)
    column = tl.min(tl.where(zmax == z_row, first, NO_COLUMN), 0)
    mean_u = 0.0
    if SMOOTH:
        mean_u = centred(z_0, a, m) + a * tl.sum(sz, 0) / v
    return m, s, sx, z_row, mean_u, column


@triton.jit
def two_pass_kernel(
    logits_ptr, logits_stride, grad_ptr, grad_stride, target_ptr, target_stride, tau_ptr,
    tau_stride, scale_ptr, scale_stride, loss_ptr, rows_ptr, argmax_ptr, n, v, ignore_index, rho,
    log_v, label_smoothing, z_loss, UNSCALED: tl.constexpr, WANT_GRAD: tl.constexpr,
    WANT_ARGMAX: tl.constexpr, SMOOTH: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i, y, tau, scale, ignored = _begin_row(
        target_ptr, target_stride, tau_ptr, tau_stride, scale_ptr, scale_stride, v, ignore_index
    )
    grad_ptr += i * grad_stride
    if ignored:
        _store_ignored(
            loss_ptr, rows_ptr, argmax_ptr, grad_ptr, i, n, v, WANT_GRAD, WANT_ARGMAX, BLOCK
        )
        return
    logits_ptr += i * logits_stride
    a = LOG2E / tau
    z_y = softcapped(tl.load(logits_ptr + y).to(tl.float32), True, SOFTCAP)[0]

    m, s, sx, zmax, mean_u, first = _reduce_row(
        logits_ptr, v, a, WANT_ARGMAX, SMOOTH, SOFTCAP, BLOCK
    )
    zmax = softcapped(zmax, True, SOFTCAP)[0]
    loss, grad_tau, log2_s, entropy, log_prob, c = finish(
        m, s, sx, zmax, z_y, mean_u, a, tau, rho, log_v, label_smoothing, z_loss
    )
    _store_row(loss_ptr, rows_ptr, i, n, scale, loss, grad_tau, m, log2_s, entropy, log_prob)
    if WANT_ARGMAX:
        finite = (log2_s - log2_s) == 0
        tl.store(argmax_ptr + i, tl.where(finite, first, -1).to(tl.int64))
    if WANT_GRAD:
        stored = scale
        if UNSCALED:
            stored = tl.where(scale == 0, 0.0, 1.0)
        tl.debug_barrier()  # in place: the target's logit is read by every thread before any store
        for start in range(0, v, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < v
            z = tl.load(logits_ptr + columns, mask=inside, other=0.0, eviction_policy="evict_first")
            z, slope = softcapped(z.to(tl.float32), inside, SOFTCAP)
            e = tl.exp2(centred(z, a, m))
            grad = _gradient(e, slope, columns, y, z_y, a, m, 1 / s, c, stored, v, label_smoothing)
            tl.store(grad_ptr + columns, grad.to(grad_ptr.dtype.element_ty), mask=inside)


@triton.jit
def stats_kernel(
    logits_ptr, logits_stride, target_ptr, target_stride, tau_ptr, tau_stride, parts_ptr,
    argmax_ptr, n, v, ignore_index, begin, vocab_size, WANT_ARGMAX: tl.constexpr,
    SMOOTH: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The state of the columns [begin, begin + v) of vocab_size."""
    i, y, tau, _, ignored = _begin_row(
        target_ptr, target_stride, tau_ptr, tau_stride, tau_ptr, tau_stride, vocab_size,
        ignore_index,
    )  # fmt: skip
    parts_ptr += i
    if ignored | (tau != tau):
        for field in range(PARTS):
            tl.store(parts_ptr + field * n, float("nan"))
        if WANT_ARGMAX:
            tl.store(argmax_ptr + i, -1)
        return
    logits_ptr += i * logits_stride
    a = LOG2E / tau
    y -= begin
    z_y = tl.load(logits_ptr + y, mask=(y >= 0) & (y < v), other=float("-inf")).to(tl.float32)
    m, s, sx, zmax, mean_u, first = _reduce_row(
        logits_ptr, v, a, WANT_ARGMAX, SMOOTH, SOFTCAP, BLOCK
    )
    tl.store(parts_ptr, zmax)
    zmax = softcapped(zmax, True, SOFTCAP)[0]
    tl.store(parts_ptr + n, m)
    tl.store(parts_ptr + 2 * n, centred(zmax, a, m))
    tl.store(parts_ptr + 3 * n, s)
    tl.store(parts_ptr + 4 * n, sx)
    tl.store(parts_ptr + 5 * n, z_y)
    tl.store(parts_ptr + 6 * n, mean_u)
    if WANT_ARGMAX:
        tl.store(argmax_ptr + i, begin + first.to(tl.int64))


@triton.jit
def bwd_kernel(
    logits_ptr, logits_stride, grad_ptr, grad_stride, target_ptr, target_stride, tau_ptr,
    tau_stride, scale_ptr, scale_stride, rows_ptr, n, v, ignore_index, label_smoothing, z_loss,
    begin, vocab_size, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i, y, tau, scale, ignored = _begin_row(
        target_ptr, target_stride, tau_ptr, tau_stride, scale_ptr, scale_stride, vocab_size,
        ignore_index,
    )  # fmt: skip
    grad_ptr += i * grad_stride
    logits_ptr += i * logits_stride
    start = tl.program_id(1) * BLOCK
    columns = start + tl.arange(0, BLOCK)
    inside = columns < v
    if ignored:
        tl.store(grad_ptr + columns, tl.zeros([BLOCK], grad_ptr.dtype.element_ty), mask=inside)
        return
    m = tl.load(rows_ptr + 2 * n + i)
    log2_s = tl.load(rows_ptr + 3 * n + i)
    a = LOG2E / tau
    c = 1 + 2 * z_loss * LN2 * (m + log2_s) / tau
    z = tl.load(logits_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    z, slope = softcapped(z, inside, SOFTCAP)
    y -= begin
    # Only of this program's columns: in place, another one overwrites the others.
    own = (y >= start) & (y < start + BLOCK) & (y < v)
    z_y = softcapped(tl.load(logits_ptr + y, mask=own, other=0.0).to(tl.float32), True, SOFTCAP)[0]
    e = tl.exp2(centred(z, a, m))
    grad = _gradient(
        e, slope, columns, y, z_y, a, m, tl.exp2(-log2_s), c, scale, vocab_size, label_smoothing
    )
    tl.debug_barrier()  # in place: the target's logit is read by every thread before any store
    tl.store(grad_ptr + columns, grad.to(grad_ptr.dtype.element_ty), mask=inside)


@triton.jit
def scale_kernel(grad_ptr, grad_stride, scale_ptr, scale_stride, v, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    scale = tl.load(scale_ptr + i * scale_stride)
    if scale == 1:
        return
    pointers = grad_ptr + i * grad_stride + tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK) < v
    grad = tl.load(pointers, mask=inside, other=0.0).to(tl.float32) * scale
    grad = tl.where(scale == 0, 0.0, grad)  # also where the gradient is NaN
    tl.store(pointers, grad.to(grad_ptr.dtype.element_ty), mask=inside)


ELEMENTWISE_BLOCK = 8192


def _forward(
    logits, grad, target, tau, scale, rho, ignore_index, label_smoothing, z_loss, softcap,
    want_argmax,
):  # fmt: skip
    """(loss, rows, argmax); writes the gradient into ``grad`` where it is not None."""
    n, v = logits.shape
    check_target(target, v, ignore_index)
    loss = torch.empty(n, dtype=torch.float32, device=logits.device)
    rows = loss.new_empty(ROWS, n)
    argmax = torch.empty(n if want_argmax else 0, dtype=torch.int64, device=logits.device)
    kernel, block, num_warps = config(v, want_argmax or label_smoothing > 0, softcap > 0)
    out = logits if grad is None else grad
    if n:
        with device_of(logits):
            kernel[(n,)](
                logits, logits.stride(0), out, out.stride(0), target, target.stride(0),
                tau, tau.stride(0), scale, scale.stride(0), loss, rows, argmax, n, v,
                ignore_index, rho, math.log(v), label_smoothing, z_loss,
                UNSCALED=logits.dtype == torch.float16, WANT_GRAD=grad is not None,
                WANT_ARGMAX=want_argmax, SMOOTH=label_smoothing > 0, SOFTCAP=softcap, BLOCK=block,
                num_warps=num_warps, num_stages=1,
            )  # fmt: skip
    return loss, rows, argmax


def dro_cross_entropy_fwd(logits, target, tau, scale, *options):
    *numbers, want_grad, want_argmax = options
    n, v = logits.shape
    grad = logits.new_empty((n if want_grad else 0, v))
    wanted = grad if want_grad else None
    return grad, *_forward(logits, wanted, target, tau, scale, *numbers, want_argmax)


def dro_cross_entropy_fwd_(logits, *args):
    return _forward(logits, logits, *args)


def dro_cross_entropy_stats(
    logits, target, tau, ignore_index, softcap, begin, vocab_size, want_mean, want_argmax
):
    n, v = logits.shape
    parts = tau.new_empty(PARTS.value, n)
    argmax = torch.empty(n if want_argmax else 0, dtype=torch.int64, device=logits.device)
    block, num_warps = stats_config(v, want_argmax or want_mean, softcap > 0)
    if n:
        with device_of(logits):
            stats_kernel[(n,)](
                logits, logits.stride(0), target, target.stride(0), tau, tau.stride(0), parts,
                argmax, n, v, ignore_index, begin, vocab_size, WANT_ARGMAX=want_argmax,
                SMOOTH=want_mean, SOFTCAP=softcap, BLOCK=block, num_warps=num_warps, num_stages=1,
            )  # fmt: skip
    return parts, argmax


def dro_cross_entropy_bwd(logits, *args):
    grad = logits.new_empty(logits.shape)
    _backward(logits, grad, *args)
    return grad


def dro_cross_entropy_bwd_(logits, *args):
    _backward(logits, logits, *args)


def _backward(
    logits, grad, target, tau, scale, rows, ignore_index, label_smoothing, z_loss, softcap, begin,
    vocab_size,
):  # fmt: skip
    n, v = logits.shape
    check_target(target, vocab_size, ignore_index)
    if n:
        with device_of(logits):
            bwd_kernel[(n, triton.cdiv(v, ELEMENTWISE_BLOCK))](
                logits, logits.stride(0), grad, grad.stride(0), target, target.stride(0), tau,
                tau.stride(0), scale, scale.stride(0), rows, n, v, ignore_index, label_smoothing,
                z_loss, begin, vocab_size, SOFTCAP=softcap, BLOCK=ELEMENTWISE_BLOCK,
                num_warps=bwd_warps(softcap > 0),
            )  # fmt: skip


def scale_rows_(grad, scale):
    n, v = grad.shape
    if n:
        with device_of(grad):
            scale_kernel[(n, triton.cdiv(v, ELEMENTWISE_BLOCK))](
                grad, grad.stride(0), scale, scale.stride(0), v,
                BLOCK=ELEMENTWISE_BLOCK, num_warps=8,
            )  # fmt: skip
