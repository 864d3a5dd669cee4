"""The state of a loss per sample in plain PyTorch."""

import math

import torch


def read_samples(tables, ids):
    values = [table[ids.clamp(0, table.shape[0] - 1)] for table in tables]
    return torch.where((ids >= 0) & (ids < tables[0].shape[0]), torch.stack(values), math.inf)


def write_samples_(tables, ids, order, values):
    if not order.numel():
        ids, order = torch.sort(ids, stable=True)
    last = order[torch.searchsorted(ids, ids, right=True) - 1]
    for table, value in zip(tables, values, strict=True):
        samples = table.shape[0]
        with_outside = torch.cat([table, table.new_empty(1)])
        with_outside[torch.where((ids >= 0) & (ids < samples), ids, samples)] = value[last]
        table.copy_(with_outside[:samples])
