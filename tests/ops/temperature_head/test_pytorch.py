"""The temperature networks' operators and autograd functions in PyTorch: opcheck, torch.compile,
torch.func, double backward, and how many operators a network costs."""

import pytest
import torch
from backends import BACKENDS
from torch.profiler import profile

from tempnet_kernels.core import tempnet
from tempnet_kernels.nn import ContrastiveTempNet, TempNet

V, D = 50, 12


def networks():
    """(network, its input, other arguments)."""
    lm = TempNet(V, hidden_size=16, center="max")
    contrastive = ContrastiveTempNet(D, num_prototypes=8)
    ids = torch.arange(9) << 40
    yield lm, torch.randn(3, 3, V), ()
    yield contrastive, torch.randn(9, D), (ids,)
    yield contrastive, torch.randn(9, D), ()


def gradients(network, call, *args):
    torch.manual_seed(3)
    network.zero_grad()
    tau = call(*args)
    (tau * torch.arange(1.0, tau.numel() + 1).view(tau.shape)).sum().backward()
    return [tau.detach(), *(p.grad.clone() for p in network.parameters())]


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    def check(name, *args):
        torch.library.opcheck(getattr(getattr(torch.ops.tempnet, name), backend), args)

    key, ids = torch.tensor(1 << 50), torch.arange(18)[::2]
    pre, factor = torch.randn(9, 5), torch.rand(9)
    for drawn in ((None, None, None), (factor, key, None), (None, key, ids)):
        check("sigmoid_dropout", pre, torch.randn(5), *drawn, 4, 0.5)
    for scaled in (None, factor):
        check("sigmoid_dropout_bwd", torch.randn(5, 9).T, pre.sigmoid(), scaled, 0.5)
    last = torch.zeros(1), torch.ones(1, 5), torch.zeros(1)
    for norms in (None, torch.rand(5)):
        check("temperature_head", pre, norms, *last, norms is None, 0.5, 2.0)
        grad = torch.ones(()).expand(9)
        check("temperature_head_bwd", grad, pre, norms, *last, norms is None, 0.5, 2.0)


@pytest.mark.parametrize("dynamic", [False, True])
def test_networks_compile_into_one_graph(dynamic):
    for network, x, args in networks():
        torch._dynamo.reset()
        compiled = torch.compile(network, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        # Of one step of the dropout's count.
        state = {k: v.clone() for k, v in network.state_dict().items()}
        expected = gradients(network, network, x, *args)
        network.load_state_dict(state)
        for a, b in zip(gradients(network, compiled, x, *args), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_func_grad_is_the_gradient():
    for network, x, args in networks():
        network.eval()
        parameters = dict(network.named_parameters())

        def total(p, network=network, x=x, args=args):
            return torch.func.functional_call(network, p, (x, *args)).sum()

        found = torch.func.grad(total)(parameters)
        expected = torch.autograd.grad(network(x, *args).sum(), parameters.values())
        for (name, got), other in zip(found.items(), expected, strict=True):
            assert got.norm() > 0, name
            assert torch.equal(got, other.view_as(got)), name


def test_autocast_of_the_backward_s_caller_rounds_nothing():
    for network, x, args in networks():
        network.eval()
        named = dict(network.named_parameters())
        named.pop("proj.0.weight", None)  # of torch's own product
        results = []
        for enabled in (False, True):
            tau = network(x, *args).sum()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                results.append(torch.autograd.grad(tau, list(named.values())))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


def test_second_derivative_raises():
    for network, x, args in networks():
        loss = network(x, *args).sum()
        with pytest.raises(RuntimeError, match="TempNet: there is no second derivative"):
            torch.autograd.grad(loss, list(network.parameters()), create_graph=True)


def test_no_gradient_is_made_where_none_is_wanted(monkeypatch):
    called = []
    operator = tempnet._op

    def counted(name, backend):
        called.append(name)
        return operator(name, backend)

    monkeypatch.setattr(tempnet, "_op", counted)
    network, x, _ = next(networks())
    network(x).sum().backward()
    assert sum(name.endswith("_bwd") for name in called) == 2
    called.clear()
    network.requires_grad_(False)
    assert not network(x).requires_grad
    assert not [name for name in called if name.endswith("_bwd")]


# Metadata only, or where a result goes.
FREE = {
    "empty", "empty_like", "empty_strided", "new_empty", "view", "reshape", "expand", "as_strided",
    "slice", "select", "t", "transpose", "unsqueeze", "detach", "detach_", "alias", "_unsafe_view",
    "resize_", "narrow", "_reshape_alias", "split", "split_with_sizes", "squeeze", "numpy_T", "to",
    "result_type", "flatten", "lift_fresh", "contiguous", "matmul", "linear", "resolve_conj",
    "permute", "promote_types", "fill_",  # of what tests poison
}  # fmt: skip


def operators(call):
    """The names of the operators that a call runs."""
    call()
    with profile() as run:
        call()
    found = []
    for event in run.events():
        namespace, _, name = event.name.partition("::")
        if (
            namespace in ("aten", "tempnet")
            and name not in FREE
            and not any(child.name.partition("::")[2] not in FREE for child in event.cpu_children)
        ):
            found.append(name)
    return found


@pytest.mark.parametrize("which", ["TempNet", "ContrastiveTempNet"])
def test_few_operators(which):
    """A launch each on a GPU."""
    network, x, args = {type(n).__name__: (n, x, a) for n, x, a in list(networks())[:2]}[which]
    forward = operators(lambda: network(x, *args))
    assert len(forward) <= 8, forward
    tau = network(x, *args).sum()
    parameters = list(network.parameters())
    backward = operators(lambda: torch.autograd.grad(tau, parameters, retain_graph=True))
    assert len(backward) <= 11, backward  # one of them for the sum
