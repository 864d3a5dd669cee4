"""The elementwise half of the contrastive loss in Triton: a tile of similarities is visited once
for the softmax states of its rows and of its columns, and once for the weights of both."""

import triton
import triton.language as tl

from tempnet_kernels.triton import device_of
from tempnet_kernels.triton.online_softmax import (
    EMPTY,
    centred,
    merge_all,
    sums_relative_to,
    update,
    weighted_exponent,
)

NUM_WARPS = 8
# Rows and columns of a patch and rows of a program, which walks down a strip of such patches. At
# most 128 registers a thread: two programs of 256 threads on a multiprocessor.
STATS = {"ROWS": 32, "STRIP": 128, "CHUNK": 256}
WEIGHTS = {"ROWS": 8, "STRIP": 256, "CHUNK": 64}
MERGE = {"PARTS": 32, "MERGED": 32}  # partial states at a time, rows or columns of a program

POSITIVE = 4  # field of the rows' states; M, S, SX and COUNT are 0 to 3
LOWEST = tl.constexpr(-3e38)  # for a similarity of -inf that counts; -inf is for what does not


def vector(similarity, mask):
    """Columns of a thread's load.

    A warp of the statistics has 32 times as many columns of a row: the sums of a column over a
    patch then need no other thread, and those of a row only the warp.
    """
    multiples = [similarity.shape[1], similarity.stride(0), similarity.data_ptr()]
    if mask.numel():
        multiples += [mask.stride(0), mask.data_ptr()]
    return 1 if any(x % 16 for x in multiples) else 4


@triton.jit
def _ids(ids_ptr, n, at, inside, HAS_IDS: tl.constexpr):
    """(image ids, text ids) of candidates."""
    if HAS_IDS:
        image = tl.load(ids_ptr + at, mask=inside, other=0)
        text = tl.load(ids_ptr + n + at, mask=inside, other=0)
    else:
        image, text = at, at
    return image, text


@triton.jit
def _pairs(row, height, width, row_begin, column_begin, positive_ptr, ids_ptr, n,
           HAS_IDS: tl.constexpr):  # fmt: skip
    """(the positive's column in the tile or -1, its image ids, its text ids) of rows."""
    inside = row < height
    y = tl.load(positive_ptr + row_begin + row, mask=inside, other=-1)
    in_tile = (y >= column_begin) & (y < column_begin + width)
    image, text = _ids(ids_ptr, n, y, inside, HAS_IDS)
    return tl.where(in_tile, y - column_begin, -1).to(tl.int32), image, text


