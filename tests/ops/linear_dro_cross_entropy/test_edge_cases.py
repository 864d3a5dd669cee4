"""The token loss of a linear layer: odd input, wrong arguments, and what PyTorch must be able to do
with it."""

import os
import subprocess
import sys
from pathlib import Path

import compare
import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from tempnet_kernels import _linear, dro_cross_entropy, linear_dro_cross_entropy
from tempnet_kernels.nn import TempNet

linear_module = sys.modules["tempnet_kernels.linear_dro_cross_entropy"]


def make(device, n=6, v=40, d=8, dtype=torch.float32):
    hidden = torch.randn(n, d, device=device).to(dtype)
    weight = torch.randn(v, d, device=device).to(dtype)
    target = torch.randint(0, v, (n,), device=device)
    target[1] = -100
    return hidden, weight, target, TempNet(v, hidden_size=16, dropout=0.0).to(device)


def gradients(function, *tensors, net=None):
    """The loss and its gradients in the tensors and in the network."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    loss = function(*leaves)
    parameters = [] if net is None else list(net.parameters())
    return loss.detach(), *torch.autograd.grad(loss.sum(), [*leaves, *parameters])


def step(target, net, backend, **options):
    """A function of hidden and weight."""
    return lambda h, w: linear_dro_cross_entropy(
        h, w, target, tempnet=net, rho=0.5, backend=backend, chunk_rows=4, **options
    )


def assert_same(results, expected, **tolerance):
    for got, other in zip(results, expected, strict=True):
        torch.testing.assert_close(got, other, **tolerance)


# Odd input.


@pytest.mark.parametrize("reduction, expected", [("mean", torch.nan), ("sum", 0.0), ("none", None)])
def test_no_rows(backend, reduction, expected, device):
    hidden, weight, target, net = make(device)
    loss, *grads = gradients(
        step(target[:0], net, backend, reduction=reduction), hidden[:0], weight, net=net
    )
    if expected is None:
        assert loss.shape == (0,)
    else:
        torch.testing.assert_close(loss, loss.new_tensor(expected), equal_nan=True)
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("drop_ignored", [False, True])
def test_every_row_ignored(backend, drop_ignored, device):
    hidden, weight, target, net = make(device)
    function = step(
        torch.full_like(target, -100), net, backend, reduction="sum", drop_ignored=drop_ignored
    )
    loss, *grads = gradients(function, hidden * torch.nan, weight, net=net)
    assert loss == 0
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("drop_ignored", [False, True])
def test_nan_in_a_hidden_state_reaches_its_row_only(backend, drop_ignored, device):
    hidden, weight, target, net = make(device)
    hidden[3, 2] = torch.nan
    options = {"reduction": "none", "drop_ignored": drop_ignored}
    loss, grad_hidden, *_ = gradients(step(target, net, backend, **options), hidden, weight)
    clean, clean_grad, *_ = gradients(
        step(target, net, backend, **options), hidden.nan_to_num(), weight
    )
    assert loss[3].isnan() and grad_hidden[3].isnan().all()
    others = [i for i in range(6) if i != 3]
    assert_same((loss[others], grad_hidden[others]), (clean[others], clean_grad[others]))
    assert clean_grad[0].abs().max() > 0


@pytest.mark.parametrize("bad", [-1, 40])
def test_target_out_of_range(backend, bad, device):
    hidden, weight, target, net = make(device)
    target[4] = bad
    if device == "cpu":
        # The row of the call's target, though ignored rows before it are dropped.
        with pytest.raises(IndexError, match=rf"target\[4\] must be in \[0, 40\) .* got {bad}"):
            step(target, net, backend)(hidden, weight)
        return
    loss, grad_hidden, _ = gradients(step(target, net, backend, reduction="none"), hidden, weight)
    assert loss[4].isnan() and grad_hidden[4].isnan().all()
    others = [0, 1, 2, 3, 5]
    assert loss[others].isfinite().all() and grad_hidden[others].isfinite().all()


def test_temperature_not_positive_gives_nan(backend, device):
    hidden, weight, target, _ = make(device)
    tau = torch.tensor([1, 1, 0, 1, -1, 1.0], device=device)
    loss = linear_dro_cross_entropy(
        hidden, weight, target, tau=tau, reduction="none", backend=backend
    )
    assert loss.isnan().tolist() == [False, False, True, False, True, False]


def test_shapes_of_a_batch_and_strided_inputs(backend, device):
    hidden, weight, target, net = make(device)
    expected = gradients(step(target, net, backend), hidden, weight, net=net)
    batch = gradients(
        lambda h, w: step(target.view(2, 3), net, backend)(h.view(2, 3, -1), w), hidden, weight,
        net=net,
    )  # fmt: skip
    assert_same(batch, expected)
    transposed = gradients(
        lambda h, w: step(target, net, backend)(h.t(), w.t()),
        hidden.t().contiguous(), weight.t().contiguous(), net=net,
    )  # fmt: skip
    loss, grad_hidden, grad_weight, *others = transposed
    assert_same((loss, grad_hidden.t(), grad_weight.t(), *others), expected)


@pytest.mark.parametrize("of", ["tau", "row_weight"])
def test_gradient_of_each_row_in_tau_or_weight_makes_no_logits_again(of):
    hidden, weight, target, _ = make("cpu")
    options = {"tau": torch.rand(6) + 0.5, "row_weight": torch.rand(6)}
    options[of].requires_grad_()
    with compare.counted_flops(_linear, "linear_dro_cross_entropy_fwd") as flops:
        loss = linear_dro_cross_entropy(
            hidden, weight, target, rho=0.5, reduction="none", **options
        )
        loss.sum().backward()
    assert len(flops) == 1 and options[of].grad.abs().max() > 0


def test_int32_targets(backend, device):
    hidden, weight, target, net = make(device)
    expected = gradients(step(target, net, backend), hidden, weight, net=net)
    assert_same(gradients(step(target.int(), net, backend), hidden, weight, net=net), expected)


# Wrong arguments.


@pytest.mark.parametrize(
    "kind, error, words",
    [
        ("hidden list", TypeError, "hidden must be a tensor, got list"),
        ("weight width", ValueError, r"weight must have shape \(V, 8\) with V >= 1, got \(40, 7\)"),
        ("weight dtype", TypeError, "weight must be torch.float32, got torch.float64"),
        ("bias shape", ValueError, r"bias must have shape \(40,\), got \(39,\)"),
        ("bias dtype", TypeError, "bias must be torch.float32, got torch.float64"),
        ("target shape", ValueError, r"target must have shape \(6,\), got \(5,\)"),
        ("softcap", ValueError, "softcap must be a finite number > 0 or None, got -1"),
        ("chunk_rows", ValueError, "chunk_rows must be >= 1 or None, got 0"),
        ("tau", ValueError, "tau must be left out where a tempnet predicts it, got 2.0"),
        ("tempnet", TypeError, "tempnet must be a TempNet, got Linear"),
        ("width", ValueError, "tempnet must be for the 40 rows of weight, got one for 41"),
        ("row_weight", ValueError, r"row_weight must have shape \(6,\), got \(5,\)"),
        ("reduction", ValueError, "reduction must be one of .* got 'avg'"),
        ("backend", ValueError, "backend must be one of .* got 'cuda'"),
    ],
)
def test_wrong_arguments_are_named(kind, error, words, device):
    hidden, weight, target, net = make(device)
    arguments = {"hidden": hidden, "weight": weight, "target": target, "tempnet": net}
    arguments |= {
        "hidden list": {"hidden": [[1.0]]},
        "weight width": {"weight": weight[:, :7]},
        "weight dtype": {"weight": weight.double()},
        "bias shape": {"bias": weight[:39, 0]},
        "bias dtype": {"bias": weight[:, 0].double()},
        "target shape": {"target": target[:5]},
        "softcap": {"softcap": -1},
        "chunk_rows": {"chunk_rows": 0},
        "tau": {"tau": 2.0},
        "tempnet": {"tempnet": torch.nn.Linear(40, 1)},
        "width": {"tempnet": TempNet(41).to(device)},
        "row_weight": {"row_weight": torch.ones(5, device=device)},
        "reduction": {"reduction": "avg"},
        "backend": {"backend": "cuda"},
    }[kind]
    with pytest.raises(error, match="linear_dro_cross_entropy: .*" + words):
        linear_dro_cross_entropy(**arguments)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward_raises(backend, reduction, device):
    hidden, weight, target, net = make(device)
    hidden.requires_grad_()
    loss = step(target, net, backend, reduction=reduction)(hidden, weight).sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_second_backward_raises(backend, device):
    hidden, weight, target, net = make(device)
    loss = step(target, net, backend)(hidden.requires_grad_(), weight)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# What PyTorch must be able to do with it.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(backend, dtype, device):
    hidden, weight, target, net = make(device, dtype=dtype)
    target[1] = 3  # opcheck compares with ==, which NaN statistics fail
    ops, check = torch.ops.tempnet, torch.library.opcheck
    for center in (False, True):
        check(getattr(ops.row_moments, backend), (hidden @ weight.T, center))
    tau, scale = torch.rand(2, 6, device=device) + 0.5
    tensors = [x.detach() for x in (net.proj[0].weight, *net.head(torch.float32))]
    numbers = (0.5, -100, 0.1, 0.01)
    for wants in ([True] * 5, [False] * 5, [True, False, False, False, True]):
        for network, fold, want_argmax in (([], False, True), (tensors, True, False)):
            wants = wants if network else [*wants[:3], False, False]
            check(
                getattr(ops.linear_dro_cross_entropy_fwd, backend),
                (
                    hidden, weight, weight[:, 0].contiguous(), target, tau, scale, network, None,
                    *numbers, 0.0, 0.5, 2.0, False, fold, 4, False, wants, want_argmax,
                ),
            )  # fmt: skip


@pytest.mark.parametrize("reduction", ["mean", "none"])
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
def test_func_grad(backend, reduction, device):
    hidden, weight, target, net = make(device)
    function = step(target, net.requires_grad_(False), backend, reduction=reduction)
    grads = torch.func.grad(lambda h, w: function(h, w).sum(), argnums=(0, 1))(hidden, weight)
    assert_same(grads, gradients(function, hidden, weight)[1:], rtol=0, atol=0)


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
    monkeypatch.setattr(_linear, "check_target", lambda *args: None)  # it reads CPU tensors only
    with torch._subclasses.FakeTensorMode():
        hidden, weight, tau, scale = (torch.empty(s) for s in ((6, 8), (40, 8), 6, 6))
        target, net = torch.empty(6, dtype=torch.int64), TempNet(40)
        tensors = [net.proj[0].weight, *net.head(torch.float32)]
        with torch.no_grad():
            *_, grads = _linear.linear_dro_cross_entropy_fwd(
                "reference", hidden, weight, None, target, tau, scale, tensors, None, 0.5, -100,
                0.1, 0.01, 0.0, 0.5, 2.0, True, True, 4, False, [True] * 5, True,
            )  # fmt: skip
        assert [g.shape for g in grads] == [t.shape for t in tensors]


@pytest.mark.parametrize("bad", [torch.nan, 1e6])
def test_a_large_weight_of_a_row_leaves_the_other_hidden_gradients(backend, bad, device):
    """float16 too, whose gradients are multiplied in the backward."""
    hidden, weight, target, _ = make(device, dtype=torch.float16)
    results = []
    for value in (bad, 1.0):
        row_weight = torch.ones(6, device=device)
        row_weight[3] = value
        h = hidden.clone().requires_grad_()
        linear_dro_cross_entropy(
            h, weight, target, row_weight=row_weight, reduction="sum", backend=backend
        ).backward()
        results.append(h.grad)
    others = [0, 2, 4, 5]
    assert torch.equal(results[0][others], results[1][others])
    assert results[1][others].abs().amax(1).min() > 0


def test_equal_logits_have_the_same_temperature_folded(backend, monkeypatch):
    """x is 0 there, whatever rounding the fold leaves."""
    weight, net = torch.randn(40, 8), TempNet(40, center="max", dropout=0.0)
    bias = torch.full((40,), 3.3)
    hidden, target = torch.zeros(2, 8), torch.tensor([1, 2])
    taus = []
    for fold in (True, False):
        monkeypatch.setattr(linear_module, "folding_pays", lambda *sizes, fold=fold: fold)
        _, stats = linear_dro_cross_entropy(
            hidden, weight, target, tempnet=net, bias=bias, return_stats=True, backend=backend
        )
        taus.append(stats.tau)
    torch.testing.assert_close(*taus, rtol=1e-6, atol=0)


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


MEMORY = """
import sys
sys.path.insert(0, {benchmarks!r})
import torch
from measure import peak_extra_mib
from tempnet_kernels import linear_dro_cross_entropy
from tempnet_kernels.nn import TempNet
n, v, d = 2048, 32000, 64
hidden, weight = torch.randn(n, d, requires_grad=True), torch.randn(v, d, requires_grad=True)
target, net = torch.randint(0, v, (n,)), TempNet(v, hidden_size=64)
def run(h, y):
    loss = linear_dro_cross_entropy(h, weight, y, tempnet=net, rho=4.0, chunk_rows=128)
    torch.autograd.grad(loss, (h, weight, *net.parameters()))
