"""What the TempNet needs of a chunk's logits, in Triton: one visit of every row."""

import torch
import triton
import triton.language as tl

from tempnet_kernels.core.fields import Moments
from tempnet_kernels.core.tempnet import NORM_MIN as LEAST_NORM
from tempnet_kernels.triton import device_of
from tempnet_kernels.triton.online_softmax import softcapped

BLOCK = 8192
NUM_WARPS = 16
MINUS_INF = tl.constexpr(float("-inf"))
NORM_MIN = tl.constexpr(LEAST_NORM)
NORMALIZE = {"BLOCK": 4096, "num_warps": 8}


@triton.jit
def moments_kernel(logits_ptr, logits_stride, moments_ptr, n, v, CENTER: tl.constexpr,
                   SOFTCAP: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + i * logits_stride
    shift = MINUS_INF
    squares, total, count = 0.0, 0.0, 0.0
    for start in range(0, v, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = tl.load(row_ptr + columns, mask=columns < v, other=MINUS_INF).to(tl.float32)
        z = softcapped(z, columns < v, SOFTCAP)[0]
        counted = z != MINUS_INF  # NaN counts
        if CENTER:
            # Nothing cancels: neither d nor the sum is ever positive.
            higher = tl.maximum(shift, tl.max(z))
            d = tl.where(count == 0, 0.0, shift - higher)
            # A total that overflowed is not to be multiplied by 0.
            squares += tl.where(d == 0, 0.0, d * (count * d + 2 * total))
            total += count * d
            shift = higher
            z = z - shift
            count += tl.sum(counted.to(tl.float32))
        x = tl.where(counted, z, 0.0)
        squares += tl.sum(x * x)
        if CENTER:
            total += tl.sum(x)
    tl.store(moments_ptr + i, shift if CENTER else 0.0)
    tl.store(moments_ptr + n + i, squares)
    tl.store(moments_ptr + 2 * n + i, total)
    tl.store(moments_ptr + 3 * n + i, count)
    norm = tl.sqrt_rn(squares)
    norm = tl.where(norm < NORM_MIN, NORM_MIN, norm)  # keeps NaN
    tl.store(moments_ptr + 4 * n + i, tl.where(squares == 0, 0.0, tl.div_rn(1.0, norm)))


@triton.jit
def normalize_kernel(logits_ptr, logits_stride, shift_ptr, inverse_ptr, x_ptr, v,
                     SOFTCAP: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    shift = tl.load(shift_ptr + i)
    inverse = tl.load(inverse_ptr + i)
    for start in range(0, v, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = tl.load(logits_ptr + i * logits_stride + columns, mask=columns < v, other=0.0)
        x = softcapped(z.to(tl.float32), columns < v, SOFTCAP)[0] - shift
        x = tl.where(x == MINUS_INF, 0.0, x)
        x = tl.where(inverse < 0, 0.0, x * inverse)  # whatever is there
        tl.store(x_ptr + i * v + columns, x, mask=columns < v)


def row_moments(logits, center, softcap):
    n, v = logits.shape
    moments = torch.empty((Moments.FIELDS, n), dtype=torch.float32, device=logits.device)
    if n:
        with device_of(logits):
            moments_kernel[(n,)](
                logits, logits.stride(0), moments, n, v, CENTER=center,
                SOFTCAP=softcap, BLOCK=min(BLOCK, max(16, triton.next_power_of_2(v))),
                num_warps=NUM_WARPS,
            )  # fmt: skip
    return moments


def normalized_rows(logits, shift, inverse, softcap):
    n, v = logits.shape
    x = torch.empty((n, v), dtype=torch.float32, device=logits.device)
    if n:
        with device_of(logits):
            normalize_kernel[(n,)](
                logits, logits.stride(0), shift.contiguous(), inverse.contiguous(), x, v,
                SOFTCAP=softcap, **NORMALIZE,
            )  # fmt: skip
    return x
