"""RobustContrastiveLoss on several gloo processes, under DDP and FSDP, against one process."""

import copy
import math

import contrastive
import pytest
import torch
import torch.nn.functional as F
from processes import EVEN, UNEVEN, error_of
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tempnet_kernels.nn import ContrastiveTempNet, RobustContrastiveLoss

D, SAMPLES = 16, 60


class Model(torch.nn.Module):
    """Both encoders, and the loss with its networks."""

    def __init__(self, method, group):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = torch.nn.Linear(20, D), torch.nn.Linear(20, D)
        options = {}
        if method == "isogclr":  # a smaller one multiplies the rounding of the similarities
            options = {"tau": 0.2, "tau_min": 0.1, "tau_max": 1.0}
        if method == "tempnet":
            options = {
                f"{side}_temp_gen": ContrastiveTempNet(D, num_prototypes=8, seed=i)
                for i, side in enumerate(("image", "text"))
            }
        self.loss = RobustContrastiveLoss(
            SAMPLES, rho=1.0, method=method, **options, process_group=group
        )

    def forward(self, image, text, ids):
        encoded = (F.normalize(f(x), dim=1) for f, x in ((self.image, image), (self.text, text)))
        return self.loss(*encoded, ids)


def batches(steps, first=0):
    """Both sides of 48 pairs, each [48, 20], and their ids; those of step 2 repeat some."""
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(48, 20, generator=generator)
        ids = torch.randperm(SAMPLES, generator=generator)[:48]
        if step == 2:
            ids[40:] = ids[:8]
        yield x, x + 0.5 * torch.randn(48, 20, generator=generator), ids


def train(group, method, sizes, steps, first=0, checkpoint=None, sharded=None):
    """(losses, state dict) after some steps of SGD, or more of them after a checkpoint. sharded:
    the parts of the model that FSDP takes by themselves, before all of it."""
    model = Model(method, group)
    if checkpoint is not None:
        model.load_state_dict(checkpoint)
    if sharded is not None:
        mesh = DeviceMesh.from_group(group, "cpu")
        for part in (*map(model.get_submodule, sharded), model):
            fully_shard(part, mesh=mesh)
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


@pytest.mark.parametrize(
    "method, sharded",
    [("clip", ()), ("tempnet", ()), ("tempnet", ("loss.image_temp_gen", "loss.text_temp_gen"))],
    ids=["clip", "tempnet", "tempnet-networks"],
)
def test_fsdp_trains_as_one_process(gloo, method, sharded):
    (expected,) = gloo.run(1, train, method, EVEN[1], 4)
    results = gloo.run(2, train, method, UNEVEN[2], 4, 0, None, sharded)
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
    loss_fn = RobustContrastiveLoss(8, rho=1.0, method="isogclr", process_group=group)
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


def drifted(group, method):
    """The loss of equal parameters, and the error once they are not."""
    loss_fn = Model(method, group).loss
    image, text = contrastive.features(3, D)
    ids = torch.arange(3) + 3 * group.rank()
    before = loss_fn(image, text, ids).detach()
    with torch.no_grad():
        next(loss_fn.parameters())[0] += group.rank()
    return before, error_of(group, lambda _: loss_fn(image, text, ids))


@pytest.mark.parametrize("method", ["clip", "tempnet"])
def test_parameters_that_drifted_apart_raise(gloo, method):
    for before, error in gloo.run(2, drifted, method):
        assert before.isfinite()
        assert error.startswith(
            "ValueError: RobustContrastiveLoss: the sum of the parameters (wrap"
        )


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
