"""The temperature networks around their matrix products, in Triton: a program per row, or per block
of rows whose sums it keeps in registers."""

import torch
import triton
import triton.language as tl

from tempnet_kernels.core.tempnet import NORM_MIN as LEAST_NORM
from tempnet_kernels.core.tempnet import row_blocks
from tempnet_kernels.triton import device_of
from tempnet_kernels.triton.online_softmax import LOG2E

NORM_MIN = tl.constexpr(LEAST_NORM)
DROPOUT = {"ROWS": 8, "BLOCK": 256, "num_warps": 4}
DROPOUT_GRAD = {"BLOCK": 256, "num_warps": 4}


def head_config(k):
    """(BLOCK, num_warps): a row is held, whatever its width."""
    block = max(16, triton.next_power_of_2(k))
    return block, min(16, max(1, block // 256))


@triton.jit
def _sigmoid(x):
    """Without overflow; NaN stays NaN."""
    e = tl.exp2(-tl.abs(x) * LOG2E)
    return tl.div_rn(tl.where(x < 0, e, 1.0), 1.0 + e)


@triton.jit
def _mix(x):
    """The finaliser of splitmix64; products wrap."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def dropout_kernel(
    pre_ptr, bias_ptr, factor_ptr, key_ptr, row_ids_ptr, ids_stride, first_row, dropped_ptr, n, h,
    threshold, scale, HAS_FACTOR: tl.constexpr, HAS_KEY: tl.constexpr, HAS_IDS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # (ROWS,)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    inside = (i < n)[:, None] & (j < h)[None, :]
    offsets = i[:, None] * h + j[None, :]
    x = tl.load(pre_ptr + offsets, mask=inside, other=0.0)
    if HAS_FACTOR:
        x *= tl.load(factor_ptr + i, mask=i < n, other=0.0)[:, None]
    x = _sigmoid(x + tl.load(bias_ptr + j, mask=j < h, other=0.0)[None, :])
    if HAS_KEY:
        # The mask of tempnet_kernels/core/dropout.py.
        key = tl.load(key_ptr + tl.zeros([ROWS], tl.int32)).to(tl.uint64)
        ids = i + first_row
        if HAS_IDS:
            ids = tl.load(row_ids_ptr + i * ids_stride, mask=i < n, other=0)
        rows = _mix(_mix(key) ^ ids.to(tl.uint64)).to(tl.uint32)
        columns = _mix(j.to(tl.uint64)).to(tl.uint32)
        bits = rows[:, None] + columns[None, :]
        bits = (bits ^ (bits >> 16)) * 0x85EBCA6B
        bits = (bits ^ (bits >> 13)) * 0xC2B2AE35
        bits = bits ^ (bits >> 16)
        # Of 32 bits without a sign, as a 64-bit number: an argument's width depends on its value.
        kept = (bits ^ 0x80000000).to(tl.int64) >= threshold
        x *= tl.where(kept, scale, 0.0)  # a NaN is never dropped
    tl.store(dropped_ptr + offsets, x, mask=inside)


@triton.jit
def dropout_grad_kernel(
    grad_ptr, dropped_ptr, factor_ptr, grad_pre_ptr, sums_ptr, n, h, rows, kept,
    HAS_FACTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(b * rows, tl.minimum(b * rows + rows, n)):
        dropped = tl.load(dropped_ptr + i * h + j, mask=j < h, other=0.0)
        grad = tl.load(grad_ptr + i * h + j, mask=j < h, other=0.0)
        grad_x = grad * dropped * (1 - dropped * kept)
        total += grad_x
        if HAS_FACTOR:
            grad_x *= tl.load(factor_ptr + i)
        tl.store(grad_pre_ptr + i * h + j, grad_x, mask=j < h)
    tl.store(sums_ptr + b * h + j, total, mask=j < h)


@triton.jit
def _parameters(norms_ptr, scaler_ptr, weight_ptr, j, k, HAS_NORMS: tl.constexpr):
    """(norms, exp(scaler), weight)."""
    norms = 1.0
    if HAS_NORMS:
        norms = tl.load(norms_ptr + j, mask=j < k, other=1.0)
        norms = tl.where(norms < NORM_MIN, NORM_MIN, norms)
    weight = tl.load(weight_ptr + j, mask=j < k, other=0.0)
    return norms, tl.exp(tl.load(scaler_ptr)), weight


@triton.jit
def _row(
    h_ptr, norms, temperature, weight, bias, j, k, uniform, HAS_NORMS: tl.constexpr,
    SQUASH: tl.constexpr,
):  # fmt: skip
    """(q, q - its maximum, w, w - 1/K, f, share of the range, sum_k weight_k w_k f_k)."""
    q = tl.load(h_ptr + j, mask=j < k, other=float("-inf"))
    if HAS_NORMS:
        q = tl.div_rn(q, norms)
    centred = q - tl.max(q, 0)  # drops NaN, which reaches the sum
    e = tl.exp2(centred * tl.div_rn(LOG2E, temperature))
    w = tl.div_rn(e, tl.sum(e, 0))
    q = tl.where(j < k, q, 0.0)
    f = _sigmoid(q) if SQUASH else q
    deviation = w - uniform
    t = tl.sum(deviation * weight * f, 0) + bias
    return q, centred, w, deviation, f, _sigmoid(t), tl.sum(w * weight * f, 0)


@triton.jit
def head_kernel(
    h_ptr, norms_ptr, scaler_ptr, weight_ptr, bias_ptr, tau_ptr, k, uniform, tau_min, tau_range,
    HAS_NORMS: tl.constexpr, SQUASH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCK)
    norms, temperature, weight = _parameters(norms_ptr, scaler_ptr, weight_ptr, j, k, HAS_NORMS)
    bias = tl.load(bias_ptr)
    _, _, _, _, _, share, _ = _row(
        h_ptr + i * k, norms, temperature, weight, bias, j, k, uniform, HAS_NORMS, SQUASH
    )
    tl.store(tau_ptr + i, tau_min + tau_range * share)


@triton.jit
def head_grad_kernel(
    grad_tau_ptr, grad_tau_stride, h_ptr, norms_ptr, scaler_ptr, weight_ptr, bias_ptr, grad_h_ptr,
    sums_ptr, n, k, uniform, width, rows, tau_range, HAS_NORMS: tl.constexpr, SQUASH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCK)
    norms, temperature, weight = _parameters(norms_ptr, scaler_ptr, weight_ptr, j, k, HAS_NORMS)
    bias = tl.load(bias_ptr)
    sum_h = tl.zeros([BLOCK], tl.float32)
    sum_weight = tl.zeros([BLOCK], tl.float32)
    sum_along = tl.zeros([BLOCK], tl.float32)
    sum_scaler = 0.0
    sum_bias = 0.0
    for i in range(b * rows, tl.minimum(b * rows + rows, n)):
        q, centred, w, deviation, f, share, mixed = _row(
            h_ptr + i * k, norms, temperature, weight, bias, j, k, uniform, HAS_NORMS, SQUASH
        )
        grad_t = tl.load(grad_tau_ptr + i * grad_tau_stride) * tau_range * share * (1 - share)
        grad_x = tl.div_rn(grad_t * w * (weight * f - mixed), temperature)  # of q, through w
        grad_f = grad_t * weight * deviation
        grad_q = grad_x + (grad_f * f * (1 - f) if SQUASH else grad_f)
        grad_h = grad_q
        if HAS_NORMS:
            grad_h = tl.div_rn(grad_q, norms)
            sum_along += grad_q * q
        tl.store(grad_h_ptr + i * k + j, grad_h, mask=j < k)
        sum_h += grad_h
        sum_weight += grad_t * deviation * f
        # Of softmax(q / T) only differences of q count: from the largest, nothing cancels.
        sum_scaler += tl.sum(tl.where(j < k, grad_x * centred, 0.0), 0)
        sum_bias += grad_t
    sums_ptr += b * width
    tl.store(sums_ptr + j, sum_h, mask=j < k)
    tl.store(sums_ptr + k + j, sum_weight, mask=j < k)
    tl.store(sums_ptr + 2 * k, -sum_scaler)
    tl.store(sums_ptr + 2 * k + 1, sum_bias)
    if HAS_NORMS:
        live = tl.load(norms_ptr + j, mask=j < k, other=0.0) >= NORM_MIN
        along = tl.where(live, tl.div_rn(-sum_along, norms * norms), 0.0)
        tl.store(sums_ptr + 2 * k + 2 + j, along, mask=j < k)


def sigmoid_dropout(pre, bias, factor, key, ids, first_row, probability):
    n, h = pre.shape
    dropped = torch.empty((n, h), dtype=torch.float32, device=pre.device)
    if n:
        grid = triton.cdiv(n, DROPOUT["ROWS"]), triton.cdiv(h, DROPOUT["BLOCK"])
        has = {"HAS_FACTOR": factor is not None, "HAS_KEY": key is not None}
        with device_of(pre):
            dropout_kernel[grid](
                pre.contiguous(), bias.contiguous(), _or(factor, pre), _or(key, pre),
                pre if ids is None else ids, 0 if ids is None else ids.stride(0), first_row,
                dropped, n, h, int(probability * 2**32), 1 / (1 - probability),
                HAS_IDS=ids is not None, **has, **DROPOUT,
            )  # fmt: skip
    return dropped


def sigmoid_dropout_bwd(grad, dropped, factor, probability):
    n, h = dropped.shape
    blocks, rows = row_blocks(n)
    grad_pre = torch.empty((n, h), dtype=torch.float32, device=grad.device)
    sums = torch.empty((blocks, h), dtype=torch.float32, device=grad.device)
    if n:
        with device_of(grad):
            dropout_grad_kernel[blocks, triton.cdiv(h, DROPOUT_GRAD["BLOCK"])](
                grad.contiguous(), dropped.contiguous(), _or(factor, grad), grad_pre, sums, n, h,
                rows, 1 - probability, HAS_FACTOR=factor is not None, **DROPOUT_GRAD,
            )  # fmt: skip
    return grad_pre, sums


def temperature_head(h, norms, scaler, weight, bias, squash, tau_min, tau_max):
    n, k = h.shape
    tau = torch.empty((n,), dtype=torch.float32, device=h.device)
    block, num_warps = head_config(k)
    if n:
        with device_of(h):
            head_kernel[(n,)](
                h.contiguous(), _or(norms, h), scaler, weight.contiguous(), bias, tau, k, 1 / k,
                tau_min, tau_max - tau_min, HAS_NORMS=norms is not None, SQUASH=squash, BLOCK=block,
                num_warps=num_warps,
            )  # fmt: skip
    return tau


def temperature_head_bwd(grad_tau, h, norms, scaler, weight, bias, squash, tau_min, tau_max):
    n, k = h.shape
    blocks, rows = row_blocks(n)
    width = 2 * k + 2 + (0 if norms is None else k)
    grad_h = torch.empty((n, k), dtype=torch.float32, device=h.device)
    sums = torch.empty((blocks, width), dtype=torch.float32, device=h.device)
    block, num_warps = head_config(k)
    if n:
        with device_of(h):
            head_grad_kernel[(blocks,)](
                grad_tau, grad_tau.stride(0), h.contiguous(), _or(norms, h), scaler,
                weight.contiguous(), bias, grad_h, sums, n, k, 1 / k, width, rows,
                tau_max - tau_min, HAS_NORMS=norms is not None, SQUASH=squash, BLOCK=block,
                num_warps=num_warps,
            )  # fmt: skip
    return grad_h, sums


def _or(tensor, instead):
    """A kernel's argument that it does not read without the tensor."""
    return instead if tensor is None else tensor.contiguous()
