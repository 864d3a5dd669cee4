"""The tempered softmax in Triton: a row in registers where it fits, two visits through the L2 cache
above."""

import torch
import triton
import triton.language as tl

from tempnet_kernels.triton import device_of
from tempnet_kernels.triton.online_softmax import (
    EMPTY,
    LN2,
    LOG2E,
    centred,
    merge_all,
    update,
    weighted_exponent,
)

STATE = 3  # fields of a row, as in tempnet_kernels/ops/tempered_softmax.py
ONE_PASS_COLUMNS = {"forward": 32768, "backward": 8192}  # the backward holds two streams
LANE = tl.constexpr(8)  # columns of a thread's online step: their maximum needs no other thread


def config(v, direction):
    """(one pass, BLOCK, num_warps) for rows of ``v`` columns."""
    most = ONE_PASS_COLUMNS[direction]
    if v > most:
        return False, 8192 if direction == "forward" else 4096, 16
    block = max(16, triton.next_power_of_2(v))
    return True, block, min(16, max(1, block // (1024 if direction == "forward" else 512)))


@triton.jit
def _factors(tau_ptr, tau_stride, i):
    """(tau, log2(e) / tau): NaN for a bad temperature, and so is everything of the row.

    The divisions of a row's numbers are exact: a GPU's / errs by 2 ulp, and all of them together by
    more than the bound of the results.
    """
    tau = tl.load(tau_ptr + i * tau_stride)
    tau = tl.where((tau > 0) & (tau < float("inf")), tau, float("nan"))
    return tau, tl.div_rn(LOG2E, tau)


@triton.jit
def _load(row_ptr, columns, v, OTHER: tl.constexpr, POLICY: tl.constexpr):
    z = tl.load(row_ptr + columns, mask=columns < v, other=OTHER, eviction_policy=POLICY)
    return z.to(tl.float32)


@triton.jit
def _store_output(out_ptr, columns, v, z, zmax, a, tau, s, LOG: tl.constexpr):
    d = z - zmax
    out = d * tl.div_rn(1.0, tau) - LN2 * tl.log2(s) if LOG else tl.exp2(d * a) * tl.div_rn(1.0, s)
    tl.store(out_ptr + columns, out.to(out_ptr.dtype.element_ty), mask=columns < v)


@triton.jit
def forward_kernel(
    logits_ptr, logits_stride, out_ptr, tau_ptr, tau_stride, rows_ptr, n, v, LOG: tl.constexpr,
    ONE_PASS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    tau, a = _factors(tau_ptr, tau_stride, i)
    logits_ptr += i * logits_stride
    out_ptr += i * v
    if ONE_PASS:
        columns = tl.arange(0, BLOCK)
        z = _load(logits_ptr, columns, v, float("-inf"), "")  # (BLOCK,)
        zmax = tl.max(z, 0)  # drops NaN, which reaches s
        u = (z - zmax) * a
        e = tl.exp2(u)
        s = tl.sum(e, 0)
        mean = tl.div_rn(tl.div_rn(tl.sum(weighted_exponent(e, u), 0), s), a)
        _store_output(out_ptr, columns, v, z, zmax, a, tau, s, LOG)
    else:
        LANES: tl.constexpr = BLOCK // LANE
        tile = tl.arange(0, LANES)[:, None] * LANE + tl.arange(0, LANE)[None, :]  # (LANES, LANE)
        m = tl.full([LANES], EMPTY, tl.float32)
        s = tl.zeros([LANES], tl.float32)
        sx = tl.zeros([LANES], tl.float32)
        zmax = tl.full([LANES], float("-inf"), tl.float32)
        for start in range(0, v, BLOCK):
            z = _load(logits_ptr, start + tile, v, float("-inf"), "evict_last")
            z_lane = tl.max(z, 1)
            m_new = tl.maximum(m, z_lane * a)
            u = centred(z, a, m_new[:, None])
            e = tl.exp2(u)
            m, s, sx = update(m, s, sx, m_new, tl.sum(e, 1), tl.sum(weighted_exponent(e, u), 1))
            zmax = tl.maximum(zmax, z_lane)
        m, s, sx = merge_all(m, s, sx)
        zmax = tl.max(zmax, 0)
        # Relative to the largest logit itself and not to the rounded m.
        delta = centred(zmax, a, m)
        mean = tl.div_rn(tl.div_rn(sx, s) - delta, a)
        s = tl.div_rn(s, tl.exp2(delta))
        for start in range(0, v, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            z = _load(logits_ptr, columns, v, 0.0, "evict_first")
            _store_output(out_ptr, columns, v, z, zmax, a, tau, s, LOG)
    tl.store(rows_ptr + i, zmax)
    tl.store(rows_ptr + n + i, s)
    tl.store(rows_ptr + 2 * n + i, mean)


@triton.jit
def _weighted_upstream(z, g, zmax, a, LOG: tl.constexpr):
    """2^u g, or for the logarithm g. A term with a weight of 0 is 0."""
    if LOG:
        return g
    else:
        e = tl.exp2((z - zmax) * a)
        return tl.where(e == 0, 0.0, e * g)


@triton.jit
def _coefficients(z, g, zmax, a, s, total, LOG: tl.constexpr):
    """c_j, which over tau is the logit's gradient."""
    p = tl.exp2((z - zmax) * a) * tl.div_rn(1.0, s)
    if LOG:
        return g - p * total
    else:
        return tl.where(p == 0, 0.0, p * (g - total))


@triton.jit
def _covariance_terms(c, z, zmax, mean):
    return tl.where(c == 0, 0.0, c * (z - zmax - mean))  # 0 * -inf is NaN


@triton.jit
def backward_kernel(
    logits_ptr, logits_stride, upstream_ptr, upstream_stride, grad_ptr, tau_ptr, tau_stride,
    rows_ptr, grad_tau_ptr, n, v, LOG: tl.constexpr, WANT_GRAD: tl.constexpr,
    ONE_PASS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    tau, a = _factors(tau_ptr, tau_stride, i)
    logits_ptr += i * logits_stride
    upstream_ptr += i * upstream_stride
    grad_ptr += i * v
    zmax = tl.load(rows_ptr + i)
    s = tl.load(rows_ptr + n + i)
    mean = tl.load(rows_ptr + 2 * n + i)
    columns = tl.arange(0, BLOCK)
    if ONE_PASS:
        z = _load(logits_ptr, columns, v, float("-inf"), "")  # (BLOCK,)
        g = _load(upstream_ptr, columns, v, 0.0, "")
        total = tl.sum(_weighted_upstream(z, g, zmax, a, LOG), 0)
        if not LOG:
            total = tl.div_rn(total, s)
        c = _coefficients(z, g, zmax, a, s, total, LOG)
        covariance = tl.sum(_covariance_terms(c, z, zmax, mean), 0)
        if WANT_GRAD:
            grad = (c * tl.div_rn(1.0, tau)).to(grad_ptr.dtype.element_ty)
            tl.store(grad_ptr + columns, grad, mask=columns < v)
    else:
        sums = tl.zeros([BLOCK], tl.float32)
        for start in range(0, v, BLOCK):
            z = _load(logits_ptr, start + columns, v, float("-inf"), "evict_last")
            g = _load(upstream_ptr, start + columns, v, 0.0, "evict_last")
            sums += _weighted_upstream(z, g, zmax, a, LOG)
        total = tl.sum(sums, 0)
        if not LOG:
            total = tl.div_rn(total, s)
        sums = tl.zeros([BLOCK], tl.float32)
        for start in range(0, v, BLOCK):
            z = _load(logits_ptr, start + columns, v, float("-inf"), "evict_first")
            g = _load(upstream_ptr, start + columns, v, 0.0, "evict_first")
            c = _coefficients(z, g, zmax, a, s, total, LOG)
            sums += _covariance_terms(c, z, zmax, mean)
            if WANT_GRAD:
                grad = (c * tl.div_rn(1.0, tau)).to(grad_ptr.dtype.element_ty)
                tl.store(grad_ptr + start + columns, grad, mask=start + columns < v)
        covariance = tl.sum(sums, 0)
    tl.store(grad_tau_ptr + i, tl.div_rn(tl.div_rn(-covariance, tau), tau))


def tempered_softmax_fwd(logits, tau, log):
    n, v = logits.shape
    output = logits.new_empty((n, v))
    rows = torch.empty(STATE, n, dtype=torch.float32, device=logits.device)
    one_pass, block, num_warps = config(v, "forward")
    if n:
        with device_of(logits):
            forward_kernel[(n,)](
                logits, logits.stride(0), output, tau, tau.stride(0), rows, n, v, LOG=log,
                ONE_PASS=one_pass, BLOCK=block, num_warps=num_warps, num_stages=1,
            )  # fmt: skip
    return output, rows


def tempered_softmax_bwd(logits, tau, rows, grad_output, log, want_grad_logits):
    n, v = logits.shape
    grad_logits = logits.new_empty((n if want_grad_logits else 0, v))
    grad_tau = torch.empty(n, dtype=torch.float32, device=logits.device)
    one_pass, block, num_warps = config(v, "backward")
    if n:
        with device_of(logits):
            backward_kernel[(n,)](
                logits, logits.stride(0), grad_output, grad_output.stride(0), grad_logits, tau,
                tau.stride(0), rows, grad_tau, n, v, LOG=log, WANT_GRAD=want_grad_logits,
                ONE_PASS=one_pass, BLOCK=block, num_warps=num_warps, num_stages=1,
            )  # fmt: skip
    return grad_logits, grad_tau
