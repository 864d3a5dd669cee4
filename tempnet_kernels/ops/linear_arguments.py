"""The arguments of a linear layer's token loss, checked."""

import torch

from tempnet_kernels.chunked.dro_cross_entropy import columns_of
from tempnet_kernels.core.checks import check_like
from tempnet_kernels.core.collectives import all_gather
from tempnet_kernels.core.softcap import check_softcap


def check_layer(name, hidden, weight, bias, tau, softcap, chunk_rows, tempnet, group):
    d = hidden.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != d or not weight.shape[0]:
        raise ValueError(
            f"{name}: weight must have shape (V, {d}) with V >= 1, got {tuple(weight.shape)}"
        )
    for argument, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.dtype != hidden.dtype:
            raise TypeError(f"{name}: {argument} must be {hidden.dtype}, got {value.dtype}")
    check_like(name, "weight", weight, tuple(weight.shape), hidden.device)
    if bias is not None:
        check_like(name, "bias", bias, (weight.shape[0],), hidden.device)
    check_softcap(name, softcap)
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"{name}: chunk_rows must be >= 1 or None, got {chunk_rows}")
    if tempnet is None:
        return
    if isinstance(tau, torch.Tensor) or tau != 1.0:
        given = f"a tensor of shape {tuple(tau.shape)}" if isinstance(tau, torch.Tensor) else tau
        raise ValueError(
            f"{name}: tau must be left out where a tempnet predicts it, got {given}; for "
            "temperatures of your own leave tempnet out"
        )
    if tempnet.process_group is not group:
        raise ValueError(
            f"{name}: tempnet must be sharded over process_group, by tempnet.shard(process_group)"
        )
    vocab_size = columns_of(weight.shape[0], group)[1]
    if tempnet.vocab_size != vocab_size:
        raise ValueError(
            f"{name}: tempnet must be for the {vocab_size} rows of weight, "
            f"got one for {tempnet.vocab_size}"
        )
    w1 = tempnet.proj[0].weight
    check_like(name, "tempnet.proj[0].weight", w1, tuple(w1.shape), hidden.device)


def check_same_on_every_rank(name, group, *own):
    """They decide which collectives follow. On a GPU reading them would wait for it."""
    table = all_gather(torch.tensor(own), group)
    if (table != table[0]).any():
        v, d, n, chunk_rows, *wants = table.T.tolist()
        raise ValueError(
            f"{name}: weight must have as many rows on every rank of process_group, and D, the "
            "number of rows, chunk_rows and what requires a gradient must be the same, got by rank "
            f"{v}, {d}, {n}, {chunk_rows} and {wants}"
        )