@triton.jit
def _load(
    similarity_ptr, stride, height, width, mask_ptr, mask_stride, row, p, own_image, own_text,
    column, image, text, HAS_IDS: tl.constexpr, HAS_MASK: tl.constexpr,
    INCLUDE_POSITIVE: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """The similarities of a patch, -inf where the pair does not count.

    What ``_pairs`` gives and what belongs to the columns are shaped to broadcast to the patch.
    """
    inside = (row < height) & (column < width)
    row = row.to(tl.int64)
    z = tl.load(similarity_ptr + row * stride + column, mask=inside, other=float("-inf"))
    own = column == p
    if HAS_IDS or HAS_MASK:
        kept = inside
        if HAS_MASK:
            # The launcher's own hint, a multiple of 16, would give a thread 16 columns.
            at = mask_ptr + tl.multiple_of(row * mask_stride, [VEC] * len(row.shape)) + column
            kept = tl.load(at, mask=inside, other=0) != 0
        if HAS_IDS:
            kept = kept & (image != own_image) & (text != own_text)
        kept = tl.where(own, INCLUDE_POSITIVE, kept)
        z = tl.where(z == float("-inf"), LOWEST, z)
        z = tl.where(kept, z, float("-inf"))
    elif not INCLUDE_POSITIVE:
        z = tl.where(own, float("-inf"), z)
    return z


@triton.jit(do_not_specialize=["mask_stride", "height", "row_begin", "n"])
def stats_kernel(
    similarity_ptr, stride, height, width, row_begin, column_begin, row_a_ptr, column_a_ptr,
    positive_ptr, ids_ptr, n, mask_ptr, mask_stride, s_positive_ptr, row_parts_ptr,
    column_parts_ptr, HAS_IDS: tl.constexpr, HAS_MASK: tl.constexpr,
    INCLUDE_POSITIVE: tl.constexpr, VEC: tl.constexpr, WARPS: tl.constexpr, ROWS: tl.constexpr,
    STRIP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Partial states of a strip's rows and of a chunk's columns, each [parts, 4, size]."""
    LANES: tl.constexpr = 32 * VEC
    GROUPS: tl.constexpr = STRIP // LANES
    OF_WARP: tl.constexpr = ROWS // WARPS
    COUNTED: tl.constexpr = HAS_IDS or HAS_MASK
    strip, chunk = tl.program_id(0), tl.program_id(1)
    # A patch is (WARPS, GROUPS, OF_WARP, LANES).
    in_strip = tl.arange(0, GROUPS)[None, :, None, None] * LANES
    in_strip += tl.arange(0, LANES)[None, None, None, :]
    column = strip * STRIP + in_strip
    in_columns = column < width
    a = tl.load(column_a_ptr + column_begin + column, mask=in_columns, other=1.0)
    image, text = _ids(ids_ptr, n, column_begin + column, in_columns, HAS_IDS)
    # Every warp has its own states of the columns.
    m = tl.full([WARPS, GROUPS, 1, LANES], EMPTY, tl.float32)
    s = tl.zeros([WARPS, GROUPS, 1, LANES], tl.float32)
    sx = tl.zeros([WARPS, GROUPS, 1, LANES], tl.float32)
    count = tl.zeros([WARPS, GROUPS, 1, LANES], tl.float32)
    row_parts_ptr += strip.to(tl.int64) * 4 * height
    for start in range(chunk * CHUNK, tl.minimum(height, (chunk + 1) * CHUNK), ROWS):
        row = start + tl.arange(0, WARPS)[:, None] * OF_WARP + tl.arange(0, OF_WARP)[None, :]
        in_rows = row < height  # (WARPS, OF_WARP)
        p, own_image, own_text = _pairs(
            row, height, width, row_begin, column_begin, positive_ptr, ids_ptr, n, HAS_IDS
        )
        z = _load(
            similarity_ptr, stride, height, width, mask_ptr, mask_stride, row[:, None, :, None],
            p[:, None, :, None], own_image[:, None, :, None], own_text[:, None, :, None], column,
            image, text, HAS_IDS, HAS_MASK, INCLUDE_POSITIVE, VEC,
        )  # fmt: skip
        here = in_rows & (p >= strip * STRIP) & (p < (strip + 1) * STRIP)
        s_positive = tl.load(similarity_ptr + row.to(tl.int64) * stride + p, mask=here, other=0.0)
        tl.store(s_positive_ptr + row_begin + row, s_positive, mask=here)

        # The maxima drop NaN, which reaches s.
        row_a = tl.load(row_a_ptr + row_begin + row, mask=in_rows, other=1.0)
        row_m = tl.maximum(tl.max(tl.max(z, 1), 2) * row_a, EMPTY)
        u = centred(z, row_a[:, None, :, None], row_m[:, None, :, None])
        e = tl.exp2(u)
        row_sx = tl.sum(tl.sum(weighted_exponent(e, u), 1), 2)
        tl.store(row_parts_ptr + row, row_m, mask=in_rows)
        tl.store(row_parts_ptr + height + row, tl.sum(tl.sum(e, 1), 2), mask=in_rows)
        tl.store(row_parts_ptr + 2 * height + row, row_sx, mask=in_rows)

        m_new = tl.maximum(m, tl.max(z, 2, keep_dims=True) * a)
        u = centred(z, a, m_new)
        e = tl.exp2(u)
        e_sum = tl.sum(e, 2, keep_dims=True)
        m, s, sx = update(
            m, s, sx, m_new, e_sum, tl.sum(weighted_exponent(e, u), 2, keep_dims=True)
        )
        if COUNTED:
            one = (z != float("-inf")).to(tl.float32)
            tl.store(row_parts_ptr + 3 * height + row, tl.sum(tl.sum(one, 1), 2), mask=in_rows)
            count += tl.sum(one, 2, keep_dims=True)
    m, s, sx = merge_all(m, s, sx)
    at = column_parts_ptr + chunk.to(tl.int64) * 4 * width + tl.reshape(column, m.shape)
    in_columns = tl.reshape(in_columns, m.shape)
    tl.store(at, m, mask=in_columns)
    tl.store(at + width, s, mask=in_columns)
    tl.store(at + 2 * width, sx, mask=in_columns)
    if COUNTED:
        tl.store(at + 3 * width, tl.sum(count, 0), mask=in_columns)


@triton.jit
def _merge(block, states_ptr, stride, parts_ptr, parts, size, COUNTED: tl.constexpr,
           PARTS: tl.constexpr, MERGED: tl.constexpr):  # fmt: skip
    at = block * MERGED + tl.arange(0, MERGED)  # (MERGED,)
    inside = at < size
    m = tl.load(states_ptr + at, mask=inside, other=EMPTY)
    s = tl.load(states_ptr + stride + at, mask=inside, other=0.0)
    sx = tl.load(states_ptr + 2 * stride + at, mask=inside, other=0.0)
    count = tl.zeros([MERGED], tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)[:, None]
        wanted = (part < parts) & inside[None, :]
        pointers = parts_ptr + part.to(tl.int64) * 4 * size + at[None, :]  # (PARTS, MERGED)
        part_m = tl.load(pointers, mask=wanted, other=EMPTY)
        part_s = tl.load(pointers + size, mask=wanted, other=0.0)
        part_sx = tl.load(pointers + 2 * size, mask=wanted, other=0.0)
        m_new = tl.maximum(m, tl.max(part_m, 0))
        s_sum, sx_sum = sums_relative_to(m_new, part_m, part_s, part_sx)
        m, s, sx = update(m, s, sx, m_new, s_sum, sx_sum)
        if COUNTED:
            count += tl.sum(tl.load(pointers + 3 * size, mask=wanted, other=0.0), 0)
    tl.store(states_ptr + at, m, mask=inside)
    tl.store(states_ptr + stride + at, s, mask=inside)
    tl.store(states_ptr + 2 * stride + at, sx, mask=inside)
    if COUNTED:
        count += tl.load(states_ptr + 3 * stride + at, mask=inside, other=0.0)
        tl.store(states_ptr + 3 * stride + at, count, mask=inside)


@triton.jit(
    do_not_specialize=["rows_stride", "strips", "height", "columns_stride", "chunks", "width"]
)
def merge_kernel(
    rows_ptr, rows_stride, row_parts_ptr, strips, height, columns_ptr, columns_stride,
    column_parts_ptr, chunks, width, COUNTED: tl.constexpr, PARTS: tl.constexpr,
    MERGED: tl.constexpr,
):  # fmt: skip
    """Partial states into those of the rows, by the first programs, and of the columns."""
    block = tl.program_id(0)
    row_blocks = tl.cdiv(height, MERGED)
    if block < row_blocks:
        _merge(block, rows_ptr, rows_stride, row_parts_ptr, strips, height, COUNTED, PARTS, MERGED)
    else:
        _merge(
            block - row_blocks, columns_ptr, columns_stride, column_parts_ptr, chunks, width,
            COUNTED, PARTS, MERGED,
        )  # fmt: skip


@triton.jit(do_not_specialize=["mask_stride", "height", "row_begin", "n", "rows_stride"])
def weights_kernel(
    weights_ptr, weights_stride, similarity_ptr, stride, height, width, row_begin, column_begin,
    rows_ptr, rows_stride, columns_ptr, n, positive_ptr, ids_ptr, mask_ptr, mask_stride,
    HAS_IDS: tl.constexpr, HAS_MASK: tl.constexpr, INCLUDE_POSITIVE: tl.constexpr,
    VEC: tl.constexpr, ROWS: tl.constexpr, STRIP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * STRIP + tl.arange(0, STRIP)[None, :]  # (1, STRIP)
    in_columns = column < width
    columns_ptr += column_begin
    a = tl.load(columns_ptr + column, mask=in_columns, other=1.0)
    m = tl.load(columns_ptr + n + column, mask=in_columns, other=0.0)
    q = tl.load(columns_ptr + 2 * n + column, mask=in_columns, other=0.0)
    image, text = _ids(ids_ptr, n, column_begin + column, in_columns, HAS_IDS)
    first = tl.program_id(1) * CHUNK
    for start in range(first, tl.minimum(height, first + CHUNK), ROWS):
        row = start + tl.arange(0, ROWS)
        in_rows = row < height  # (ROWS,)
        p, own_image, own_text = _pairs(
            row, height, width, row_begin, column_begin, positive_ptr, ids_ptr, n, HAS_IDS
        )
        z = _load(
            similarity_ptr, stride, height, width, mask_ptr, mask_stride, row[:, None], p[:, None],
            own_image[:, None], own_text[:, None], column, image, text, HAS_IDS, HAS_MASK,
            INCLUDE_POSITIVE, VEC,
        )  # (ROWS, STRIP)  # fmt: skip
        at = rows_ptr + row_begin + row
        row_a = tl.load(at, mask=in_rows, other=1.0)[:, None]
        row_m = tl.load(at + rows_stride, mask=in_rows, other=0.0)[:, None]
        row_q = tl.load(at + 2 * rows_stride, mask=in_rows, other=0.0)[:, None]
        w = row_q * tl.exp2(centred(z, row_a, row_m)) + q * tl.exp2(centred(z, a, m))
        tl.store(
            weights_ptr + row[:, None].to(tl.int64) * weights_stride + column,
            w.to(weights_ptr.dtype.element_ty),
            mask=in_rows[:, None] & in_columns,
        )


def _options(similarity, ids, mask, include_positive):
    return {
        "HAS_IDS": ids.numel() > 0, "HAS_MASK": mask.numel() > 0,
        "INCLUDE_POSITIVE": include_positive, "VEC": vector(similarity, mask),
        "num_warps": NUM_WARPS, "num_stages": 1,
    }  # fmt: skip


def similarity_stats_(
    rows, columns, similarity, row_begin, column_begin, row_a, column_a, positive, ids, mask,
    include_positive,
):  # fmt: skip
    height, width = similarity.shape
    mask = mask[row_begin:, column_begin:]
    strips, chunks = triton.cdiv(width, STATS["STRIP"]), triton.cdiv(height, STATS["CHUNK"])
    row_parts = similarity.new_empty(strips, 4, height)
    column_parts = similarity.new_empty(chunks, 4, width)
    blocks = triton.cdiv(height, MERGE["MERGED"]) + triton.cdiv(width, MERGE["MERGED"])
    with device_of(similarity):
        stats_kernel[(strips, chunks)](
            similarity, similarity.stride(0), height, width, row_begin, column_begin, row_a,
            column_a, positive, ids, columns.shape[1], mask, mask.stride(0), rows[POSITIVE],
            row_parts, column_parts, WARPS=NUM_WARPS, **STATS,
            **_options(similarity, ids, mask, include_positive),
        )  # fmt: skip
        merge_kernel[(blocks,)](
            rows[:, row_begin:], rows.stride(0), row_parts, strips, height,
            columns[:, column_begin:], columns.stride(0), column_parts, chunks, width,
            COUNTED=ids.numel() > 0 or mask.numel() > 0, num_warps=NUM_WARPS, num_stages=1, **MERGE,
        )  # fmt: skip


def similarity_weights_(
    weights, similarity, row_begin, column_begin, rows, columns, positive, ids, mask,
    include_positive,
):  # fmt: skip
    height, width = similarity.shape
    mask = mask[row_begin:, column_begin:]
    grid = (triton.cdiv(width, WEIGHTS["STRIP"]), triton.cdiv(height, WEIGHTS["CHUNK"]))
    with device_of(similarity):
        weights_kernel[grid](
            weights, weights.stride(0), similarity, similarity.stride(0), height, width,
            row_begin, column_begin, rows, rows.stride(0), columns, columns.shape[1], positive,
            ids, mask, mask.stride(0), **WEIGHTS,
            **_options(similarity, ids, mask, include_positive),
        )  # fmt: skip
