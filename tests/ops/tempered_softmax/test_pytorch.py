"""What PyTorch must be able to do with the tempered softmax."""

import pytest
import torch
from backends import BACKENDS
from compare import assert_graph_replays
from tempered import FUNCTIONS, logarithm, make, run
from torch.utils.checkpoint import checkpoint

from tempnet_kernels import tempered_log_softmax, tempered_softmax
from tempnet_kernels.core import register

registered = pytest.mark.parametrize("name", BACKENDS)


@logarithm
def test_double_backward_raises(backend, log, device):
    logits, tau, _ = make((3, 8), device=device)
    function = lambda z: FUNCTIONS[log](z, tau, backend=backend).square().sum()  # noqa: E731
    z = logits.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(function(z), z, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.func.grad(lambda z: torch.func.grad(function)(z).square().sum())(logits)


def test_logits_changed_before_the_backward_raise(backend, device):
    logits, tau, upstream = make((3, 8), device=device)
    wide = logits.requires_grad_() * 1.0
    output = tempered_softmax(wide, tau, backend=backend)
    output.backward(upstream, retain_graph=True)
    output.backward(upstream)  # a second one is the same
    output = tempered_softmax(wide, tau, backend=backend)
    wide.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward(upstream)


@logarithm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@registered
def test_opcheck(name, dtype, log, device):
    logits, tau, upstream = make((6, 40), dtype, device)
    ops = torch.ops.tempnet
    forward = getattr(ops.tempered_softmax_fwd, name)
    torch.library.opcheck(forward, (logits, tau, log))
    _, rows = forward(logits, tau, log)
    for want in (False, True):
        torch.library.opcheck(
            getattr(ops.tempered_softmax_bwd, name), (logits, tau, rows, upstream, log, want)
        )


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@registered
def test_compile_fullgraph_dynamic(name, compiler, device, monkeypatch):
    if compiler == "inductor" and name != "native":
        pytest.skip("inductor sees the same graph for every backend; one is enough")
    monkeypatch.setattr(register, "_available", {})  # as in the first call of a process

    def function(z, t):
        z = z * 1.0
        p = tempered_softmax(z, t, backend=name)
        return (p * tempered_log_softmax(z, t, backend=name)).sum(-1) + p[:, 0]

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=compiler)
    for shape in ((6, 40), (9, 73)):
        logits, tau, _ = make(shape, device=device)
        results = []
        for f in (compiled, function):
            z, t = logits.clone().requires_grad_(), tau.clone().requires_grad_()
            output = f(z, t)
            results.append((output.detach(), *torch.autograd.grad(output.sum(), (z, t))))
        for got, eager in zip(*results, strict=True):
            torch.testing.assert_close(got, eager, rtol=1e-5, atol=1e-6)


@logarithm
@registered
def test_func_grad_checkpointing_and_autocast_give_the_same_gradients(name, log, device):
    logits, tau, upstream = make((6, 40), torch.bfloat16, device)
    expected_grads = run(name, log, logits, tau, upstream)[1:]

    def function(z, t):
        return FUNCTIONS[log](z * 1.0, t, backend=name)

    def backward(output, z, t):
        assert output.dtype == torch.bfloat16
        return torch.autograd.grad(output, (z, t), upstream)

    def under_func(z, t):
        # The product's rounding is that of the upstream gradient.
        return (function(z, t) * upstream).sum()

    z, t = logits.clone().requires_grad_(), tau.clone().requires_grad_()
    checkpointed = backward(checkpoint(function, z, t, use_reentrant=False), z, t)
    with torch.autocast(device, dtype=torch.bfloat16):
        autocast = backward(function(z, t), z, t)
    func = torch.func.grad(under_func, argnums=(0, 1))(logits, tau)
    for got in (checkpointed, autocast, func):
        for g, e in zip(got, expected_grads, strict=True):
            assert torch.equal(g, e)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@logarithm
@pytest.mark.parametrize("n, v", [(6, 40), (200, 40000), (200, 70001)])
@pytest.mark.parametrize("name", ["native", "triton"])
def test_cuda_graph_replays_a_step(name, n, v, log):
    logits, tau, upstream = make((n, v), device="cuda")
    assert_graph_replays(lambda: run(name, log, logits, tau, upstream))
