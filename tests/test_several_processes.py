"""The contrastive loss on several gloo processes against one process and the definition."""

import contextlib
import copy
import functools
import math
import os

import contrastive
import processes
import pytest
import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from tempnet_kernels import ContrastiveStats, _similarity, dro_contrastive
from tempnet_kernels.nn import ContrastiveTempNet, RobustContrastiveLoss

# Pairs by rank: as many on each, and not.
EVEN = {1: (48,), 2: (24, 24), 4: (12, 12, 12, 12)}
UNEVEN = {2: (31, 17), 4: (20, 0, 27, 1)}
D, SAMPLES = 16, 60
# On CPU tensors, where Triton runs in its interpreter only.
BACKENDS = ["reference", "native"] + ["triton"] * (os.environ.get("TRITON_INTERPRET") == "1")


@pytest.fixture(scope="module")
def gloo(tmp_path_factory):
    pool = processes.Processes(4, tmp_path_factory.mktemp("gloo"))
    yield pool
    pool.stop()


def by_rank(sizes, **arguments):
    """A dict of its own rows for each rank."""
    return [
        {name: None if x is None else x.split(sizes)[rank] for name, x in arguments.items()}
        for rank in range(len(sizes))
    ]


# What runs in the processes: functions of the group and of all ranks' arguments.


def visit(group, ranks, options, upstream=(1.0,) * 4, tile_rows=None):
    if tile_rows is not None:
        _similarity.TILE_ROWS["cpu"], _similarity.TILE_BYTES["cpu"] = tile_rows, 1
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
    results = gloo.run(
        len(sizes), visit, by_rank(sizes, **arguments), {"backend": backend, **options},
        (1.0,) * 4, tile_rows,
    )  # fmt: skip
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


@pytest.mark.parametrize("backend", BACKENDS)
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


@pytest.mark.parametrize("backend", BACKENDS)
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
    """Tiles of up to 512 columns."""
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


# The module under DDP.


class Model(torch.nn.Module):
    """Both encoders, and the loss with its networks."""

    def __init__(self, method, group):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = torch.nn.Linear(20, D), torch.nn.Linear(20, D)
        networks = {}
        if method == "tempnet":
            networks = {
                f"{side}_temp_gen": ContrastiveTempNet(D, num_prototypes=8, seed=i)
                for i, side in enumerate(("image", "text"))
            }
        self.loss = RobustContrastiveLoss(SAMPLES, method=method, **networks, process_group=group)

    def forward(self, image, text, ids):
        encoded = (F.normalize(f(x), dim=1) for f, x in ((self.image, image), (self.text, text)))
        return self.loss(*encoded, ids)


def batches(steps, first=0):
    """[48, 40] both sides of a pair, and its id; the last one repeats ids within the batch."""
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(48, 20, generator=generator)
        ids = torch.randperm(SAMPLES, generator=generator)[:48]
        if step == 2:
            ids[40:] = ids[:8]
        yield x, x + 0.5 * torch.randn(48, 20, generator=generator), ids


def train(group, method, sizes, steps, first=0, checkpoint=None, sharded=False):
    """(losses, state dict) after some steps of SGD, or more of them after a checkpoint."""
    model = Model(method, group)
    if checkpoint is not None:
        model.load_state_dict(checkpoint)
    if sharded:
        fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu"))
    elif group.size() > 1:
        model = DistributedDataParallel(model, process_group=group)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for batch in batches(steps, first):
        own = (x.split(sizes)[group.rank()] for x in batch)
        optimizer.zero_grad()
        loss = model(*own)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    state = getattr(model, "module", model).state_dict()
    whole = lambda x: x.full_tensor() if isinstance(x, DTensor) else x.clone()  # noqa: E731
    return torch.stack(losses), {name: whole(x) for name, x in state.items()}


def assert_same_training(results, expected):
    losses, state = expected
    for got_losses, got_state in results:
        torch.testing.assert_close(got_losses, losses, rtol=1e-5, atol=1e-6)
        assert got_state.keys() == state.keys()
        for name, e in state.items():
            torch.testing.assert_close(
                got_state[name], e, rtol=2e-5, atol=2e-6, equal_nan=True, msg=name
            )
            same = got_state[name].nan_to_num() == results[0][1][name].nan_to_num()
            assert same.all(), f"{name} is not in step on all ranks"


