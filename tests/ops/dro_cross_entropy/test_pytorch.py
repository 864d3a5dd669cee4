"""What PyTorch must be able to do with the token loss: opcheck, compile, func.grad, checkpointing,
autocast; and what it cannot, which raises."""

import compare
import pytest
import torch
from backends import BACKENDS
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from tempnet_kernels import dro_cross_entropy
from tempnet_kernels.core import register


def make(device, n=6, v=40, dtype=torch.float32):
    logits = torch.randn(n, v, device=device).to(dtype) * 2
    target = torch.randint(0, v, (n,), device=device)
    target[1] = -100
    return logits, target, torch.rand(n, device=device) + 0.5


def gradients(function, logits, tau):
    z, t = logits.clone().requires_grad_(), tau.clone().requires_grad_()
    loss = function(z, t)
    loss.sum().backward()
    return loss.detach(), z.grad, t.grad


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, dtype, softcap, device):
    logits, target, tau = make(device, dtype=dtype)
    target[1] = 3  # opcheck compares with ==, which NaN statistics fail
    scale = torch.rand(6, device=device)
    ops = torch.ops.tempnet
    numbers = (0.5, -100, 0.1, 0.01, softcap)
    check = torch.library.opcheck
    for want_grad in (False, True):
        for want_argmax in (False, True):
            args = (logits, target, tau, scale, *numbers, want_grad, want_argmax)
            check(getattr(ops.dro_cross_entropy_fwd, backend), args)
    check(
        getattr(ops.dro_cross_entropy_fwd_, backend),
        (logits.clone(), target, tau, scale, *numbers, True),
    )
    forward = getattr(ops.dro_cross_entropy_fwd, backend)
    rows = forward(logits, target, tau, scale, *numbers, False, False)[2]
    for columns in ((0, 40), (40, 120)):
        args = target, tau, scale, rows, *numbers[1:], *columns
        check(getattr(ops.dro_cross_entropy_bwd, backend), (logits, *args))
        check(getattr(ops.dro_cross_entropy_bwd_, backend), (logits.clone(), *args))
        for want in (False, True):
            check(
                getattr(ops.dro_cross_entropy_stats, backend),
                (logits, target, tau, -100, softcap, *columns, want, want),
            )
    check(getattr(ops.scale_rows_, backend), (logits.clone(), scale))


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_fullgraph_dynamic(backend, reduction, overwrite, device, monkeypatch):
    monkeypatch.setattr(register, "_available", {})  # as in the first call of a process
    if overwrite and reduction == "none":
        reduction = "sum"
    target = None

    def function(z, t):
        loss, stats = dro_cross_entropy(
            z * 1.0, target, t, 0.5, reduction=reduction, return_stats=True,
            overwrite_logits=overwrite, backend=backend,
        )  # fmt: skip
        return loss + 0 * stats.argmax.sum()

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for n, v in ((6, 40), (9, 73)):
        logits, target, tau = make(device, n, v)
        eager = gradients(function, logits, tau)
        for got, expected in zip(gradients(compiled, logits, tau), eager, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


def test_compiled_calls_with_other_numbers_of_tokens_are_at_most_two_graphs(device):
    logits, target, _ = make(device)
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(
        lambda n: dro_cross_entropy(logits, target, normalizer=n), fullgraph=True, backend=count
    )
    for n in range(100, 112):
        torch.testing.assert_close(compiled(n), dro_cross_entropy(logits, target, normalizer=n))
    assert len(graphs) <= 2


@pytest.mark.parametrize("grad", [False, True])
def test_forward_mode_raises(grad):
    """Without gradients no autograd function is entered, which would raise."""
    logits, target, _ = make("cpu")
    with forward_ad.dual_level(), torch.set_grad_enabled(grad):
        dual = forward_ad.make_dual(logits.detach(), torch.ones_like(logits))
        with pytest.raises(NotImplementedError):
            dro_cross_entropy(dual, target)


def test_compile_with_inductor(device):
    logits, target, tau = make(device)
    function = lambda z, t: 3 * dro_cross_entropy(z * 1.0, target, t, 0.5)  # noqa: E731
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    eager = gradients(function, logits, tau)
    for got, expected in zip(gradients(compiled, logits, tau), eager, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_target_raises_under_compile(backend):
    if torch.cuda.is_available() and backend == "triton":
        backend = "native"  # the contract for CPU tensors
    logits, target, _ = make("cpu")
    target[3] = 40
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda z: dro_cross_entropy(z, target, backend=backend), backend="aot_eager"
    )
    with pytest.raises(IndexError, match=r"target\[3\]"):
        compiled(logits)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_func_grad(backend, reduction, device):
    logits, target, tau = make(device)
    function = lambda z, t: dro_cross_entropy(  # noqa: E731
        z, target, t, 0.5, reduction=reduction, backend=backend
    ).sum()
    grads = torch.func.grad(function, argnums=(0, 1))(logits, tau)
    for got, expected in zip(grads, gradients(function, logits, tau)[1:], strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_non_reentrant_checkpointing(backend, overwrite, device):
    logits, target, tau = make(device)

    def function(z, t):
        return dro_cross_entropy(
            z * 1.0, target, t, 0.5, overwrite_logits=overwrite, backend=backend
        )

    saved = gradients(lambda z, t: checkpoint(function, z, t, use_reentrant=False), logits, tau)
    for got, expected in zip(saved, gradients(function, logits, tau), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_keeps_bf16_logits(backend, device):
    logits, target, tau = make(device, dtype=torch.bfloat16)
    function = lambda z, t: dro_cross_entropy(z, target, t, 0.5, backend=backend)  # noqa: E731
    with torch.autocast(device, dtype=torch.bfloat16):
        inside = gradients(function, logits, tau)
    assert inside[0].dtype == torch.float32 and inside[1].dtype == torch.bfloat16
    for got, expected in zip(inside, gradients(function, logits, tau), strict=True):
        assert torch.equal(got, expected)


def test_forward_does_not_read_results_on_the_host(device):
    """Under fake tensors .item() and every other read of data raise: what would wait for a GPU."""
    with torch._subclasses.FakeTensorMode():
        logits = torch.randn(4, 9, requires_grad=True)
        weight = torch.rand(4, requires_grad=True)
        target = torch.zeros(4, dtype=torch.int64)
        loss = dro_cross_entropy(logits, target, torch.rand(4), row_weight=weight)
        loss.backward()
        assert logits.grad.shape == (4, 9) and weight.grad.shape == (4,)


def test_float64_on_a_backend_without_it_raises():
    logits, target, _ = make("cpu", dtype=torch.float64)
    with pytest.raises(TypeError, match=r"for backend 'triton' on cpu, got torch\.float64"):
        dro_cross_entropy(logits, target, backend="triton")


def test_use_of_overwritten_logits_raises(backend, device):
    leaf = torch.randn(3, 8, device=device, requires_grad=True)
    target = torch.tensor([1, 2, 3], device=device)
    for reshape in (lambda z: z, lambda z: z.view(1, 3, 8)):
        wide = leaf * 1.0
        view = reshape(wide)
        loss = dro_cross_entropy(
            view, target.view(view.shape[:-1]), overwrite_logits=True, backend=backend
        )
        with pytest.raises(RuntimeError, match="logits were used after overwrite_logits"):
            (loss + view.sum()).backward()
    wide = leaf * 1.0
    saved = wide.exp()  # keeps its result, fine
    square = wide**2  # keeps the logits for its backward
    loss = dro_cross_entropy(wide, target, overwrite_logits=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + square.sum() + saved.sum()).backward()


@pytest.mark.parametrize("overwrite", [False, True])
def test_second_backward_raises(backend, overwrite, device):
    leaf = torch.randn(3, 8, device=device, requires_grad=True)
    target = torch.tensor([1, 2, 3], device=device)
    loss = dro_cross_entropy(leaf * 1.0, target, overwrite_logits=overwrite, backend=backend)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="dro_cross_entropy: a second backward of one loss"):
        loss.backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward_raises(backend, reduction, device):
    target = torch.tensor([1, 2, 3], device=device)

    def loss(z):
        return dro_cross_entropy(z, target, reduction=reduction, backend=backend).sum()

    z = torch.randn(3, 8, device=device, requires_grad=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss(z), z, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.func.grad(lambda z: torch.func.grad(loss)(z).square().sum())(z.detach())


def test_forward_under_no_grad_leaves_the_logits_alone(backend, device):
    leaf = torch.randn(3, 8, device=device, requires_grad=True)
    wide = (leaf * 1.0).detach()
    before = wide.clone()
    target = torch.tensor([1, 2, 3], device=device)
    with torch.no_grad():
        dro_cross_entropy(wide, target, overwrite_logits=True, backend=backend)
        dro_cross_entropy(leaf, target, overwrite_logits=True, backend=backend)
    dro_cross_entropy(wide, target, overwrite_logits=True, backend=backend)
    assert torch.equal(wide, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("n, v", [(6, 40), (200, 40000), (200, 70000)])  # row, twice, cluster
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_cuda_graph_replays_a_step(backend, n, v):
    """Capture raises where anything waits for the GPU."""
    logits, target, tau = make("cuda", n, v)
    z, t = logits.clone().requires_grad_(), tau.clone().requires_grad_()

    def step():
        loss = dro_cross_entropy(z, target, t, 0.5, backend=backend)
        return loss.detach(), *torch.autograd.grad(loss, (z, t))

    compare.assert_graph_replays(step)