run(hidden[:8], target[:8])  # code and thread pools
print(peak_extra_mib(lambda: run(hidden, target)))
"""


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs /proc/self/clear_refs (Linux)"
)
def test_peak_is_the_gradients_and_a_chunk():
    benchmarks = str(Path(__file__).parents[3] / "benchmarks")
    result = subprocess.run(
        [sys.executable, "-c", MEMORY.format(benchmarks=benchmarks)],
        capture_output=True, text=True, env=os.environ,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    extra, mib = float(result.stdout), 4 / 2**20
    chunk, wide, tall = 128 * 32000 * mib, 64 * 32000 * mib, 2048 * 64 * mib
    # Gradients of weight and hidden; that of W1 comes when the chunk has gone. All logits would
    # take 250 MiB.
    assert chunk < extra <= 1.3 * (wide + tall + chunk), f"{extra:.1f} MiB"


def test_equals_the_token_loss_of_the_linear_layer(backend, device):
    hidden, weight, target, net = make(device)
    got = gradients(step(target, net, backend), hidden, weight, net=net)

    def unfused(h, w):
        z = h @ w.T
        return dro_cross_entropy(z, target, net(z), 0.5, backend=backend)

    assert_same(got, gradients(unfused, hidden, weight, net=net), rtol=1e-4, atol=1e-6)
    assert all(grad.abs().max() > 0 for grad in got)


def fully_sharded(group, hidden, weight, target, net):
    """The TempNet's gradients where FSDP2 holds its parameters: the mean over the ranks."""
    mesh = DeviceMesh.from_group(group, "cpu")
    fully_shard(net, mesh=mesh)
    rows = slice(group.rank(), None, group.size())
    step(target[rows], net, "native")(hidden[rows], weight).backward()
    return {name: p.grad.full_tensor() for name, p in net.named_parameters()}


def test_parameters_sharded_by_fsdp(gloo):
    hidden, weight, target, net = make("cpu")
    expected = [
        gradients(step(target[i::2], net, "native"), hidden[i::2], weight, net=net)[3:]
        for i in range(2)
    ]
    for grads in gloo.run(2, fully_sharded, hidden, weight, target, net):
        for got, first, second in zip(grads.values(), *expected, strict=True):
            torch.testing.assert_close(got, (first + second) / 2, rtol=1e-5, atol=1e-9)
