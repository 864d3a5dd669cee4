"""Every trainable parameter is in one group, the TempNets' in their own."""

import pytest
import torch
from torch import nn

from tempnet_kernels.nn import (
    ContrastiveTempNet,
    RobustContrastiveLoss,
    TempNet,
    TempNetCausalLMLoss,
    tempnet_param_groups,
)


def model():
    m = nn.ModuleDict(
        {
            "embedding": nn.Embedding(9, 4),
            "norm": nn.LayerNorm(4),
            "head": nn.Linear(4, 9),
            "loss": TempNetCausalLMLoss(TempNet(9, hidden_size=4), 1.0),
        }
    )
    m["head"].weight = m["embedding"].weight
    return m


def by_name(module, groups):
    names = {p: name for name, p in module.named_parameters()}
    return {g["name"]: {names[p] for p in g["params"]} for g in groups}


def test_groups_are_named_and_hold_every_parameter_once():
    m = model()
    groups = tempnet_param_groups(m, 1e-3, tempnet_lr=1e-4, weight_decay=0.1)
    names = by_name(m, groups)
    assert names["decay"] == {"embedding.weight"}  # tied to the head's
    assert names["no_decay"] == {"norm.weight", "norm.bias", "head.bias"}
    network = {f"loss.tempnet.{name}" for name in m["loss"].tempnet.state_dict()}
    assert names["tempnet"] == network
    rates = {g["name"]: (g["lr"], g["weight_decay"]) for g in groups}
    assert rates == {"decay": (1e-3, 0.1), "no_decay": (1e-3, 0.0), "tempnet": (1e-4, 0.0)}
    assert sum(len(g["params"]) for g in groups) == len(list(m.parameters()))
    torch.optim.AdamW(groups)  # raises for a parameter in two groups


def test_frozen_parameters_are_left_out_and_empty_groups_too():
    m = model()
    for name in ("embedding", "norm", "head"):
        m[name].requires_grad_(False)
    m["loss"].tempnet.scaler.requires_grad_(False)
    groups = tempnet_param_groups(m, 1e-3, tempnet_lr=1e-4, tempnet_weight_decay=0.2)
    names = by_name(m, groups)
    assert list(names) == ["tempnet"] and len(names["tempnet"]) == 6
    assert groups[0]["weight_decay"] == 0.2


def test_networks_of_both_sides_share_the_group_and_scales_do_not_decay():
    nets = {f"{x}_temp_gen": ContrastiveTempNet(4) for x in ("image", "text")}
    m = nn.ModuleDict({"tower": nn.Linear(4, 4), "loss": RobustContrastiveLoss(8, rho=1.0, **nets)})
    names = by_name(m, tempnet_param_groups(m, 1e-3, tempnet_lr=3e-5))
    assert names["tempnet"] == {f"loss.{k}" for k, _ in m["loss"].named_parameters()}
    m["clip"] = RobustContrastiveLoss(0, method="clip")
    assert (
        "clip.logit_scale" in by_name(m, tempnet_param_groups(m, 1e-3, tempnet_lr=3e-5))["no_decay"]
    )


def test_only_the_networks_rate_decays_by_epoch():
    optimizer = torch.optim.Adam(tempnet_param_groups(model(), 1e-3, tempnet_lr=3e-5))
    rates = [
        (lambda epoch: 0.9**epoch) if group["name"] == "tempnet" else (lambda epoch: 1.0)
        for group in optimizer.param_groups
    ]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rates)
    optimizer.step()
    schedule.step()
    assert schedule.get_last_lr() == pytest.approx([1e-3, 1e-3, 2.7e-5])


def test_misuse_says_what_to_do():
    m = model()
    with pytest.raises(TypeError, match=r"module must be an nn.Module, got list"):
        tempnet_param_groups(list(m.parameters()), 1e-3, tempnet_lr=1e-4)
    with pytest.raises(ValueError, match=r"got Linear without one: make the loss a submodule"):
        tempnet_param_groups(m["head"], 1e-3, tempnet_lr=1e-4)
    m["loss"].requires_grad_(False)
    with pytest.raises(ValueError, match=r"only frozen ones: call requires_grad_"):
        tempnet_param_groups(m, 1e-3, tempnet_lr=1e-4)
