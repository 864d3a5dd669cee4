"""What PyTorch must be able to do with the token loss of a linear layer; and what it cannot, which
raises."""

import compare
import pytest
import torch
from backends import BACKENDS
from linear_step import assert_same, gradients, make, step
from torch.utils.checkpoint import checkpoint

from tempnet_kernels import linear_dro_cross_entropy
from tempnet_kernels.chunked import linear_dro_cross_entropy as chunked_linear
from tempnet_kernels.nn import TempNet


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_double_backward_raises(backend, reduction, device):
    hidden, weight, target, net = make(device)
    hidden.requires_grad_()
    loss = step(target, net, backend, reduction=reduction)(hidden, weight).sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_backward_raises(backend, device):
    hidden, weight, target, net = make(device)
    loss = step(target, net, backend)(hidden.requires_grad_(), weight)
    loss.backward(retain_graph=True)
    with pytest.raises(
        RuntimeError, match="linear_dro_cross_entropy: a second backward of one loss"
    ):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, dtype, device):
    hidden, weight, target, net = make(device, dtype=dtype)
    target[1] = 3  # opcheck compares with ==, which NaN statistics fail
    ops, check = torch.ops.tempnet, torch.library.opcheck
    for center, softcap in ((False, 0.0), (True, 0.0), (False, 3.0), (True, 3.0)):
        logits = hidden @ weight.T
        check(getattr(ops.row_moments, backend), (logits, center, softcap))
        moments = getattr(ops.row_moments, backend)(logits, center, softcap)
        args = logits, moments[0], moments[4], softcap
        check(getattr(ops.normalized_rows, backend), args)
    key = torch.tensor(5, device=device)
    tau, scale = torch.rand(2, 6, device=device) + 0.5
    tensors = [x.detach() for x in (net.proj[0].weight, *net.head(torch.float32))]
    numbers = (0.5, -100, 0.1, 0.01)
    for wants in ([True] * 5, [False] * 5, [True, False, False, False, True]):
        for network, fold, want_argmax in (([], False, True), (tensors, True, False)):
            wants = wants if network else [*wants[:3], False, False]
            check(
                getattr(ops.linear_dro_cross_entropy_fwd, backend),
                (
                    hidden, weight, weight[:, 0].contiguous(), target, tau, scale, network,
                    key if network else None, wants, want_argmax, *numbers, 0.0, 0.5, 2.0, 0.5,
                    False, fold, 4, False,
                ),
            )  # fmt: skip


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_fullgraph_dynamic(backend, reduction, device):
    weight, net = make(device)[1], make(device)[3]
    target = None

    def function(h, w):
        loss, stats = step(target, net, backend, reduction=reduction, return_stats=True)(h, w)
        return loss + 0 * stats.argmax.sum()

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (6, 9):
        hidden, _, target, _ = make(device, n)
        eager = gradients(function, hidden, weight, net=net)
        assert_same(gradients(compiled, hidden, weight, net=net), eager, rtol=1e-6, atol=1e-7)


def test_compile_with_inductor(device):
    hidden, weight, target, net = make(device)
    function = step(target, net, "auto")
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True)
    eager = gradients(function, hidden, weight, net=net)
    assert_same(gradients(compiled, hidden, weight, net=net), eager, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_func_grad(backend, reduction, device):
    hidden, weight, target, net = make(device)
    function = step(target, net.requires_grad_(False), backend, reduction=reduction)
    grads = torch.func.grad(lambda h, w: function(h, w).sum(), argnums=(0, 1))(hidden, weight)
    assert_same(grads, gradients(function, hidden, weight)[1:], rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_reentrant_checkpointing(backend, device):
    """Its dropout is drawn again as it was."""
    hidden, weight, target, net = make(device)
    net.proj[2].p = 0.5
    function = step(target, net, backend)
    results = []
    for call in (function, lambda h, w: checkpoint(function, h, w, use_reentrant=False)):
        torch.manual_seed(1)
        results.append(gradients(call, hidden, weight, net=net))
    assert_same(*results, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_multiplies_in_its_dtype(backend, device):
    hidden, weight, target, net = make(device)
    with torch.autocast(device, dtype=torch.bfloat16):
        loss, *grads = gradients(step(target, net, backend), hidden, weight, net=net)
    assert loss.dtype == torch.float32 and {g.dtype for g in grads} == {torch.float32}
    rounded = gradients(step(target, net, backend), hidden.bfloat16(), weight.bfloat16(), net=net)
    assert_same((loss, *grads), (x.float() for x in rounded), rtol=0, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_does_not_read_results_on_the_host(reduction):
    """Under fake tensors .item() and every other read of data raise: what would wait for a GPU."""
    with torch._subclasses.FakeTensorMode():
        hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(40, 8)
        target, net = torch.zeros(6, dtype=torch.int64), TempNet(40)
        step(target, net, "auto", reduction=reduction)(hidden, weight).sum().backward()
        assert hidden.grad.shape == (6, 8) and net.proj[0].weight.grad.shape == (256, 40)


def test_the_loop_does_not_read_results_on_the_host(monkeypatch):
    """The operator's loop itself, which fake tensors do not reach through the operator."""
    # It reads CPU tensors only.
    monkeypatch.setattr(chunked_linear, "check_target", lambda *args: None)
    with torch._subclasses.FakeTensorMode():
        hidden, weight, tau, scale = (torch.empty(s) for s in ((6, 8), (40, 8), 6, 6))
        target, net = torch.empty(6, dtype=torch.int64), TempNet(40)
        tensors = [net.proj[0].weight, *net.head(torch.float32)]
        with torch.no_grad():
            *_, grads = chunked_linear.linear_dro_cross_entropy_fwd(
                "reference", hidden, weight, None, target, tau, scale, tensors, None, [True] * 5,
                True, 0.5, -100, 0.1, 0.01, 0.0, 0.5, 2.0, 0.0, True, True, 4, False,
            )  # fmt: skip
        w1, b1, w2, *_ = tensors
        assert [g.shape for g in grads] == [w1.shape, w2.shape, (2 * 256 + 2 + b1.shape[0],)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_cuda_graph_replays_a_step(backend):
    """Capture raises where anything waits for the GPU."""
    hidden, weight, target, net = make("cuda", 200, 4000, 64, torch.bfloat16)
    h, w = hidden.requires_grad_(), weight.requires_grad_()

    def replayed():
        loss = linear_dro_cross_entropy(
            h, w, target, tempnet=net, rho=0.5, chunk_rows=64, backend=backend
        )
        return loss.detach(), *torch.autograd.grad(loss, (h, w, *net.parameters()))

    compare.assert_graph_replays(replayed)