@pytest.mark.parametrize("method", ["clip", "sogclr", "isogclr", "tempnet"])
@pytest.mark.parametrize(
    "sizes", [EVEN[2], EVEN[4], UNEVEN[4]], ids=lambda sizes: "-".join(map(str, sizes))
)
def test_ddp_trains_as_one_process_with_the_state_in_step(gloo, method, sizes):
    (expected,) = gloo.run(1, train, method, EVEN[1], 4)
    initial = Model(method, None).state_dict()
    changed = [name for name, x in expected[1].items() if not torch.equal(x, initial[name])]
    assert "image.weight" in changed and ("loss.state.log_s_text" in changed) == (method != "clip")
    assert_same_training(gloo.run(len(sizes), train, method, sizes, 4), expected)


@pytest.mark.parametrize("method", ["clip", "tempnet"])
def test_fsdp_trains_as_one_process(gloo, method):
    (expected,) = gloo.run(1, train, method, EVEN[1], 4)
    results = gloo.run(2, train, method, UNEVEN[2], 4, 0, None, True)
    assert_same_training(results, expected)


@pytest.mark.parametrize("method", ["isogclr", "tempnet"])
def test_a_checkpoint_of_four_ranks_goes_on_with_two(gloo, method):
    (whole,) = gloo.run(1, train, method, EVEN[1], 5)
    losses, checkpoint = gloo.run(4, train, method, UNEVEN[4], 3)[3]
    results = gloo.run(2, train, method, UNEVEN[2], 2, 3, checkpoint)
    joined = [(torch.cat([losses, more]), state) for more, state in results]
    assert_same_training(joined, whole)


def repeated_id(group):
    """Both ranks have id 5: the state of the last rank's pair is kept, on both."""
    loss_fn = RobustContrastiveLoss(8, method="sogclr", tau=0.1, process_group=group)
    image, text = contrastive.features(3, D)
    ids = torch.tensor([[5, 1, 2], [3, 5, 4]])[group.rank()]
    _, stats = loss_fn(image, text, ids, return_stats=True)
    return loss_fn.state.log_s_image, stats.log_s_image


def test_of_equal_ids_on_two_ranks_the_last_one_counts(gloo):
    (first, own), (second, last) = gloo.run(2, repeated_id)
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
    assert first[5] == last[1] and first[5] != own[0]
    assert first[1] == own[1] and first[4] == last[2] and first[[0, 6, 7]].isnan().all()


def overflowed(group):
    """One rank's image is infinite: the loss is NaN on all, and no trace of it in the state."""
    loss_fn = RobustContrastiveLoss(8, method="isogclr", process_group=group)
    image, text = contrastive.features(4, D)
    ids = torch.arange(4) + 4 * group.rank()
    loss_fn(image, text, ids)
    bad = image.detach().clone()
    bad[0, 0] = math.inf if group.rank() == 1 else 0.5
    value = loss_fn(bad, text, ids)
    return value, loss_fn.state.state_dict(), loss_fn(image, text, ids).detach()


def test_a_batch_that_overflowed_on_one_rank_leaves_no_trace(gloo):
    for value, state, after in gloo.run(2, overflowed):
        assert value.isnan() and after.isfinite()
        assert all(x.isfinite().all() for x in state.values())


# Work of a rank.


@contextlib.contextmanager
def counted_products():
    """The floating-point operations of the loss's matrix products, in a list. They run within an
    operator, where a counter around the call does not see them."""
    flops, own = [], {name: getattr(_similarity, name) for name in ("_multiply", "_add_product")}

    def count(product, *args):
        with FlopCounterMode(display=False) as counter:
            result = product(*args)
        flops.append(counter.get_total_flops())
        return result

    for name, product in own.items():
        setattr(_similarity, name, functools.partial(count, product))
    yield flops
    for name, product in own.items():
        setattr(_similarity, name, product)


