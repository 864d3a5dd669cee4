"""The contrastive loss tile by tile: matrix products by the platform, everything between them by
one elementwise kernel of the backend, never an M x N matrix."""

import torch

from tempnet_kernels.core import register
from tempnet_kernels.core.fields import AnchorParameters
from tempnet_kernels.core.matmul import add_product, multiply, operand

# Bytes of a tile of similarities in the accumulation dtype. On the CPU a tile and its operands stay
# in the last-level cache between the product and the elementwise kernel.
TILE_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
# Rows of a tile: a product with fewer is bound by the reading of the other operand.
TILE_ROWS = {"cpu": 1024, "cuda": 4096}


def _tiles(m, n, device, itemsize):
    """(rows, columns) of every tile as slices, row after row."""
    height = max(1, min(m, TILE_ROWS[device]))
    width = min(n, max(512, TILE_BYTES[device] // (itemsize * height) // 512 * 512))
    return [
        (slice(i, min(m, i + height)), slice(j, min(n, j + width)))
        for i in range(0, m, height)
        for j in range(0, n, width)
    ]


_op = register.operator


def _unit(rows, columns, dtype):
    """A power of two that moves weights of float16 to the middle of its range, 0-d; empty for 1: of
    2^18 pairs each has 4e-6, a subnormal number, and w may be up to 2 / gamma."""
    if dtype != torch.float16:
        return rows.new_empty(0)
    # q, which 2^(z a - m) <= 1 multiplies
    largest = rows[AnchorParameters.Q].amax() + columns[AnchorParameters.Q].amax()
    unit = torch.exp2(torch.floor(torch.log2(2**14 / largest)))
    return torch.where((largest > 0) & torch.isfinite(unit), unit, 1.0)


def _with_scaled_q(parameters, unit):
    return torch.cat([parameters[:2], parameters[2:] * unit]) if unit.numel() else parameters


def dro_contrastive_stats_(
    backend, rows, columns, image, text, row_a, column_a, positive, ids, mask, include_positive,
    keep,
):  # fmt: skip
    m, n = image.shape[0], text.shape[0]
    image, text = operand(image, row_a.dtype), operand(text, row_a.dtype)
    similarity = row_a.new_empty((m, n) if keep else (0, 0))
    tiles = _tiles(m, n, image.device.type, row_a.itemsize)
    buffer = None if keep else _buffer(row_a, row_a.dtype, tiles)
    add_states = _op("similarity_stats_", backend)
    for r, c in tiles:
        tile = similarity[r, c] if keep else _view(buffer, r, c)
        multiply(image[r], text[c].T, tile)
        add_states(
            rows, columns, tile, r.start, c.start, row_a, column_a, positive, ids, mask,
            include_positive,
        )  # fmt: skip
    return similarity


def dro_contrastive_grad(
    backend, image, text, similarity, rows, columns, total, positive, pair, ids, mask,
    include_positive, scale, wide_text, want_image, want_text,
):  # fmt: skip
    acc = rows.dtype
    like_image, like_text = (
        x.new_empty(x.shape if want else (0, 0), dtype=dtype)
        for x, want, dtype in (
            (image, want_image, image.dtype),
            (text, want_text, acc if wide_text else text.dtype),
        )
    )
    if not image.shape[0]:
        return like_image, like_text.zero_()
    # Of 16-bit features the gradients are summed in fp32 first.
    image_sum, text_sum = (
        x if x.dtype == acc else x.new_empty(x.shape, dtype=acc) for x in (like_image, like_text)
    )
    unit = _unit(rows, columns, image.dtype)
    rows, columns = _with_scaled_q(rows, unit), _with_scaled_q(columns, unit)
    _sum_weighted(
        backend, image_sum if want_image else None, text_sum if want_text else None,
        operand(image, acc), operand(text, acc), similarity, rows, columns,
        (positive, ids, mask, include_positive),
    )  # fmt: skip
    # The positives' share, which nearly cancels the rest, is not rounded to the weights' dtype.
    _op("pair_gradients_", backend)(
        like_image, like_text, image_sum, text_sum, image, text, total, positive, pair, unit, scale
    )
    return like_image, like_text


def _sum_weighted(backend, image_sum, text_sum, image, text, similarity, rows, columns, pairs):
    """W text and W^T image into the sums that are not None, tile by tile."""
    tiles = _tiles(image.shape[0], text.shape[0], image.device.type, rows.itemsize)
    # The weights have the features' dtype, that of the products' other operand.
    weights_buffer = tile_buffer = _buffer(rows, image.dtype, tiles)
    if image.dtype != rows.dtype and not similarity.numel():
        tile_buffer = _buffer(rows, rows.dtype, tiles)
    make_weights = _op("similarity_weights_", backend)
    for r, c in tiles:
        weights = _view(weights_buffer, r, c)
        if similarity.numel():
            tile = similarity[r, c]
        else:
            tile = multiply(image[r], text[c].T, _view(tile_buffer, r, c))
        make_weights(weights, tile, r.start, c.start, rows, columns, *pairs)
        if image_sum is not None:
            add_product(image_sum[r], weights, text[c], fresh=c.start == 0)
        if text_sum is not None:
            add_product(text_sum[c], weights.T, image[r], fresh=r.start == 0)


def _buffer(like, dtype, tiles):
    """Room for the first tile, which is the largest."""
    r, c = tiles[0] if tiles else (slice(0, 0), slice(0, 0))
    return like.new_empty((r.stop - r.start) * (c.stop - c.start), dtype=dtype)


def _view(buffer, r, c):
    height, width = r.stop - r.start, c.stop - c.start
    return buffer[: height * width].view(height, width)
