"""The batch of pairs that several processes share."""

from typing import NamedTuple

import torch
import torch.distributed as dist

from tempnet_kernels.core import collectives
from tempnet_kernels.core.checks import FLOATS
from tempnet_kernels.core.collectives import all_gather, all_sum_, outside_graphs, several


class Ranks(NamedTuple):
    """Whose pairs are whose: rank r's columns are sizes[r] long, in the order of the ranks."""

    group: "dist.ProcessGroup"
    rank: int
    sizes: tuple[int, ...]
    pairs: int  # rows of all ranks

    @property
    def begin(self):
        """The first of this rank's columns."""
        return sum(self.sizes[: self.rank])


def meet(function, group, image, text, **same):
    """:class:`Ranks` of ``group``; None for one process. ``image [m, D]`` and ``text [n, D]`` are
    this rank's; ``same`` are numbers, or functions that return one or a 0-d tensor, which must be
    equal on all ranks: they decide which collectives follow, and the result. Waits for the device,
    once: the sizes are needed here."""
    if isinstance(group, Ranks):
        return group
    group = several(function, group)
    return None if group is None else _meet(function, group, image, text, same)


@outside_graphs
def _meet(function, group, image, text, same):
    same = {
        "D": image.shape[1],
        "dtype": FLOATS.index(image.dtype),
        "image.requires_grad": image.requires_grad,
        "text.requires_grad": text.requires_grad,
        "grad mode": torch.is_grad_enabled(),
        **same,
    }
    values = [value() if callable(value) else value for value in same.values()]
    values = [image.shape[0], text.shape[0], *values]
    numbers = [0 if isinstance(x, torch.Tensor) else x for x in values]
    # Pinned: another copy to a GPU would be waited for.
    own = torch.tensor(numbers, dtype=torch.float64, pin_memory=image.is_cuda)
    own = own.to(image.device, non_blocking=True)
    for x, to in zip(values, own, strict=True):
        if isinstance(x, torch.Tensor):
            to.copy_(x)
    pairs, sizes, *others = all_gather(own, group).T.tolist()
    for name, values in zip(same, others, strict=True):
        if any(value != values[0] for value in values):
            raise ValueError(
                f"{function}: {name} must be the same on all ranks, got {values} by rank"
            )
    sizes = tuple(int(n) for n in sizes)
    return Ranks(group, group.rank(), sizes, int(sum(pairs)))


def gather(x, ranks):
    """``[n, ...]`` of this rank -> ``[N, ...]`` of all."""
    return x if ranks is None else _gather(x, ranks)


# Not compiled, where ranks of different sizes would have different graphs.
@outside_graphs
def _gather(x, ranks):
    widest = max(ranks.sizes)
    if x.shape[0] < widest:
        x = torch.cat([x, x.new_zeros((widest - x.shape[0], *x.shape[1:]))])
    gathered = x.new_empty((len(ranks.sizes) * widest, *x.shape[1:]))
    collectives.all_gather_into(gathered, x.contiguous(), group=ranks.group)
    if min(ranks.sizes) == widest:
        return gathered
    return torch.cat(
        [part[:n] for part, n in zip(gathered.split(widest), ranks.sizes, strict=True)]
    )


def reduce_scatter(x, ranks):
    """``[N, ...]`` -> ``[n, ...]``: this rank's part of the sum over the ranks."""
    if ranks is None:
        return x
    widest, n = max(ranks.sizes), ranks.sizes[ranks.rank]
    if min(ranks.sizes) < widest:
        padded = x.new_zeros((len(ranks.sizes), widest, *x.shape[1:]))
        for to, part in zip(padded, x.split(ranks.sizes), strict=True):
            to[: part.shape[0]] = part
        x = padded.flatten(0, 1)
        del padded, to, part
    own = x.new_empty((widest, *x.shape[1:]))
    collectives.reduce_scatter_into(own, x.contiguous(), group=ranks.group)
    return own if n == widest else own[:n].clone()  # not a view of the widest rank's memory


def all_sum(x, ranks):
    return x if ranks is None else _all_sum(x, ranks)


@outside_graphs
def _all_sum(x, ranks):
    return all_sum_(x.clone(), ranks.group)


def merge(columns, ranks):
    """The states of the columns, ``[5, N]``, by every rank's rows -> those by all rows, of this
    rank's columns: m, s, sx and count, ``[4, n]``."""
    if ranks is None:
        return columns
    m, s, sx, count = columns[:4]
    top = m.clone()
    dist.all_reduce(top, dist.ReduceOp.MAX, group=ranks.group)
    d = m - top
    f = torch.exp2(d)
    sums = reduce_scatter(torch.stack([f * s, f * (sx + d * s), count], 1), ranks)  # (n, 3)
    own = top[ranks.begin : ranks.begin + sums.shape[0]]
    return torch.stack([own, *sums.T])
