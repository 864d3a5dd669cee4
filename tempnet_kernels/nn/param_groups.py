"""Parameter groups for an optimizer of a model with TempNets."""

from typing import Any

from torch import nn

from tempnet_kernels.nn.contrastive_tempnet import ContrastiveTempNet
from tempnet_kernels.nn.tempnet import TempNet

NAME = "tempnet_param_groups"


def tempnet_param_groups(
    module: nn.Module,
    lr: float,
    *,
    tempnet_lr: float,
    weight_decay: float = 0.0,
    tempnet_weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """The trainable parameters of ``module`` as groups for a ``torch.optim`` optimizer.

    Three groups, each with its ``name``, of which an empty one is left out: ``decay`` (of two and
    more dimensions), ``no_decay`` (biases, norms and scales: weight decay 0) and ``tempnet`` (every
    parameter of a :class:`TempNet` or :class:`ContrastiveTempNet` in ``module``). A tied parameter
    is in one group; frozen ones are in none.

    Args:
        module: the model and its loss, in one ``nn.Module``.
        lr, weight_decay: of the model.
        tempnet_lr, tempnet_weight_decay: of the TempNets. Official learning rates: 2e-6 (GPT-2 from
            scratch), 1e-4 (a frozen LLaMA), 3e-5 * 0.9^epoch (contrastive).

    Raises:
        TypeError: ``module`` is no ``nn.Module``.
        ValueError: ``module`` has no TempNet, or all its TempNets are frozen.

    Source: the official ``GPT-2/megatron/model/utils.py`` and ``Bimodal_CL/optim/optim_factory.py``
    split so; the latter's Adam for the TempNets has no weight decay, the former's group that of the
    model.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"{NAME}: module must be an nn.Module, got {type(module).__name__}")
    networks = [m for m in module.modules() if isinstance(m, (TempNet, ContrastiveTempNet))]
    if not networks:
        raise ValueError(
            f"{NAME}: module must hold a TempNet or ContrastiveTempNet, got "
            f"{type(module).__name__} without one: make the loss a submodule of the module"
        )
    own = {p for network in networks for p in network.parameters()}
    groups: dict[str, dict[str, Any]] = {
        "decay": {"params": [], "lr": lr, "weight_decay": weight_decay},
        "no_decay": {"params": [], "lr": lr, "weight_decay": 0.0},
        "tempnet": {"params": [], "lr": tempnet_lr, "weight_decay": tempnet_weight_decay},
    }
    for p in module.parameters():
        if p.requires_grad:
            name = "tempnet" if p in own else "decay" if p.dim() > 1 else "no_decay"
            groups[name]["params"].append(p)
    if not groups["tempnet"]["params"]:
        raise ValueError(
            f"{NAME}: the TempNets of module must have trainable parameters, got only frozen ones: "
            "call requires_grad_(True) on them, or give the optimizer module.parameters()"
        )
    return [{"name": name, **group} for name, group in groups.items() if group["params"]]