def work(group, b):
    image, text = contrastive.features(b // group.size(), 64)
    with counted_products() as flops:
        dro_contrastive(image, text, 0.1, 0.1, process_group=group).backward()
    return sum(flops)


def test_a_rank_of_four_does_a_quarter_of_the_work(gloo):
    b = 1024
    (whole,) = gloo.run(1, work, b)
    assert whole == 3 * 2 * b * b * 64  # the similarities are kept: three products
    assert all(one <= 0.3 * whole for one in gloo.run(4, work, b))


# What goes wrong.


def error_of(group, call):
    try:
        call(group)
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    return None


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
            group, lambda _: dro_contrastive(image, text, tau, 1, process_group=group, **options)
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


def unlike_module(group, name):
    options = {"num_samples": 8, "method": "sogclr"}
    options |= {name: 9 + group.rank()} if name in ("num_samples", "rho") else {}
    options |= {name: 0.8 + 0.1 * group.rank()} if name == "gamma" else {}
    loss_fn = RobustContrastiveLoss(**options, process_group=group)
    loss_fn.train(name != "update_state" or group.rank() == 0)
    image, text = contrastive.features(3, D)
    return error_of(group, lambda _: loss_fn(image, text, torch.arange(3)))


def loaded_on_one_rank(group):
    """The error, and the loss once the state is loaded on both."""
    loss_fn = RobustContrastiveLoss(8, method="sogclr", process_group=group)
    image, text = contrastive.features(3, D)
    loss_fn(image, text, torch.arange(3))
    saved = copy.deepcopy(loss_fn.state_dict())
    fresh = RobustContrastiveLoss(8, method="sogclr", process_group=group)
    if group.rank() == 0:
        fresh.load_state_dict(saved)
    error = error_of(group, lambda _: fresh(image, text, torch.arange(3)))
    fresh.load_state_dict(saved)
    return error, fresh(image, text, torch.arange(3)).detach()


def test_a_state_loaded_on_one_rank_only_raises(gloo):
    for error, loss in gloo.run(2, loaded_on_one_rank):
        assert error.startswith("ValueError: RobustContrastiveLoss: the state (a state dict is to")
        assert loss.isfinite()


def official(group):
    loss_fn = RobustContrastiveLoss(
        8, method="sogclr", estimator="official", process_group=group
    )  # fmt: skip
    return error_of(group, lambda _: loss_fn(*contrastive.features(3, D), torch.arange(3), epoch=0))


@pytest.mark.parametrize("name", ["update_state", "num_samples", "rho", "gamma"])
def test_modules_that_differ_raise(gloo, name):
    for error in gloo.run(2, unlike_module, name):
        assert error.startswith(f"ValueError: RobustContrastiveLoss: {name} must be the same on")


def test_the_official_estimator_is_of_one_process(gloo):
    for error in gloo.run(2, official):
        assert "estimator='official' is of one process, got 2" in error


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


def compiled_whole(group):
    """One process in an initialised group: no exchange, no graph break."""
    torch.compiler.reset()
    image, text = contrastive.features(6, D)
    loss_fn = RobustContrastiveLoss(8, method="sogclr", process_group=group)
    call = lambda a, b: loss_fn(a, b, torch.arange(6), update_state=False)  # noqa: E731
    return torch.compile(call, fullgraph=True, backend="aot_eager")(image, text) - call(image, text)


def test_one_process_of_a_group_compiles_whole(gloo):
    (difference,) = gloo.run(1, compiled_whole)
    assert difference.detach().abs() < 1e-6


def copied_and_compiled(group):
    loss_fn = RobustContrastiveLoss(8, method="sogclr", process_group=group)
    twin = copy.deepcopy(loss_fn)
    assert twin.process_group is group and twin.state.log_s_image is not loss_fn.state.log_s_image
    compiled = torch.compile(twin, backend="aot_eager")
    results = []
    for f in (loss_fn, compiled):
        torch.manual_seed(group.rank())
        for _ in range(2):
            image, text = contrastive.features(4, D)
            value = f(image, text, torch.arange(4) + 4 * group.rank())
            value.backward()
        results.append((value.detach(), image.grad, getattr(f, "_orig_mod", f).state.log_s_text))
    return results


def test_a_copy_and_a_compiled_loss_share_the_group(gloo):
    for eager, compiled in gloo.run(2, copied_and_compiled):
        for e, c in zip(eager, compiled, strict=True):
            assert not math.isnan(float(e.sum()))
            torch.testing.assert_close(c, e)
