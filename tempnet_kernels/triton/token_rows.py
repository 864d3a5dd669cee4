"""What surrounds the token loss, in Triton: one program, so that the order of every sum is
fixed."""

import torch
import triton
import triton.language as tl

from tempnet_kernels.triton import device_of

BLOCK = 1024
NUM_WARPS = 8


@triton.jit
def scale_kernel(target_ptr, target_stride, weight_ptr, weight_stride, normalizer_ptr, divisor,
                 ignore_index, scale_ptr, total_ptr, n, HAS_WEIGHT: tl.constexpr,
                 HAS_NORMALIZER: tl.constexpr, SUMS: tl.constexpr, MEAN: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    lanes = tl.arange(0, BLOCK).to(tl.int64)
    total = 0.0
    if HAS_NORMALIZER:
        total = tl.load(normalizer_ptr)
    elif SUMS:
        sums = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, n, BLOCK):
            rows = start + lanes
            target = tl.load(target_ptr + rows * target_stride, mask=rows < n, other=ignore_index)
            kept = (rows < n) & (target != ignore_index)
            if HAS_WEIGHT:
                weight = tl.load(weight_ptr + rows * weight_stride, mask=kept, other=0.0)
                sums += tl.where(kept, weight, 0.0)
            else:
                sums += kept.to(tl.float32)
        total = tl.sum(sums)
    else:
        total = divisor
    inverse = 1.0
    if MEAN:
        inverse = tl.where(total == 0, 0.0, 1.0 / tl.where(total == 0, 1.0, total))
    tl.store(total_ptr, total)
    if HAS_WEIGHT:
        for start in range(0, n, BLOCK):
            rows = start + lanes
            target = tl.load(target_ptr + rows * target_stride, mask=rows < n, other=ignore_index)
            kept = (rows < n) & (target != ignore_index)
            weight = tl.load(weight_ptr + rows * weight_stride, mask=kept, other=0.0)
            tl.store(scale_ptr + rows, tl.where(kept, weight * inverse, 0.0), mask=rows < n)
    else:
        tl.store(scale_ptr, inverse)


@triton.jit
def sum_kernel(rows_ptr, stride, total_ptr, sum_ptr, n, GUARDED: tl.constexpr,
               BLOCK: tl.constexpr):  # fmt: skip
    lanes = tl.arange(0, BLOCK).to(tl.int64)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        rows = start + lanes
        sums += tl.load(rows_ptr + rows * stride, mask=rows < n, other=0.0)
    value = tl.sum(sums)
    if GUARDED:
        value = tl.where(tl.load(total_ptr) == 0, float("nan"), value)
    tl.store(sum_ptr, value)


def row_scale(target, weight, normalizer, divisor, ignore_index, mean, wide):
    n = target.shape[0]
    options = {"dtype": torch.float32, "device": target.device}
    scale, total = torch.empty(1 if weight is None else n, **options), torch.empty(1, **options)
    sums = mean and normalizer is None and divisor < 0
    with device_of(target):
        scale_kernel[(1,)](
            target, target.stride(0), weight, 0 if weight is None else weight.stride(0),
            normalizer, float(max(divisor, 0)), ignore_index, scale, total, n,
            HAS_WEIGHT=weight is not None, HAS_NORMALIZER=normalizer is not None, SUMS=sums,
            MEAN=mean, BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip
    return (scale.expand(n) if weight is None else scale), total


def sum_rows(rows, total):
    value = torch.empty((), dtype=torch.float32, device=rows.device)
    with device_of(rows):
        sum_kernel[(1,)](
            rows, rows.stride(0), total, value, rows.shape[0], GUARDED=total is not None,
            BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip
    return value
