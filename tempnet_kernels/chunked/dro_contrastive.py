"""The contrastive loss tile by tile: matrix products by the platform, everything between them by
one elementwise kernel of the backend, never an M x N matrix."""

import torch

from tempnet_kernels.core import register
from tempnet_kernels.core.fields import AnchorParameters, AnchorState
from tempnet_kernels.core.matmul import add_product, multiply, operand

# Bytes of a tile of similarities in the accumulation dtype. On the CPU a tile and its operands stay
# in the last-level cache between the product and the elementwise kernel.
TILE_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
# Rows of a tile: a product with fewer is bound by the reading of the other operand.
TILE_ROWS = {"cpu": 1024, "cuda": 4096}
# Bytes of the features whose positives are taken off the gradients at a time.
POSITIVE_BYTES = {"cpu": 512 << 10, "cuda": 32 << 20}


def _tiles(m, n, device, itemsize):
    """(rows, columns) of every tile as slices, row after row."""
    height = max(1, min(m, TILE_ROWS[device]))
    width = min(n, max(512, TILE_BYTES[device] // (itemsize * height) // 512 * 512))
    return [
        (slice(i, min(m, i + height)), slice(j, min(n, j + width)))
        for i in range(0, m, height)
        for j in range(0, n, width)
    ]


EMPTY = -1e30  # m where no pair counts; finite, since -inf - -inf is NaN

_op = register.operator


def _scale(rows, columns, dtype):
    """A power of two that moves weights of float16 to the middle of its range, 0-d: of 2^18 pairs
    each has 4e-6, a subnormal number, and w may be up to 2 / gamma."""
    if dtype != torch.float16:
        return None
    # q, which 2^(z a - m) <= 1 multiplies
    largest = rows[AnchorParameters.Q].amax() + columns[AnchorParameters.Q].amax()
    scale = torch.exp2(torch.floor(torch.log2(2**14 / largest)))
    return torch.where((largest > 0) & torch.isfinite(scale), scale, 1.0)


def _with_scaled_q(parameters, scale):
    return parameters if scale is None else torch.cat([parameters[:2], parameters[2:] * scale])


def dro_contrastive_stats(
    backend, image, text, row_a, column_a, positive, ids, mask, include_positive, keep
):
    m, n = image.shape[0], text.shape[0]
    image, text = operand(image, row_a.dtype), operand(text, row_a.dtype)
    rows, columns = (row_a.new_zeros((AnchorState.FIELDS, x)) for x in (m, n))
    rows[AnchorState.M], columns[AnchorState.M] = EMPTY, EMPTY
    similarity = row_a.new_empty((m, n) if keep else (0, 0))
    tiles = _tiles(m, n, image.device.type, row_a.itemsize)
    buffer = None if keep else _buffer(row_a, row_a.dtype, tiles)
    for r, c in tiles:
        tile = similarity[r, c] if keep else _view(buffer, r, c)
        multiply(image[r], text[c].T, tile)
        _op("similarity_stats_", backend)(
            rows, columns, tile, r.start, c.start, row_a, column_a, positive, ids, mask,
            include_positive,
        )  # fmt: skip
    if not ids.numel() and not mask.numel():
        rows[AnchorState.COUNT] = n - (not include_positive)
        # Not every column is one of these rows' positives: the other ranks have theirs.
        columns[AnchorState.COUNT] = m
        if not include_positive:
            columns[AnchorState.COUNT].index_fill_(0, positive, m - 1)
    return rows, columns, similarity


def dro_contrastive_grad(
    backend, image, text, similarity, rows, columns, total, positive, ids, mask, include_positive,
    want_image, want_text,
):  # fmt: skip
    m = image.shape[0]
    acc = rows.dtype
    image, text = operand(image, acc), operand(text, acc)
    grad_image = rows.new_zeros(image.shape if want_image else (0, 0))
    grad_text = rows.new_zeros(text.shape if want_text else (0, 0))
    if not m:
        return grad_image, grad_text
    scale = _scale(rows, columns, image.dtype)
    rows, columns = _with_scaled_q(rows, scale), _with_scaled_q(columns, scale)
    _add_weighted(
        backend, grad_image if want_image else None, grad_text if want_text else None, image, text,
        similarity, rows, columns, (positive, ids, mask, include_positive),
    )  # fmt: skip
    if scale is not None:
        grad_image.div_(scale)
        grad_text.div_(scale)
    # The positives' share, which nearly cancels the rest, is not rounded to the weights' dtype.
    bytes_of_pair = max(1, image.shape[1] * acc.itemsize)
    step = max(1, POSITIVE_BYTES[image.device.type] // bytes_of_pair)
    for i in range(0, m, step):
        r = slice(i, i + step)
        at, minus = positive[r], -total[r, None]
        if want_image:
            grad_image[r].addcmul_(text[at].to(acc), minus)
        if want_text:
            own = torch.addcmul(grad_text[at], image[r].to(acc), minus)
            grad_text.index_copy_(0, at, own)
    return grad_image, grad_text


def _add_weighted(backend, grad_image, grad_text, image, text, similarity, rows, columns, pairs):
    """Adds W text and W^T image to the gradients that are not None, tile by tile."""
    tiles = _tiles(image.shape[0], text.shape[0], image.device.type, rows.itemsize)
    # The weights have the features' dtype, that of the products' other operand.
    weights_buffer = tile_buffer = _buffer(rows, image.dtype, tiles)
    if image.dtype != rows.dtype and not similarity.numel():
        tile_buffer = _buffer(rows, rows.dtype, tiles)
    for r, c in tiles:
        weights = _view(weights_buffer, r, c)
        if similarity.numel():
            tile = similarity[r, c]
        else:
            tile = multiply(image[r], text[c].T, _view(tile_buffer, r, c))
        _op("similarity_weights_", backend)(weights, tile, r.start, c.start, rows, columns, *pairs)
        if grad_image is not None:
            add_product(grad_image[r], weights, text[c])
        if grad_text is not None:
            add_product(grad_text[c], weights.T, image[r])


def _buffer(like, dtype, tiles):
    """Room for the first tile, which is the largest."""
    r, c = tiles[0] if tiles else (slice(0, 0), slice(0, 0))
    return like.new_empty((r.stop - r.start) * (c.stop - c.start), dtype=dtype)


def _view(buffer, r, c):
    height, width = r.stop - r.start, c.stop - c.start
    return buffer[: height * width].view(height, width)
