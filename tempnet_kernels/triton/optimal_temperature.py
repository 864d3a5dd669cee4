"""The optimal temperature in Triton: a program per row, which stays in registers where it fits and
is read again from the L2 cache in every iteration above."""

import math

import torch
import triton
import triton.language as tl

from tempnet_kernels.triton import device_of
from tempnet_kernels.triton.online_softmax import LN2, LOG2E, weighted_exponent

HELD_COLUMNS = 32768  # 64 fp32 registers a thread at 16 warps
# Columns that a thread sums by themselves: the fewer terms one after the other, the less equal ones
# add to a rounding that is always the same.
LANE = tl.constexpr(8)
MOST_EVALUATIONS = tl.constexpr(30)
TOLERANCE = tl.constexpr(3e-6)  # of |kl - rho|, in nats: about three times the rounding of kl
LARGEST = tl.constexpr(3.4028234663852886e38)


def config(v):
    """(HELD, BLOCK, num_warps) for rows of ``v`` columns."""
    if v <= HELD_COLUMNS:
        block = max(16, triton.next_power_of_2(v))
        return True, block, min(16, max(1, block // 1024))
    return False, 8192, 16


@triton.jit
def _clamped(x, tau_min, tau_max):
    """Comparisons keep NaN."""
    return tl.where(x < tau_min, tau_min, tl.where(x > tau_max, tau_max, x))


@triton.jit
def _begin(count, total, squares, rho, v, log_v, tau_min, tau_max):
    """The first tau: where a row of normal logits has kl = rho. From the number of finite d, their
    sum and that of their squares."""
    mean = total / count
    variance = squares / count - mean * mean
    excess = rho + LN2 * tl.log2(count / v)
    tau = tl.where(excess > 0, tl.sqrt(variance / (2 * excess)), tau_max)
    # No kl is above log V, and kl of equal logits does not depend on tau.
    tau = tl.where((rho < log_v) & (variance > 0), tau, tau_min)
    return _clamped(tau, tau_min, tau_max)


@triton.jit
def _next(s, sx, sxx, tau, low, high, last, before, rho, v, log_v, tau_min, tau_max):
    """The step of csrc/temperature_search.h: (tau, kl, whether to go on, low, high, last,
    before)."""
    mean = tl.div_rn(sx, s)  # up to log2 V: 2 ulp are 3e-6
    kl = LN2 * (mean - tl.log2(s / v))
    kl = tl.where(kl < 0, 0.0, tl.where(kl > log_v, log_v, kl))
    excess = kl - rho
    error = tl.abs(excess)
    clipped = tl.where(excess > 0, tau >= tau_max, tau <= tau_min)
    low = tl.where(excess > 0, tau, low)
    high = tl.where(excess > 0, high, tau)

    slope = LN2 * LN2 * (sxx / s - mean * mean)
    rest = log_v - kl
    odds = kl * (log_v - rho) / (rest * rho)
    to = _clamped(tau * tl.exp2(tl.log2(odds) * kl * rest / (log_v * slope)), tau_min, tau_max)
    # kl is 0 or log V, all there can be: nothing says how far the root is.
    to = tl.where(to > 0, to, tl.where(excess > 0, tau_max, tau_min))
    halve = (error > 0.9 * before) | (low >= to) | (to >= high)
    middle = tl.sqrt(_clamped(low, tau_min, tau_max)) * tl.sqrt(_clamped(high, tau_min, tau_max))
    to = tl.where(halve, middle, to)
    before = tl.where(halve, float("inf"), last)
    last = tl.where(halve, float("inf"), error)
    going = (error > TOLERANCE) & (clipped == 0) & (low < to) & (to < high)
    tau = tl.where(error >= 0, tl.where(going, to, tau), float("nan"))
    return tau, tl.where(error >= 0, kl, float("nan")), going, low, high, last, before


@triton.jit
def _lane_sums(d, a, WEIGHTED: tl.constexpr):
    """Over axis 1, of 2^u, 2^u u and 2^u u^2; unweighted of 1, d and d^2 of the finite ones."""
    if WEIGHTED:
        u = d * a
        e = tl.exp2(u)
        ex = weighted_exponent(e, u)
        return tl.sum(e, 1), tl.sum(ex, 1), tl.sum(weighted_exponent(ex, u), 1)
    else:
        finite = d >= -LARGEST
        x = tl.where(finite, d, 0.0)
        return tl.sum(tl.where(finite, 1.0, 0.0), 1), tl.sum(x, 1), tl.sum(x * x, 1)


@triton.jit
def _tile(logits_ptr, start, v, HELD: tl.constexpr, BLOCK: tl.constexpr):
    """(BLOCK // LANE, LANE) logits of a row from a column on, -inf outside."""
    lane = tl.arange(0, BLOCK // LANE)[:, None] * LANE + tl.arange(0, LANE)[None, :]
    columns = start + lane
    policy: tl.constexpr = "evict_first" if HELD else "evict_last"
    return tl.load(
        logits_ptr + columns, mask=columns < v, other=float("-inf"), eviction_policy=policy
    ).to(tl.float32)


@triton.jit
def _sums(d, logits_ptr, zmax, v, a, WEIGHTED: tl.constexpr, HELD: tl.constexpr,
          BLOCK: tl.constexpr):  # fmt: skip
    """The sums over the row, whose d = z - zmax is in registers, or which is read again."""
    if HELD:
        s, sx, sxx = _lane_sums(d, a, WEIGHTED)
    else:
        s = tl.zeros([BLOCK // LANE], tl.float32)
        sx = tl.zeros([BLOCK // LANE], tl.float32)
        sxx = tl.zeros([BLOCK // LANE], tl.float32)
        for start in range(0, v, BLOCK):
            t, tx, txx = _lane_sums(_tile(logits_ptr, start, v, HELD, BLOCK) - zmax, a, WEIGHTED)
            s += t
            sx += tx
            sxx += txx
    return tl.sum(s, 0), tl.sum(sx, 0), tl.sum(sxx, 0)


@triton.jit
def temperature_kernel(
    logits_ptr, logits_stride, rho_ptr, rho_stride, tau_ptr, kl_ptr, iterations_ptr, v, log_v,
    tau_min, tau_max, HELD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    logits_ptr += i * logits_stride
    rho = tl.load(rho_ptr + i * rho_stride)
    rho = tl.where(rho >= 0, rho, float("nan"))
    d = _tile(logits_ptr, 0, v, HELD, BLOCK)  # of a row that is not held, for the maximum only
    highest = tl.max(d, 1)  # drops NaN, which reaches s
    if not HELD:
        for start in range(BLOCK, v, BLOCK):
            highest = tl.maximum(highest, tl.max(_tile(logits_ptr, start, v, HELD, BLOCK), 1))
    zmax = tl.max(highest, 0)
    d -= zmax
    count, total, squares = _sums(d, logits_ptr, zmax, v, 1.0, False, HELD, BLOCK)
    tau = _begin(count, total, squares, rho, v, log_v, tau_min, tau_max)
    kl = rho
    low = 0.0 * log_v
    high = low + float("inf")
    last = high
    before = high
    evaluations = 0
    going = evaluations == 0
    while going:
        # Not /, which errs by 2 ulp: in a row of one logit at log V above the others, where the
        # variance is 35, that is 8e-6 of kl.
        a = tl.div_rn(LOG2E, tau)
        s, sx, sxx = _sums(d, logits_ptr, zmax, v, a, True, HELD, BLOCK)
        at = tau
        tau, kl, going, low, high, last, before = _next(
            s, sx, sxx, tau, low, high, last, before, rho, v, log_v, tau_min, tau_max
        )
        evaluations += 1
        if going & (evaluations == MOST_EVALUATIONS):
            tau = at  # kl is that of
            going = evaluations == 0
    tl.store(tau_ptr + i, tau)
    tl.store(kl_ptr + i, kl)
    tl.store(iterations_ptr + i, evaluations)


def optimal_temperature(logits, rho, tau_min, tau_max):
    n, v = logits.shape
    tau = torch.empty(n, dtype=torch.float32, device=logits.device)
    kl = torch.empty_like(tau)
    iterations = torch.empty(n, dtype=torch.int32, device=logits.device)
    held, block, num_warps = config(v)
    if n:
        with device_of(logits):
            temperature_kernel[(n,)](
                logits, logits.stride(0), rho, rho.stride(0), tau, kl, iterations, v, math.log(v),
                tau_min, tau_max, HELD=held, BLOCK=block, num_warps=num_warps, num_stages=1,
            )  # fmt: skip
    return tau, kl, iterations
