"""The contrastive loss on several gloo processes against one process and the definition."""

from unittest import mock

import contrastive
import pytest
import torch
import torch.nn.functional as F
from backends import CPU_BACKENDS
from compare import counted_flops
from processes import EVEN, UNEVEN, error_of

from tempnet_kernels import ContrastiveStats, dro_contrastive
from tempnet_kernels.chunked import dro_contrastive as tiles
from tempnet_kernels.nn import RobustContrastiveLoss

D = 16


def by_rank(sizes, **arguments):
    """A dict of its own rows for each rank."""
    return [
        {name: None if x is None else x.split(sizes)[rank] for name, x in arguments.items()}
        for rank in range(len(sizes))
    ]


# What runs in the processes: functions of the group and of all ranks' arguments.


def visit_tiles(group, tile_rows, *args):
    """``visit`` in tiles of up to 512 columns."""
    with (
        mock.patch.dict(tiles.TILE_ROWS, cpu=tile_rows),
        mock.patch.dict(tiles.TILE_BYTES, cpu=1),
    ):
        return visit(group, *args)


def visit(group, ranks, options, upstream=(1.0,) * 4):
    own = dict(ranks[group.rank()])
    tensors = contrastive.leaves([own.pop(name) for name in contrastive.NAMES])
    loss, stats = dro_contrastive(
        *tensors, contrastive.RHO, **own, **options, return_stats=True, process_group=group
    )
    loss.backward(torch.tensor(upstream[group.rank()]))
    return loss.detach(), [t.grad / group.size() for t in tensors], tuple(stats)


def check(
    gloo, tensors, sizes, backend, log_s=(None, None), excluded=None, own=None, tile_rows=None,
    **options,
):  # fmt: skip
    """Value, gradients and statistics of the ranks, joined, within the bounds of one process."""
    arguments = dict(zip(contrastive.NAMES, tensors, strict=True))
    arguments |= {"log_s_image": log_s[0], "log_s_text": log_s[1], **(own or {})}
    task = (by_rank(sizes, **arguments), {"backend": backend, **options})
    if tile_rows is None:
        results = gloo.run(len(sizes), visit, *task)
    else:
        results = gloo.run(len(sizes), visit_tiles, tile_rows, *task)
    exact = contrastive.leaves(tensors, torch.float64)
    wide = tuple(None if old is None else old.double() for old in log_s)
    value, surrogate, states, kls = contrastive.definition(
        *exact, log_s=wide, excluded=excluded, **options
    )
    grads = torch.autograd.grad(surrogate, exact)
    for loss, _, _ in results:
        assert torch.equal(loss, results[0][0]), "every rank returns the same loss"
        torch.testing.assert_close(loss.double(), value, rtol=2e-6, atol=0)
    _, got, stats = zip(*results, strict=True)
    got, stats = ([torch.cat(x) for x in zip(*parts, strict=True)] for parts in (got, stats))
    for name, g, e, t in zip(contrastive.NAMES, got, grads, tensors, strict=True):
        bound = 2e-6 if t.dtype == torch.float32 else torch.finfo(t.dtype).eps
        assert (g.double() - e).norm() <= bound * e.norm(), name
    for g, e in zip(stats[:4], (*states, *kls), strict=True):
        torch.testing.assert_close(g.double(), e, rtol=2e-6, atol=2e-5, equal_nan=True)
    return ContrastiveStats(*stats)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize(
    "sizes", [*EVEN.values(), *UNEVEN.values()], ids=lambda sizes: "-".join(map(str, sizes))
)
@pytest.mark.parametrize("gamma, include_positive", [(1.0, True), (0.8, False)])
def test_ranks_are_one_process_on_the_whole_batch(gloo, backend, sizes, gamma, include_positive):
    log_s = contrastive.states(48) if gamma < 1 else (None, None)
    check(
        gloo, contrastive.make(48), sizes, backend, log_s, gamma=gamma,
        include_positive=include_positive,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [EVEN[4], UNEVEN[4]], ids=["even", "uneven"])
