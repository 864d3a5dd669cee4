"""What surrounds the token loss, in plain PyTorch: the definition that every kernel is checked
against."""

import torch


def row_scale(target, weight, normalizer, divisor, ignore_index, mean, wide):
    acc = torch.float64 if wide else torch.float32
    kept = target != ignore_index
    # The weight of an ignored row may be anything, NaN too.
    weights = None if weight is None else torch.where(kept, weight, 0)
    if normalizer is not None:
        total = normalizer.reshape(1).clone()
    elif divisor >= 0:
        total = torch.full((1,), divisor, dtype=acc, device=target.device)
    elif mean:
        total = (kept if weights is None else weights).sum(dtype=acc).reshape(1)
    else:
        total = torch.zeros(1, dtype=acc, device=target.device)
    scale = torch.where(total == 0, 0, 1 / total) if mean else torch.ones_like(total)
    return (scale.expand(target.shape) if weights is None else weights * scale), total


def sum_rows(rows, total):
    value = rows.sum()
    return value if total is None else torch.where(total.reshape(()) == 0, torch.nan, value)
