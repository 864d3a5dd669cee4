"""What PyTorch must be able to do with the optimal temperature."""

import compare
import pytest
import torch
from backends import BACKENDS

from tempnet_kernels import optimal_temperature


def test_there_is_no_gradient(backend, device):
    logits = torch.randn(4, 50, device=device, requires_grad=True)
    rho = torch.rand(4, device=device, requires_grad=True)
    tau = optimal_temperature(logits, rho, 0.1, 9, backend=backend)
    assert not tau.requires_grad
    loss = (logits.sum(1) * tau).sum()  # a constant to the loss
    (grad,) = torch.autograd.grad(loss, logits)
    assert torch.equal(grad, tau[:, None].expand(4, 50))


@pytest.mark.parametrize("name", BACKENDS)
def test_func_grad_takes_it_as_a_constant(name, device):
    logits = torch.randn(4, 50, device=device)
    grad = torch.func.grad(
        lambda z: (z.sum(1) * optimal_temperature(z, 0.5, 0.1, 9, backend=name)).sum()
    )(logits)
    tau = optimal_temperature(logits, 0.5, 0.1, 9, backend=name)
    assert torch.equal(grad, tau[:, None].expand(4, 50))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_opcheck(name, dtype, device):
    logits, rho = torch.randn(4, 40, device=device).to(dtype), torch.rand(4, device=device)
    op = getattr(torch.ops.tempnet.optimal_temperature, name)
    torch.library.opcheck(op, (logits, rho, 0.1, 9.0))
    torch.library.opcheck(op, (logits, rho[:1].expand(4), 0.1, 9.0))


@pytest.mark.parametrize("name", BACKENDS)
def test_compile_fullgraph_dynamic(name, device):
    def function(z):
        tau, stats = optimal_temperature(z * 1.0, 0.5, 0.1, 9, return_stats=True, backend=name)
        return tau * 2, stats.iterations

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for n, v in ((6, 40), (9, 73)):
        logits = torch.randn(n, v, device=device, requires_grad=True)
        for got, expected in zip(compiled(logits), function(logits), strict=True):
            assert torch.equal(got, expected)


def test_results_are_not_read_on_the_host():
    """Under fake tensors .item() and every other read of data raise: what would wait for a GPU."""
    with torch._subclasses.FakeTensorMode():
        tau = optimal_temperature(torch.randn(2, 3, 9), torch.rand(2, 3), 0.1, 9)
        assert tau.shape == (2, 3) and tau.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("v", [40, 40000, 140000])  # in registers, and read again
@pytest.mark.parametrize("name", ["native", "triton"])
def test_cuda_graph_replays_the_search(name, v):
    logits = torch.randn(50, v, device="cuda")

    def step():
        tau, stats = optimal_temperature(logits, 0.5, 0.1, 9, return_stats=True, backend=name)
        return tau, stats.kl

    compare.assert_graph_replays(step)
