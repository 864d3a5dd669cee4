"""What several processes exchange."""

import copy
import functools

import torch
import torch.distributed as dist

if dist.is_available():
    # The names of torch 2.13; until then the others, which now warn.
    all_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    reduce_scatter_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def outside_graphs(function):
    """``function``, at which a graph of torch.compile breaks: it has no collectives.

    As torch.compiler.disable, which imports all of torch._dynamo, but at the first call.
    """
    disabled = []

    @functools.wraps(function)
    def call(*args, **kwargs):
        if not disabled:
            disabled.append(torch.compiler.disable(function, reason="collectives are not compiled"))
        return disabled[0](*args, **kwargs)

    return call


class SharesGroup:
    """Of a module with a ``process_group``, which cannot be copied: its copies share it."""

    def __deepcopy__(self, memo):
        memo[id(self.process_group)] = self.process_group
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied


def several(function, group):
    """``group`` if it is of several processes, None for one."""
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"{function}: process_group must be a torch.distributed.ProcessGroup with this process "
            f"in it, or None, got {type(group).__name__}"
        )
    return group if group.size() > 1 else None


@outside_graphs
def all_gather(x, group):
    """``x``, of the same shape on every rank -> ``[world, *x.shape]``."""
    gathered = x.new_empty((group.size() * x.numel(),))
    all_gather_into(gathered, x.reshape(-1), group=group)
    return gathered.view(group.size(), *x.shape)


class _SumOverRanks(torch.autograd.Function):
    """The sum of every rank's ``x``, of which each rank then makes the same: so is its gradient,
    which is that of every ``x``."""

    @staticmethod
    def forward(x, group):
        return all_sum_(x.clone(), group)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad, None


sum_over_ranks = outside_graphs(_SumOverRanks.apply)


def all_sum_(x, group):
    """``x`` becomes the sum over the ranks."""
    if group is not None:
        dist.all_reduce(x, group=group)
    return x
