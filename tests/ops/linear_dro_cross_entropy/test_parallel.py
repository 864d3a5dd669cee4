"""The token loss of a linear layer whose outputs several gloo processes share, and the TempNet with
a sharded first layer, against one process."""

import copy
from unittest import mock

import linear_step
import pytest
import torch
from backends import CPU_BACKENDS
from compare import assert_within_twice_plain
from linear_loss import RHO, gradients, layer, network, plain
from processes import error_of
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from tempnet_kernels import linear_dro_cross_entropy
from tempnet_kernels.core import collectives
from tempnet_kernels.nn import TempNet, TempNetCausalLMLoss, TempNetCrossEntropyLoss
from tempnet_kernels.ops import linear_dro_cross_entropy as linear

V = 120


def own(x, group, dim=0):
    return x.chunk(group.size(), dim)[group.rank()].clone()


# What runs in the processes: functions of the group.


def visit(group, tensors, target, tau, fold, options):
    """{name: gradient of this rank}, the loss and the statistics."""
    hidden, weight, bias = tensors
    net = isinstance(tau, TempNet)
    tau = tau.shard(group) if net else tau.requires_grad_()
    leaves = [hidden, own(weight, group), None if bias is None else own(bias, group)]
    leaves = [None if x is None else x.requires_grad_() for x in leaves]
    options = {"tempnet" if net else "tau": tau, "rho": RHO, "return_stats": True, **options}
    with mock.patch.object(linear, "folding_pays", lambda *sizes: fold):
        loss, stats = linear_dro_cross_entropy(
            *leaves[:2], target, bias=leaves[2], process_group=group, chunk_rows=8, **options
        )
    loss.backward(torch.ones_like(loss))
    named = dict(tau.named_parameters()) if net else {"tau": tau}
    named |= dict(zip(("hidden", "weight", "bias"), leaves, strict=True))
    grads = {name: x.grad for name, x in named.items() if x is not None}
    return {"loss": loss.detach()} | grads, tuple(stats)


