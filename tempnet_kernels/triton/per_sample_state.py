"""The state of a loss per sample of the training set in Triton."""

import triton
import triton.language as tl

from tempnet_kernels.triton import device_of

BLOCK = 128
NUM_WARPS = 4


@triton.jit
def read_kernel(table_ptr, samples, ids_ptr, ids_stride, values_ptr, b, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < b
    id = tl.load(ids_ptr + i.to(tl.int64) * ids_stride, mask=inside, other=0)
    value = tl.load(table_ptr + id, mask=(id >= 0) & (id < samples), other=float("inf"))
    tl.store(values_ptr + i, value, mask=inside)


@triton.jit
def write_kernel(
    table_ptr, samples, ids_ptr, ids_stride, order_ptr, values_ptr, values_stride, b,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    id = tl.load(ids_ptr + i.to(tl.int64) * ids_stride, mask=i < b, other=-1)
    following = tl.load(ids_ptr + (i + 1).to(tl.int64) * ids_stride, mask=i + 1 < b, other=-1)
    # Of equal ids, neighbours here, the last of the batch writes.
    writes = (id >= 0) & (id < samples) & (id != following)
    place = tl.load(order_ptr + i, mask=writes, other=0)
    value = tl.load(values_ptr + place * values_stride, mask=writes, other=0.0)
    tl.store(table_ptr + id, value, mask=writes)


def read_samples(tables, ids):
    b = ids.shape[0]
    values = tables[0].new_empty((len(tables), b))
    if b:
        with device_of(ids):
            for table, value in zip(tables, values, strict=True):
                read_kernel[(triton.cdiv(b, BLOCK),)](
                    table, table.shape[0], ids, ids.stride(0), value, b, BLOCK=BLOCK,
                    num_warps=NUM_WARPS,
                )  # fmt: skip
    return values


def write_samples_(tables, ids, order, values):
    b = ids.shape[0]
    if not b:
        return
    if not order.numel():
        ids, order = ids.sort(stable=True)
    with device_of(ids):
        for table, value in zip(tables, values, strict=True):
            write_kernel[(triton.cdiv(b, BLOCK),)](
                table, table.shape[0], ids, ids.stride(0), order, value, value.stride(0), b,
                BLOCK=BLOCK, num_warps=NUM_WARPS,
            )  # fmt: skip
