"""TempNetClipLoss on two processes against open_clip's ClipLoss, and against one process."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
from open_clip_by_hand import (
    SAMPLES,
    Data,
    features,
    module_of,
    networks,
    open_clip_by_hand,
    patched,
    tiny_clip,
    train,
)
from processes import error_of
from torch.nn.parallel import DistributedDataParallel

from tempnet_kernels.integrations.open_clip import TempNetClipLoss


def in_both(group, loss_class, local_loss, method="clip"):
    """(loss, gradients of the own features, gradient of the log scale) of one rank."""
    with open_clip_by_hand() as package:
        options = dict(
            local_loss=local_loss, gather_with_grad=True, rank=dist.get_rank(), world_size=2
        )
        if loss_class == "ClipLoss":
            loss_fn = package.ClipLoss(**options)
        else:
            loss_fn = TempNetClipLoss(**options, method="clip")
        image, text = (
            x.detach().chunk(2)[dist.get_rank()].clone().requires_grad_() for x in features(16)
        )
        log_scale = torch.tensor(math.log(1 / 0.07), requires_grad=True)
        loss = loss_fn(image, text, log_scale.exp())
        loss.backward()
        return loss.detach(), image.grad, text.grad, log_scale.grad


@pytest.mark.parametrize("local_loss", [False, True])
def test_clip_on_two_ranks_is_open_clips_loss(two_ranks, local_loss):
    theirs, own = (
        two_ranks.run(2, in_both, x, local_loss) for x in ("ClipLoss", "TempNetClipLoss")
    )
    for rank in range(2):
        for i in (1, 2):  # of the features: on each rank
            assert (own[rank][i] - theirs[rank][i]).abs().max() <= 1e-6
            assert theirs[rank][i].abs().max() > 1e-2
        if not local_loss:
            assert (own[rank][0] - theirs[rank][0]).abs() <= 1e-6
    # With local_loss open_clip's value and gradient of the scale are of a rank's rows: the mean
    # over ranks, which DDP takes, is that of the batch.
    for i in (0, 3):
        assert abs(sum(x[i] for x in own) - sum(x[i] for x in theirs)) <= 2e-6


def contrastive_training(num_samples, sizes=(8,), rank=0):
    """(state dicts of the model and of the loss before and after). With ids the TempNets' dropout
    is on: its masks depend on them, and not on the rank."""
    loop = module_of(patched("train.py"), "patched_train") if num_samples else None
    nets = networks(rank)  # DDP hands on those of rank 0
    tempnets = TempNetClipLoss(
        True, True, True, rank, len(sizes), num_samples=num_samples, rho=1.0,
        **{name: net.train(bool(num_samples)) for name, net in nets.items()},
    )  # fmt: skip
    before = copy.deepcopy(tempnets.state_dict())
    model, loss = tiny_clip(), tempnets
    model.logit_scale.requires_grad_(False)
    if len(sizes) > 1:
        model, loss = DistributedDataParallel(model), DistributedDataParallel(tempnets)
    train(
        loss, epochs=2, data=Data(ids=bool(num_samples), sizes=sizes, rank=rank), model=model,
        loop=loop, optimizer=torch.optim.SGD, tempnet_lr=10.0, rank=rank, world_size=len(sizes),
    )  # fmt: skip
    return before, getattr(model, "module", model).state_dict(), tempnets.state_dict()


def train_in_ddp(group, num_samples, sizes):
    with open_clip_by_hand():
        return contrastive_training(num_samples, sizes, dist.get_rank())


@pytest.mark.parametrize("num_samples", [0, SAMPLES])
def test_ddp_on_two_ranks_of_unlike_sizes_trains_as_one_process(two_ranks, open_clip, num_samples):
    before, *expected = contrastive_training(num_samples)
    results = two_ranks.run(2, train_in_ddp, num_samples, (5, 3))
    for name in ("image_temp_gen.prototypes", "text_temp_gen.linear_1.weight"):
        assert (expected[1][name] - before[name]).abs().max() > 1e-3
    for _, *states in results:
        for got, single in zip(states, expected, strict=True):
            for name, e in single.items():
                torch.testing.assert_close(
                    got[name], e, rtol=1e-5, atol=1e-6, equal_nan=True, msg=name
                )
    for a, b in zip(*(x[2].values() for x in results), strict=True):
        assert torch.equal(a, b)  # in step, bit for bit


def without_ddp(group):
    """Networks drawn differently by rank, and no DDP to hand on those of rank 0."""
    loss_fn = TempNetClipLoss(
        True, True, rank=dist.get_rank(), world_size=2, rho=1.0, **networks(dist.get_rank())
    )
    image, text = features()
    return error_of(group, lambda _: loss_fn(image, text, None))


def other_worlds(group):
    tries = (
        {},
        {"world_size": 2, "rank": 1 - dist.get_rank()},
        {"world_size": 2, "rank": dist.get_rank()},
    )
    return [error_of(group, lambda _, x=x: TempNetClipLoss(method="clip", **x)) for x in tries]


def test_misuse_on_two_ranks_says_what_to_do(two_ranks):
    for message in two_ranks.run(2, without_ddp):
        assert (
            message.startswith("ValueError")
            and "wrap the loss in DistributedDataParallel" in message
        )
    for rank, (forgotten, swapped, no_grad) in enumerate(two_ranks.run(2, other_worlds)):
        assert f"those of torch.distributed, {rank} and 2, got 0 and 1" in forgotten
        assert "pass args.rank and args.world_size" in swapped
        assert "gather_with_grad must be True with 2 processes" in no_grad
