"""The arguments of a loss of pairs, checked and as its operators take them."""

from typing import TypedDict

import torch
import torch.distributed as dist

from tempnet_kernels.core.checks import check_floats, check_integers, check_like, first_outside
from tempnet_kernels.core.pairs import Ranks, gather
from tempnet_kernels.core.register import Backend


class PairKeywords(TypedDict, total=False):
    """The keywords of :func:`tempnet_kernels.dro_contrastive` that do not change what it
    returns."""

    log_s_image: torch.Tensor | None
    log_s_text: torch.Tensor | None
    gamma: float
    include_positive: bool
    image_ids: torch.Tensor | None
    text_ids: torch.Tensor | None
    negative_mask: torch.Tensor | None
    positive: torch.Tensor | None
    process_group: "dist.ProcessGroup | Ranks | None"
    backend: Backend


def check_features(name, image, text):
    for argument, value in (("image", image), ("text", text)):
        check_floats(name, argument, value)
        if value.dim() != 2:
            raise ValueError(f"{name}: {argument} must have 2 dimensions, got {value.dim()}")
    if text.dtype != image.dtype:
        raise TypeError(f"{name}: text must be of image's {image.dtype}, got {text.dtype}")
    if text.device != image.device:
        raise ValueError(f"{name}: text must be on {image.device}, got {text.device}")
    if text.shape[1] != image.shape[1] or text.shape[0] < image.shape[0]:
        raise ValueError(
            f"{name}: text must have shape (N, {image.shape[1]}) with N >= {image.shape[0]}, "
            f"got {tuple(text.shape)}"
        )


def log_averages(name, argument, log_s, m, device, acc):
    """``[M]``, or empty where every visit is a first one."""
    if log_s is None:
        return torch.empty(0, dtype=acc, device=device)
    if not isinstance(log_s, torch.Tensor) or not log_s.dtype.is_floating_point:
        raise TypeError(f"{name}: {argument} must be a tensor of a floating-point dtype")
    check_like(name, argument, log_s, (m,), device)
    return log_s.detach().to(acc).contiguous()


def columns_of_pairs(name, positive, m, n, device):
    """``[M]`` int64, checked where that does not wait for a GPU; empty: column i for row i."""
    if positive is None:
        return torch.empty(0, dtype=torch.int64, device=device)
    check_integers(name, "positive", positive, (m,), device)
    positive = positive.long().contiguous()
    row = first_outside(positive, n)
    if row is not None:
        raise IndexError(f"{name}: positive[{row}] must be in [0, {n}), got {int(positive[row])}")
    readable = device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and positive.unique().numel() < m:
        raise ValueError(f"{name}: positive must hold {m} different columns")
    return positive


def checked_ids(name, argument, ids, n, device):
    if ids is None:
        return None
    check_integers(name, argument, ids, (n,), device)
    return ids.long()


def ids_of_pairs(image_ids, text_ids, n, ranks, device):
    """[2, N] int32 ranks of the ids: equal where the ids are; empty where no two are equal."""
    given = []
    for ids in (image_ids, None if text_ids is image_ids else text_ids):
        if ids is not None:
            ids = gather(ids, ranks)
            given.append((ids, ids.sort().values))
    # Read only where that does not wait for a GPU.
    readable = device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and not any((ordered[1:] == ordered[:-1]).any() for _, ordered in given):
        given = []
    if not given:
        return torch.empty((0, n), dtype=torch.int32, device=device)
    places = [torch.searchsorted(ordered, ids, out_int32=True) for ids, ordered in given]
    return torch.stack([places[0], places[-1]])


def pair_mask(name, mask, m, n, device):
    if mask is None:
        return torch.empty((0, n), dtype=torch.bool, device=device)
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        raise TypeError(
            f"{name}: negative_mask must be a bool tensor, got {getattr(mask, 'dtype', type(mask))}"
        )
    check_like(name, "negative_mask", mask, (m, n), device)
    return mask if mask.stride(1) == 1 or n < 2 else mask.contiguous()
