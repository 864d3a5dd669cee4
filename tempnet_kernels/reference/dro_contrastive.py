"""The contrastive loss in plain PyTorch, the whole matrix of similarities at once."""

import math

import torch


def dro_contrastive_stats_(
    rows, columns, image, text, row_a, column_a, positive, ids, mask, include_positive, keep
):
    similarity = image.to(row_a.dtype) @ text.to(row_a.dtype).T  # (M, N)
    counts = _counts(similarity, positive, ids, mask, include_positive)
    s_positive = similarity.gather(1, positive[:, None])[:, 0]
    rows.copy_(torch.stack([*_states(similarity, counts, row_a), s_positive]))
    columns[:4] = torch.stack(_states(similarity.T, counts.T, column_a))
    return similarity if keep else similarity.new_empty((0, 0))


def dro_contrastive_grad(
    image, text, similarity, rows, columns, total, positive, pair, ids, mask, include_positive,
    scale, wide_text, want_image, want_text,
):  # fmt: skip
    of_image, of_text = image.dtype, rows.dtype if wide_text else text.dtype
    image, text = image.to(rows.dtype), text.to(rows.dtype)
    if not similarity.numel():
        similarity = image @ text.T  # (M, N)
    counts = _counts(similarity, positive, ids, mask, include_positive)
    weights = _weights(similarity, rows) + _weights(similarity.T, columns).T
    weights = torch.where(counts, weights, 0) * scale
    weights = weights.scatter_add(1, positive[:, None], -total[:, None] * scale)
    empty = rows.new_empty((0, 0))
    grad_image = weights @ text if want_image else empty
    grad_text = weights.T @ image if want_text else empty
    return grad_image.to(of_image), grad_text.to(of_text)


def _counts(similarity, positive, ids, mask, include_positive):
    """Where a pair is in the sums of its anchors."""
    counts = torch.ones_like(similarity, dtype=torch.bool)
    for candidates in ids:
        counts &= candidates[positive][:, None] != candidates
    if mask.numel():
        counts &= mask
    return counts.scatter(1, positive[:, None], include_positive)


def _states(similarity, counts, a):
    """(m, s, sx, number of pairs that count) per row; m = -1e30 and s = 0 where nothing counts."""
    z = torch.where(counts, similarity, -math.inf)
    m = (z.amax(1) * a).clamp(min=-1e30) if z.shape[1] else torch.full_like(a, -1e30)
    zmax = m / a
    u = (z - zmax[:, None]) * a[:, None]
    e = torch.where(counts, torch.exp2(u), 0)
    return m, e.sum(1), torch.where(e == 0, 0, e * u).sum(1), counts.sum(1).to(a.dtype)


def _weights(similarity, parameters):
    a, m, q = parameters[:3, :, None]
    return q * torch.exp2(similarity * a - m)
