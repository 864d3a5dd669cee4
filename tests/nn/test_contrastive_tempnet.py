"""ContrastiveTempNet."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from contrastive import features
from torch.utils.checkpoint import checkpoint

from tempnet_kernels.nn import ContrastiveTempNet, RobustContrastiveLoss

B, D = 12, 16


def test_tempnet_equals_its_formula():
    net = ContrastiveTempNet(D, 0.01, 0.1, num_prototypes=8).eval()
    for parameter in (net.prototypes, net.linear_1.weight, net.linear_1.bias):
        torch.nn.init.normal_(parameter)
    torch.nn.init.constant_(net.scaler, -1.0)
    image, _ = features(B, D)
    tau = net(image)
    p = {k: v.detach().double() for k, v in net.state_dict().items()}
    x = torch.sigmoid(image.detach().double() @ p["proj.weight"].T + p["proj.bias"])
    q = x @ F.normalize(p["prototypes"], dim=1).T
    w = torch.softmax(q / p["scaler"].exp(), 1)
    t = ((w - 1 / 8) * torch.sigmoid(q)) @ p["linear_1.weight"].T + p["linear_1.bias"]
    expected = 0.01 + 0.09 * torch.sigmoid(t[:, 0])
    assert tau.shape == (B,) and tau.std() > 1e-4
    torch.testing.assert_close(tau.double(), expected, rtol=1e-5, atol=0)
    (tau.sum() + image.sum() * 0).backward()
    assert (image.grad == 0).all()  # the features are detached
    assert all(parameter.grad.norm() > 0 for parameter in net.parameters())


def test_autocast_does_not_round_the_temperatures():
    net = ContrastiveTempNet(D).eval()
    image, _ = features(B, D)
    with torch.autocast("cpu", torch.bfloat16):
        inside = net(image)
    assert inside.dtype == torch.float32 and torch.equal(inside, net(image))


def test_tempnet_loads_the_official_layout():
    net = ContrastiveTempNet(D)
    shapes = {name: tuple(value.shape) for name, value in net.named_parameters()}
    assert shapes == {
        "proj.weight": (D, D), "proj.bias": (D,), "scaler": (1,), "prototypes": (256, D),
        "linear_1.weight": (1, 256), "linear_1.bias": (1,),
    }  # fmt: skip
    assert (net.linear_1.weight == 1).all() and net.linear_1.bias == 0
    assert net.scaler.item() == pytest.approx(math.log(0.01)) and net.dropout == 0.5
    official = {name: torch.randn(shape) for name, shape in shapes.items()}
    official["scaler"] = torch.tensor(math.log(0.02), dtype=torch.float64)  # theirs is 0-d, float64
    loss = RobustContrastiveLoss(
        9, rho=1.0, image_temp_gen=net, text_temp_gen=ContrastiveTempNet(D)
    )
    loss.load_state_dict({f"image_temp_gen.{k}": v for k, v in official.items()}, strict=False)
    net.load_state_dict(official)
    assert net.scaler.dtype == torch.float32 and net.scaler.item() == pytest.approx(math.log(0.02))
    assert torch.equal(loss.image_temp_gen.prototypes, official["prototypes"])


def test_prototypes_from_a_batch_leave_the_network_a_gradient():
    net = ContrastiveTempNet(64, num_prototypes=8)
    image, text = features(40, 64)
    net.init_prototypes(text)
    assert torch.equal(net.prototypes, text[:8])
    tau = net(image)
    assert tau.std() > 1e-5
    (grad,) = torch.autograd.grad(tau.sum(), net.prototypes)
    fresh = ContrastiveTempNet(64, num_prototypes=8)
    (expected,) = torch.autograd.grad(fresh(image).sum(), fresh.prototypes)
    assert grad.norm() > expected.norm()  # N(0, 1) are eight times as long
    with pytest.raises(ValueError, match="features must have at least 8 rows for 8 prototypes"):
        net.init_prototypes(text[:7])


def test_a_sample_s_dropout_is_the_same_on_every_rank():
    net = ContrastiveTempNet(D, num_prototypes=8)
    ranks = [copy.deepcopy(net), copy.deepcopy(net)]
    image, _ = features(300, D)
    ids = torch.randperm(1 << 40 >> 20)[:300] << 20
    order = torch.randperm(300)
    for _ in range(3):
        torch.manual_seed(torch.randint(1000, ()).item())  # ranks do not share torch's generator
        first = ranks[0](image, ids)
        torch.rand(7)
        second = ranks[1](image[order], ids[order])
        torch.testing.assert_close(first[order], second, rtol=1e-6, atol=0)
    assert (first - ranks[0](image, ids)).abs().max() > 1e-5  # every call draws a new mask
    other = ContrastiveTempNet(D, num_prototypes=8, seed=1)
    other.load_state_dict(ranks[1].state_dict())
    assert (other(image, ids) - ranks[1](image, ids)).abs().max() > 1e-5
    resumed = copy.deepcopy(net)
    resumed.load_state_dict(ranks[1].state_dict())
    assert torch.equal(resumed(image, ids), ranks[1](image, ids))


@pytest.mark.parametrize("p", [0.5, 0.1])
def test_dropout_of_ids_is_fair_and_independent(p):
    net = ContrastiveTempNet(64, dropout=p)
    ids = torch.arange(4000)
    features, masks = torch.zeros(4000, 64), []
    for _ in range(2):
        key, drawn, probability = net._mask(features, ids, True)
        half = torch.ops.tempnet.sigmoid_dropout.reference(
            features, features[0], None, key, drawn, 0, probability
        )
        masks.append(2 * half)
    kept = torch.stack(masks) != 0
    assert torch.equal(masks[0].unique(), torch.tensor([0, 1 / (1 - p)]))
    sigma = math.sqrt(p * (1 - p))
    assert (kept.float().mean() - (1 - p)).abs() < 5 * sigma / math.sqrt(kept.numel())
    assert (kept.float().mean((0, 1)) - (1 - p)).abs().max() < 5 * sigma / math.sqrt(8000)
    # Columns, neighbouring ids and consecutive calls are uncorrelated.
    x = (kept.float() - (1 - p)) / sigma
    assert (x[0].T @ x[0] / 4000).fill_diagonal_(0).abs().max() < 5 / math.sqrt(4000)
    assert (x[0, 1:] * x[0, :-1]).mean().abs() < 5 / math.sqrt(4000 * 64)
    assert (x[0] * x[1]).mean().abs() < 5 / math.sqrt(4000 * 64)


def test_dropout_mask_cannot_be_drawn_again_in_a_backward():
    net = ContrastiveTempNet(D, num_prototypes=8)
    image, _ = features(B, D)
    tau = checkpoint(net, image, torch.arange(B), use_reentrant=False)
    with pytest.raises(RuntimeError, match="ContrastiveTempNet: forward runs again within a back"):
        tau.sum().backward()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"feature_dim": 0}, "feature_dim must be >= 1, got 0"),
        ({"num_prototypes": 0}, "num_prototypes must be >= 1, got 0"),
        ({"dropout": 1}, r"dropout must be in \[0, 1\), got 1"),
        ({"seed": 1 << 40}, r"seed must be in \[0, 2\^31\), got 1099511627776"),
        ({"tau_min": 0.2}, "tau_min and tau_max must satisfy 0 < tau_min < tau_max, got 0.2"),
    ],
)
def test_bad_network_options_say_what_was_expected(options, message):
    with pytest.raises(ValueError, match=f"ContrastiveTempNet: {message}"):
        ContrastiveTempNet(**({"feature_dim": 4} | options))
    with pytest.raises(ValueError, match=r"features must have shape \(B, 4\), got \(2, 5\)"):
        ContrastiveTempNet(4)(torch.zeros(2, 5))