def joined(results):
    """What one process would have: the rest is the same on every rank, bit by bit."""
    grads, stats = results[0]
    parts = {"weight": 0, "bias": 0, "proj.0.weight": 1}
    for other, other_stats in results[1:]:
        for name, value in other.items():
            assert name in parts or torch.equal(value, grads[name]), name
        for a, b in zip(stats, other_stats, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    for name in parts.keys() & grads.keys():
        grads[name] = torch.cat([result[0][name] for result in results], parts[name])
    return grads, stats


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("tau", ["given", "folded", "direct"])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_ranks_are_one_process_with_all_columns(gloo, backend, tau, world_size):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        *tensors, target = layer(19, V, 24, dtype)
        chosen = torch.rand(19) + 0.4 if tau == "given" else network(V, "max")
        options = {"backend": backend}
        results = gloo.run(
            world_size, visit, tensors, target, copy.deepcopy(chosen), tau == "folded", options
        )
        grads, _ = joined(results)
        exact = gradients(plain, tensors, target, chosen, dtype=torch.float64)
        usual = gradients(plain, tensors, target, chosen)
        assert grads.keys() == exact.keys()
        for name, value in grads.items():
            assert exact[name].abs().max() > 0, name
            if name == "hidden" and dtype != torch.float32 and world_size > 1:
                # A sum over the ranks of gradients that were rounded.
                bound = 2 * (usual[name] - exact[name]).abs().max()
                bound += world_size * torch.finfo(dtype).eps * exact[name].abs().max()
                assert (value - exact[name]).abs().max() <= bound
            else:
                assert_within_twice_plain(value, exact[name], usual[name], name)


@pytest.mark.parametrize("tau", ["given", "folded", "direct"])
@pytest.mark.parametrize("center", [None, "max"])
def test_float64_equals_one_process_to_rounding(gloo, center, tau):
    """Also: a softcap, each row's loss, columns that are off, one rank's among them entirely."""
    for extra in ({}, {"softcap": 4.0, "reduction": "none"}, {"z_loss": 0.02, "reduction": "sum"}):
        hidden, weight, bias, target = layer(19, V, 24, torch.float64)
        if not extra:
            bias[: V // 4] = -torch.inf
            target[target < V // 4] = V // 2
        chosen = network(V, center, dtype=torch.float64)
        if tau == "given":
            chosen = torch.rand(19, dtype=torch.float64) + 0.4
        fold = tau == "folded" and "softcap" not in extra
        options = {"backend": "native", **extra}
        exact = gradients(plain, (hidden, weight, bias), target, chosen, **extra)
        for world_size in (2, 4):
            results = gloo.run(
                world_size, visit, (hidden, weight, bias), target, copy.deepcopy(chosen), fold,
                options,
            )  # fmt: skip
            for name, value in joined(results)[0].items():
                torch.testing.assert_close(value, exact[name], rtol=1e-10, atol=1e-13, msg=name)


def exchanged(group, tensors, target, net):
    """Bytes that a rank gives to collectives."""
    count = []

    def counted(function):
        def call(*args, **kwargs):
            tensor = args[1] if function is gather else args[0]
            count.append(tensor.numel() * tensor.itemsize)
            return function(*args, **kwargs)

        return call

    net.shard(group)
    gather, reduce = collectives.all_gather_into, collectives.dist.all_reduce
    with (
        mock.patch.object(collectives, "all_gather_into", counted(gather)),
        mock.patch.object(collectives.dist, "all_reduce", counted(reduce)),
    ):
        linear_dro_cross_entropy(
            tensors[0], own(tensors[1], group), target, tempnet=net, rho=RHO, process_group=group
        ).backward()
    return sum(count)


def test_tens_of_bytes_of_a_row_are_exchanged(gloo):
    n, v, d = 200, 4000, 8
    *tensors, target = layer(n, v, d, bias=False)
    net = TempNet(v, hidden_size=16)
    live = (target != -100).sum().item()
    # No gradient of hidden is wanted here. The folded first layer [H, D] goes once, and 8 bytes of
    # the dropout's key; 4 in each chunk are the number of columns.
    for size in gloo.run(4, exchanged, tensors, target, net):
        sizes = 9 * 8  # and what else must be the same
        assert size == live * 44 + 16 * d * 4 + 8 + 4 + sizes


# The TempNet itself, and the modules.


def predicted(group, logits, net, training):
    net = net.train(training).shard(group)
    tau = net(own(logits, group, -1))
    tau.square().sum().backward()
    return tau.detach(), {name: p.grad for name, p in net.named_parameters()}


@pytest.mark.parametrize("center", [None, "max"])
def test_sharded_network_predicts_the_same(gloo, center):
    logits = torch.randn(3, 5, V, dtype=torch.float64) * 4
    logits[0, 0, : V // 4] = -torch.inf
    net = network(V, center, dtype=torch.float64, dropout=0.5)
    tau = net.eval()(logits)
    tau.square().sum().backward()
    for world_size in (1, 2, 4):
        results = gloo.run(world_size, predicted, logits, copy.deepcopy(net), False)
        for other, grads in results:
            torch.testing.assert_close(other, tau.detach(), rtol=1e-12, atol=0)
            for name, p in net.named_parameters():
                if name != "proj.0.weight":
                    torch.testing.assert_close(grads[name], p.grad, rtol=1e-10, atol=1e-14)
        whole = torch.cat([grads["proj.0.weight"] for _, grads in results], 1)
        torch.testing.assert_close(whole, net.proj[0].weight.grad, rtol=1e-10, atol=1e-14)


def test_ranks_drop_the_same(gloo):
    """Though each has a generator of its own."""
    logits = torch.randn(50, V) * 4
    first, second = gloo.run(2, predicted, logits, network(V, dropout=0.5), True)
    assert torch.equal(first[0], second[0])
    kept = network(V, dropout=0.5).eval()(logits)
    assert (first[0] - kept).abs().max() > 1e-3


def modules(group, hidden, weight, labels, net):
    net.shard(group)
    w = own(weight, group)
    causal, token = TempNetCausalLMLoss(net, RHO), TempNetCrossEntropyLoss(net, RHO)
    z = hidden @ w.T
    losses = causal(hidden, labels, weight=w), causal(z, labels), token(z[:, :-1], labels[:, 1:])
    return [loss.detach() for loss in losses], copy.deepcopy(causal).process_group is group


def test_modules_take_the_group_of_their_network(gloo):
    hidden, weight = torch.randn(2, 9, 16), torch.randn(V, 16)
    labels = torch.randint(0, V, (2, 9))
    net = network(V)
    expected = TempNetCausalLMLoss(net, RHO)(hidden, labels, weight=weight)
    for losses, shared in gloo.run(2, modules, hidden, weight, labels, net):
        assert shared
        for loss in losses:
            torch.testing.assert_close(loss, expected.detach())


def wrapped(group, logits, target, net):
    whole = TempNetCrossEntropyLoss(net, RHO)(logits, target)
    data_parallel = torch.nn.parallel.DistributedDataParallel(net, process_group=group)
    loss = TempNetCrossEntropyLoss(data_parallel, RHO)(logits, target)
    return whole.detach(), loss.detach(), net(logits[0]).shape


def test_group_of_ddp_is_not_one_of_columns(gloo):
    logits, target = torch.randn(6, V), torch.randint(0, V, (6,))
    for whole, loss, shape in gloo.run(2, wrapped, logits, target, network(V)):
        assert torch.equal(loss, whole) and shape == ()


def one_row(group, row, net):
    return net.shard(group)(own(row, group))


def test_sharded_network_takes_a_single_row(gloo):
    row, net = torch.randn(V), network(V).eval()
    for tau in gloo.run(2, one_row, row, net):
        torch.testing.assert_close(tau, net(row), rtol=1e-5, atol=0)


def test_shard_keeps_what_the_first_rank_has(gloo):
    net = network(V)
    whole, parts = net.state_dict(), gloo.run(4, sharded_state, net)
    assert torch.equal(torch.cat([p["proj.0.weight"] for p in parts], 1), whole["proj.0.weight"])
    for part in parts:
        assert part.keys() == whole.keys()
        assert all(torch.equal(part[k], whole[k]) for k in whole if k != "proj.0.weight")


def sharded_state(group, net):
    if group.rank():
        with torch.no_grad():
            net.last.bias += group.rank()  # drifted
    return net.shard(group).state_dict()


# What goes wrong.


def errors(group):
    hidden, weight, _, target = layer(5, V, 8, bias=False)
    w, net = own(weight, group), network(V)
    bad = target.clone()
    bad[2] = V

    def call(*args, **options):
        return error_of(
            group, lambda group: linear_dro_cross_entropy(*args, process_group=group, **options)
        )

    not_sharded = call(hidden, w, target, tempnet=net)
    net.shard(group)
    return (
        not_sharded,
        error_of(group, lambda group: linear_dro_cross_entropy(hidden, w, target, tempnet=net)),
        error_of(group, net.shard),
        error_of(group, network(V + 1).shard),
        call(hidden, w, bad),
        call(hidden, weight[: 5 + group.rank()], target % 8),
        call(hidden, w, target, chunk_rows=1 + group.rank()),
        error_of(group, lambda _: linear_dro_cross_entropy(hidden, w, target, process_group=0)),
    )


def test_misuse_raises_on_every_rank(gloo):
    for found in gloo.run(2, errors):
        for message, words in zip(
            found,
            (
                "ValueError: linear_dro_cross_entropy: tempnet must be sharded over process_group",
                "ValueError: linear_dro_cross_entropy: tempnet must be sharded over process_group",
                "RuntimeError: TempNet: shard was called before",
                "TempNet: vocab_size must be a multiple of the 2 ranks of process_group, got 121",
                "IndexError: linear_dro_cross_entropy: target[2] must be in [0, 120)",
                "must have as many rows on every rank of process_group",
                "must be the same, got by rank [60, 60], [8, 8], [5, 5], [1, 2] and",
                "TypeError: linear_dro_cross_entropy: process_group must be a torch.distributed",
            ),
            strict=True,
        ):
            assert words in message, message


def fully_sharded(group, hidden, weight, target, net):
    """The TempNet's gradients where FSDP2 holds its parameters: the mean over the ranks."""
    mesh = DeviceMesh.from_group(group, "cpu")
    fully_shard(net, mesh=mesh)
    rows = slice(group.rank(), None, group.size())
    linear_step.step(target[rows], net, "native")(hidden[rows], weight).backward()
    return {name: p.grad.full_tensor() for name, p in net.named_parameters()}


def test_parameters_sharded_by_fsdp(gloo):
    hidden, weight, target, net = linear_step.make("cpu")
    expected = [
        linear_step.gradients(
            linear_step.step(target[i::2], net, "native"), hidden[i::2], weight, net=net
        )[3:]
        for i in range(2)
    ]
    for grads in gloo.run(2, fully_sharded, hidden, weight, target, net):
        for got, first, second in zip(grads.values(), *expected, strict=True):
            torch.testing.assert_close(got, (first + second) / 2, rtol=1e-5, atol=1e-9)
