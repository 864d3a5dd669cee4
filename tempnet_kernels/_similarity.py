"""The contrastive loss tile by tile: matrix products by the platform, everything between them by
one elementwise kernel of the backend, never an M x N matrix."""

import torch

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


def _op(name, backend):
    return getattr(getattr(torch.ops.tempnet, name), backend)


def dro_contrastive_stats(
    backend, image, text, row_a, column_a, positive, ids, mask, include_positive, keep
):
    m, n = image.shape[0], text.shape[0]
    image, text = image.to(row_a.dtype), text.to(row_a.dtype)
    rows, columns = row_a.new_zeros((5, m)), row_a.new_zeros((5, n))
    rows[0], columns[0] = -1e30, -1e30
    similarity = row_a.new_empty((m, n) if keep else (0, 0))
    tiles = _tiles(m, n, image.device.type, row_a.itemsize)
    buffer = None if keep else _buffer(row_a, tiles)
    for r, c in tiles:
        tile = similarity[r, c] if keep else _view(buffer, r, c)
        torch.mm(image[r], text[c].T, out=tile)
        _op("similarity_stats_", backend)(
            rows, columns, tile, r.start, c.start, row_a, column_a, positive, ids, mask,
            include_positive,
        )  # fmt: skip
    if not ids.numel() and not mask.numel():
        rows[3] = n - 1 + include_positive
        columns[3] = m - 1 + include_positive
    return rows, columns, similarity


def dro_contrastive_grad(
    backend, image, text, similarity, rows, columns, positive, ids, mask, include_positive,
    want_image, want_text,
):  # fmt: skip
    m, n = image.shape[0], text.shape[0]
    image, text = image.to(rows.dtype), text.to(rows.dtype)
    grad_image = rows.new_zeros(image.shape if want_image else (0, 0))
    grad_text = rows.new_zeros(text.shape if want_text else (0, 0))
    tiles = _tiles(m, n, image.device.type, rows.itemsize)
    buffer = _buffer(rows, tiles)
    for r, c in tiles:
        weights = _view(buffer, r, c)
        if similarity.numel():
            tile = similarity[r, c]
        else:
            tile = torch.mm(image[r], text[c].T, out=weights)
        _op("similarity_weights_", backend)(
            weights, tile, r.start, c.start, rows, columns, positive, ids, mask, include_positive
        )
        if want_image:
            grad_image[r].addmm_(weights, text[c])
        if want_text:
            grad_text[c].addmm_(weights.T, image[r])
    return grad_image, grad_text


def _buffer(like, tiles):
    """Room for the first tile, which is the largest."""
    r, c = tiles[0] if tiles else (slice(0, 0), slice(0, 0))
    return like.new_empty((r.stop - r.start) * (c.stop - c.start))


def _view(buffer, r, c):
    height, width = r.stop - r.start, c.stop - c.start
    return buffer[: height * width].view(height, width)