def test_16_bit_features(gloo, dtype, sizes):
    check(gloo, contrastive.make(48, dtype=dtype), sizes, "native")


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("sizes", [EVEN[4], UNEVEN[4]], ids=["even", "uneven"])
def test_ids_and_masks_reach_across_the_ranks(gloo, backend, sizes):
    image_ids, text_ids = torch.arange(48) % 31, torch.arange(48) // 2 + 10**12
    negative_mask = torch.rand(48, 48) > 0.2
    excluded = (image_ids[:, None] == image_ids) | (text_ids[:, None] == text_ids)
    own = {"image_ids": image_ids, "text_ids": text_ids, "negative_mask": negative_mask}
    log_s = contrastive.states(48)
    stats = check(
        gloo, contrastive.make(48), sizes, backend, log_s, excluded | ~negative_mask, own,
        gamma=0.8,
    )  # fmt: skip
    assert not stats.kl_image.isnan().any()


@pytest.mark.parametrize("tile_rows", [64, 1024], ids=["many_tiles", "few_tiles"])
def test_ragged_tiles_and_temperatures_near_the_floor(gloo, tile_rows):
    tensors = contrastive.make(700, low=0.005)
    check(gloo, tensors, (250, 130, 200, 120), "native", tile_rows=tile_rows)


def extra_candidates(group, image, text, sizes):
    """Every rank has some texts that are no image's pair, its pairs at the end, and one with no
    image at all."""
    rank = group.rank()
    own = text.split([n for _, n in sizes])[rank].clone().requires_grad_()
    image = image.split([m for m, _ in sizes])[rank].clone().requires_grad_()
    m, n = image.shape[0], own.shape[0]
    loss = dro_contrastive(
        image, own, 0.1, 0.1, positive=torch.arange(n - m, n), process_group=group
    )
    loss.backward()
    return loss.detach(), image.grad / group.size(), own.grad / group.size()


def test_extra_candidates_of_a_rank_are_negatives_of_all(gloo):
    sizes = [(5, 8), (0, 3), (7, 7), (3, 9)]
    m, n = 15, 27
    image = F.normalize(torch.randn(m, D), dim=1).requires_grad_()
    text = F.normalize(torch.randn(n, D), dim=1).requires_grad_()
    positive = torch.cat([torch.arange(3, 8), torch.arange(11, 18), torch.arange(24, 27)])
    loss = dro_contrastive(image, text, 0.1, 0.1, positive=positive)
    loss.backward()
    results = gloo.run(4, extra_candidates, image.detach(), text.detach(), sizes)
    for value, *_ in results:
        torch.testing.assert_close(value, loss.detach())
    torch.testing.assert_close(torch.cat([r[1] for r in results]), image.grad)
    torch.testing.assert_close(torch.cat([r[2] for r in results]), text.grad)


def test_the_gradient_is_that_of_the_sum_of_the_ranks_losses(gloo):
    ranks = by_rank(EVEN[2], **dict(zip(contrastive.NAMES, contrastive.make(48), strict=True)))
    plain = gloo.run(2, visit, ranks, {})
    scaled = gloo.run(2, visit, ranks, {}, (1.0, 2.5))
    for (_, expected, _), (_, got, _) in zip(plain, scaled, strict=True):
        for e, g in zip(expected, got, strict=True):
            torch.testing.assert_close(g, e * 3.5 / 2)


def frozen_side(group, image, text, side):
    rows = slice(group.rank() * 6, group.rank() * 6 + 6)
    own = [x[rows].clone() for x in (image, text)]
    own[side].requires_grad_()
    dro_contrastive(*own, 0.1, 0.1, process_group=group).backward()
    return own[side].grad / group.size()


@pytest.mark.parametrize("side", [0, 1])
def test_one_side_frozen(gloo, side):
    tensors = [F.normalize(torch.randn(12, D), dim=1) for _ in range(2)]
    got = torch.cat(gloo.run(2, frozen_side, *tensors, side))
    tensors[side].requires_grad_()
    dro_contrastive(*tensors, 0.1, 0.1).backward()
    torch.testing.assert_close(got, tensors[side].grad)


def frozen_features(group):
    image, text = (x.detach() for x in contrastive.features(6, D))
    tau = torch.full((6,), 0.1, requires_grad=True)
    dro_contrastive(image, text, tau, 0.1, rho=3.0, process_group=group).backward()
    return image, text, tau.grad / group.size()


def test_only_temperatures_are_learned(gloo):
    image, text, grad = map(torch.cat, zip(*gloo.run(2, frozen_features), strict=True))
    tau = torch.full((12,), 0.1, requires_grad=True)
    dro_contrastive(image, text, tau, 0.1, rho=3.0).backward()
    torch.testing.assert_close(grad, tau.grad)


def last_ranks(group):
    """A group whose ranks are not those of the world; a small part's gradient is no view of what a
    larger one took."""
    pair = torch.distributed.new_group([1, 3])
    if torch.distributed.get_rank() not in (1, 3):
        return None
    image, text = contrastive.features(4 if pair.rank() else 90, D)
    loss = dro_contrastive(image, text, 0.1, 0.1, process_group=pair)
    loss.backward()
    assert text.grad.untyped_storage().nbytes() == text.grad.numel() * 4
    return image.detach(), text.detach(), loss.detach()


def test_a_group_of_some_ranks_of_the_world(gloo):
    _, (image, text, loss), _, (last_image, last_text, same) = gloo.run(4, last_ranks)
    expected = dro_contrastive(
        torch.cat([image, last_image]), torch.cat([text, last_text]), 0.1, 0.1
    )
    torch.testing.assert_close(loss, expected)
    assert torch.equal(loss, same)


# Work of a rank.


def work(group, b):
    image, text = contrastive.features(b // group.size(), 64)
    with counted_flops(tiles, "dro_contrastive_stats_", "dro_contrastive_grad") as flops:
        dro_contrastive(image, text, 0.1, 0.1, process_group=group).backward()
    return sum(flops)


def test_a_rank_of_four_does_a_quarter_of_the_work(gloo):
    b = 1024
    (whole,) = gloo.run(1, work, b)
    assert whole == 3 * 2 * b * b * 64  # the similarities are kept: three products
    assert all(one <= 0.3 * whole for one in gloo.run(4, work, b))


# What goes wrong.


def unlike(group, name):
    """Rank 1 differs in ``name``."""
    last = group.rank() == 1
    image, text = contrastive.features(3, D + (last and name == "D"))
    options = {
        "rho": {"rho": 1.0},
        "image_ids": {"image_ids": torch.arange(3)},
        "include_positive": {"include_positive": True},
    }
    if last and name == "dtype":
        image, text = image.detach().half().requires_grad_(), text.half()
    if last and name == "text.requires_grad":
        text = text.detach()
    tau = 0.1
    if name == "requires_grad of any argument":
        image, text = image.detach(), text.detach()
        tau = torch.tensor(0.1, requires_grad=not last)
    options = options.get(name, {}) if last else {}
    with torch.set_grad_enabled(not (last and name == "grad mode")):
        return error_of(
            group,
            lambda _: dro_contrastive(
                image, text, tau, 1, **{"rho": 0.0, **options}, process_group=group
            ),
        )


@pytest.mark.parametrize(
    "name",
    [
        "D", "dtype", "rho", "image_ids", "include_positive", "text.requires_grad", "grad mode",
        "requires_grad of any argument",
    ],
)  # fmt: skip
def test_ranks_that_differ_raise_instead_of_waiting_for_ever(gloo, name):
    for error in gloo.run(2, unlike, name):
        assert error.startswith(
            f"ValueError: dro_contrastive: {name} must be the same on all ranks"
        )


def no_pairs(group, texts):
    image, _ = contrastive.features(0, D)
    _, text = contrastive.features(texts, D)
    loss = dro_contrastive(
        image, text, 0.1, 0.1, positive=torch.arange(0), process_group=group
    )  # fmt: skip
    loss.backward()
    return loss.detach(), image.grad, text.grad


@pytest.mark.parametrize("texts", [0, 3])
def test_no_pairs_on_any_rank(gloo, texts):
    for loss, grad_image, grad_text in gloo.run(2, no_pairs, texts):
        assert loss.isnan() and grad_image.shape == (0, D)
        assert grad_text.shape == (texts, D) and (grad_text == 0).all()


def test_what_is_no_group_says_what_was_expected():
    image, text = contrastive.features(3, D)
    with pytest.raises(TypeError, match=r"process_group must be a torch.distributed.ProcessGroup"):
        dro_contrastive(image, text, 0.1, 0.1, process_group="world")
    loss_fn = RobustContrastiveLoss(3, method="sogclr", process_group=-100)  # of a non-member
    with pytest.raises(TypeError, match=r"RobustContrastiveLoss: process_group must be .* got int"):
        loss_fn(image, text, torch.arange(3))
