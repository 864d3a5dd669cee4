"""TempNet and the loss modules."""

import math
import warnings
from pathlib import Path

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from tempnet_kernels import dro_cross_entropy
from tempnet_kernels.core import register
from tempnet_kernels.nn import (
    ContrastiveTempNet,
    DROCrossEntropyLoss,
    TempNet,
    TempNetCausalLMLoss,
    TempNetCrossEntropyLoss,
)
from tempnet_kernels.reference import temperature_head as reference_head
from tempnet_kernels.reference.official import official_cross_entropy

V = 50


def make(center=None, dtype=torch.float32, **options):
    return TempNet(V, 0.5, 1.5, hidden_size=16, center=center, **options).to(dtype)


def formula(net, logits, center):
    """The definition, written out in float64 from the state dict."""
    p = {k: v.detach().double() for k, v in net.state_dict().items()}
    z = logits.double()
    if center == "max":
        z = z - z.amax(-1, keepdim=True)
    z = torch.where(z == -math.inf, 0, z)
    x = z / z.norm(dim=-1, keepdim=True)
    h = torch.sigmoid(x @ p["proj.0.weight"].T + p["proj.0.bias"])
    h = h @ p["proj.3.weight"].T + p["proj.3.bias"]
    w = torch.softmax(h / p["scaler"].exp(), -1)
    t = ((w - 1 / 16) * h) @ p["last.weight"].T + p["last.bias"]
    return 0.5 + torch.sigmoid(t[..., 0])


@pytest.mark.parametrize("center", [None, "max"])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_its_formula(center, masked):
    net = make(center).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter)
    logits = torch.randn(3, 4, V) * 5
    if masked:
        logits[0, 0, :40] = -math.inf
    tau = net(logits)
    assert tau.shape == (3, 4) and tau.isfinite().all() and tau.std() > 0.01
    torch.testing.assert_close(tau.double(), formula(net, logits, center), rtol=1e-5, atol=0)


def test_initialisation_and_published_names():
    net = TempNet(32000)
    shapes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    assert shapes == {
        "scaler": (1,),
        "proj.0.weight": (256, 32000),
        "proj.0.bias": (256,),
        "proj.3.weight": (256, 256),
        "proj.3.bias": (256,),
        "last.weight": (1, 256),
        "last.bias": (1,),
    }
    assert (net.last.weight == 1).all() and net.last.bias == 0 and net.scaler == 0
    assert net.proj[2].p == 0.5


@pytest.mark.parametrize("prefix", ["", "tempnet.", "module.tempnet."])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scaler_shape", [(), (1,)])
def test_loads_published_layouts(prefix, dtype, scaler_shape):
    source, net = make(), make()
    torch.nn.init.constant_(source.scaler, 0.25)
    published = {prefix + k: v.to(dtype) for k, v in source.state_dict().items()}
    published[prefix + "scaler"] = published[prefix + "scaler"].reshape(scaler_shape)
    if prefix:
        published["model.embed.weight"] = torch.zeros(2)
    size = len(published)
    net.load_state_dict(published)
    assert len(published) == size, "the caller's dict is left alone"
    assert net.scaler.shape == (1,) and net.scaler.dtype == torch.float32
    for name, value in source.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], value.to(dtype).float())


def test_loads_as_a_part_of_a_model():
    loss = TempNetCrossEntropyLoss(make(), 3.0)
    state = {k: v.clone() for k, v in loss.state_dict().items()}
    state["tempnet.scaler"] = torch.tensor(0.5, dtype=torch.float64)
    loss.load_state_dict(state)
    assert loss.tempnet.scaler.item() == 0.5


def test_wrong_state_dicts_raise():
    state = make().state_dict()
    del state["last.bias"]
    with pytest.raises(RuntimeError, match=r"last\.bias"):
        make().load_state_dict({f"tempnet.{k}": v for k, v in state.items()})
    with pytest.raises(RuntimeError, match="size mismatch"):
        TempNet(V + 1, hidden_size=16).load_state_dict(make().state_dict())


def test_bounds_are_honoured():
    net = make().eval()
    for bias, bound in ((1e4, 1.5), (-1e4, 0.5)):
        torch.nn.init.constant_(net.last.bias, bias)
        assert (net(torch.randn(3, V)) == bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("logits_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dtypes(dtype, logits_dtype):
    tau = make(dtype=dtype).eval()((torch.randn(4, V) * 100).to(logits_dtype))
    assert tau.dtype == dtype and tau.isfinite().all()


def test_float64_logits_of_a_float32_network():
    net, logits = make().eval(), torch.randn(4, V)
    tau = net(logits.double())
    assert tau.dtype == torch.float32
    torch.testing.assert_close(tau, net(logits), rtol=1e-5, atol=0)


def test_without_kernels_it_is_the_definition(monkeypatch):
    net, contrastive = make().eval(), ContrastiveTempNet(8).eval()
    logits, features = torch.randn(4, V), torch.randn(4, 8)
    expected = net(logits), contrastive(features)
    missing = register.missing
    monkeypatch.setattr(register, "_available", {})
    monkeypatch.setattr(register, "library", lambda device: Path("/nowhere"))
    monkeypatch.setattr(
        register, "missing", lambda op, backend, device: "not built"
        if backend != "reference" else missing(op, backend, device),
    )  # fmt: skip
    called = []
    definition = reference_head.temperature_head
    monkeypatch.setattr(
        reference_head, "temperature_head", lambda *a: called.append(0) or definition(*a)
    )
    for got, same in zip((net(logits), contrastive(features)), expected, strict=True):
        torch.testing.assert_close(got, same, rtol=1e-5, atol=0)
    assert len(called) == 2


@pytest.mark.parametrize("center", [None, "max"])
def test_a_row_of_which_a_part_is_masked_by_the_least_number(center):
    """A mask is as often finfo.min as -inf: at center="max" the squares overflow, and the row is
    one of zeros."""
    net, logits = make(center).eval(), torch.randn(2, V)
    logits[:, : V // 2] = torch.finfo(torch.float32).min
    assert net(logits).isfinite().all()


@pytest.mark.parametrize("kind", ["loss", "causal"])
def test_an_ignored_row_may_hold_anything(kind):
    """A padded position is NaN where attention had nothing to look at."""
    net = make("max", dropout=0.0)
    logits, target = torch.randn(6, V), torch.tensor([1, 2, -100, 4, 5, -100])

    def gradients(logits):
        net.zero_grad()
        z = logits.clone().requires_grad_()
        if kind == "loss":
            loss = TempNetCrossEntropyLoss(net, 2.0)(z, target)
        else:
            loss = TempNetCausalLMLoss(net, 2.0)(z[None], None, shift_labels=target[None])
        loss.backward()
        return [loss.detach(), z.grad, *(p.grad.clone() for p in net.parameters())]

    expected = gradients(logits)
    assert all(x.abs().max() > 0 for x in expected)
    for bad in (math.nan, math.inf, -math.inf):
        logits[2] = logits[5] = bad
        for got, same in zip(gradients(logits), expected, strict=True):
            assert torch.equal(got, same)


class Sub(TempNet):
    def forward(self, logits):
        return super().forward(logits)


class Wrapped(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.module = net

    def forward(self, logits):
        return self.module(logits)


class Constant(torch.nn.Module):
    """No TempNet at all."""

    tau_min, tau_max = 0.5, 1.5

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(V))

    def forward(self, logits):
        return 0.5 + torch.sigmoid(logits @ self.weight)


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda: Sub(V, 0.5, 1.5, hidden_size=16, dropout=0.0),
        lambda: Wrapped(make(dropout=0.0)),
        lambda: torch.compile(make(dropout=0.0), backend="aot_eager"),
        lambda: checkpoint_wrapper(make(dropout=0.0)),
        lambda: checkpoint_wrapper(torch.compile(make(dropout=0.0), backend="aot_eager")),
        Constant,
    ],
    ids=["subclass", "wrapper", "compiled", "checkpointed", "both", "other"],
)
def test_an_ignored_row_may_hold_anything_whatever_wraps_the_network(wrapped):
    net = wrapped()
    loss_fn = TempNetCrossEntropyLoss(net, 2.0)
    logits, target = torch.randn(6, V), torch.tensor([1, 2, -100, 4, 5, 6])
    found = []
    for bad in (0.0, math.nan):
        logits[2] = bad
        net.zero_grad()
        loss_fn(logits, target).backward()
        found.append([p.grad.clone() for p in net.parameters()])
    for clean, got in zip(*found, strict=True):
        assert clean.abs().max() > 0
        torch.testing.assert_close(got, clean, rtol=1e-5, atol=1e-9)
    assert 0.5 <= loss_fn.temperature_stats().min <= loss_fn.temperature_stats().max <= 1.5


@pytest.mark.parametrize(
    "ignored, error, words",
    [
        ([True] * 4, TypeError, "ignored must be a bool tensor, got list"),
        (torch.ones(4, dtype=torch.int64), TypeError, "a bool tensor, got torch.int64"),
        (torch.ones(3, dtype=torch.bool), ValueError, r"ignored must have shape \(4,\)"),
    ],
    ids=str,
)
def test_a_wrong_mask_of_ignored_rows_is_named(ignored, error, words):
    with pytest.raises(error, match=f"TempNet: .*{words}"):
        make()(torch.randn(4, V), ignored=ignored)


def test_a_library_that_is_there_and_of_no_use_is_said(monkeypatch):
    monkeypatch.setattr(register, "_available", {})
    monkeypatch.setattr(register, "missing", lambda op, backend, device: "it does not load")
    net, logits = make(), torch.randn(4, V)
    with pytest.warns(UserWarning, match="falls back to 'reference': it does not load"):
        net(logits)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(logits)  # once is enough


def test_half_precision_network():
    tau = make(dtype=torch.bfloat16).eval()(torch.randn(4, V) * 100)
    assert tau.dtype == torch.float32 and tau.isfinite().all()


def test_large_float16_logits_do_not_overflow_the_norm():
    net = make().eval()
    logits = torch.randn(4, V) * 3e3
    torch.testing.assert_close(net(logits.half()), net(logits), rtol=1e-3, atol=0)


def test_dropout_only_in_training():
    net, logits = make(), torch.randn(8, V)
    assert not torch.equal(net(logits), net(logits))
    net.eval()
    assert torch.equal(net(logits), net(logits))


@pytest.mark.parametrize("overwrite", [False, True])
def test_loss_trains_the_tempnet_and_only_through_tau(overwrite):
    torch.manual_seed(1)
    tempnet = make(dropout=0.0)
    logits = torch.randn(6, V, requires_grad=True)
    target = torch.tensor([1, 2, -100, 4, 5, 6])
    loss_fn = TempNetCrossEntropyLoss(tempnet, 2.0, overwrite_logits=overwrite)
    loss_fn(logits * 1.0, target).backward()
    got = {name: p.grad.clone() for name, p in tempnet.named_parameters()}
    got_logits = logits.grad.clone()
    tempnet.zero_grad()
    logits.grad = None

    tau = tempnet(logits.detach())
    live = target != -100
    official_cross_entropy(logits[live], target[live], tau[live], 2.0).backward()
    torch.testing.assert_close(got_logits, logits.grad, rtol=1e-4, atol=1e-7)
    for name, p in tempnet.named_parameters():
        assert p.grad.abs().max() > 0, name
        torch.testing.assert_close(got[name], p.grad, rtol=1e-3, atol=1e-7)


def test_loss_module_equals_the_function():
    logits, target = torch.randn(2, 3, V), torch.randint(0, V, (2, 3))
    tau, weight = torch.rand(2, 3) + 0.5, torch.rand(2, 3)
    options = {"label_smoothing": 0.1, "z_loss": 1e-3, "reduction": "none", "return_stats": True}
    module = DROCrossEntropyLoss(0.7, **options)
    loss, stats = module(logits, target, tau, row_weight=weight)
    expected, expected_stats = dro_cross_entropy(
        logits, target, tau, 0.7, row_weight=weight, **options
    )
    assert torch.equal(loss, expected) and torch.equal(stats.kl, expected_stats.kl)


def test_temperature_statistics():
    loss_fn = TempNetCrossEntropyLoss(make().eval(), 3.0)
    with pytest.raises(RuntimeError, match="needs a forward first"):
        loss_fn.temperature_stats()
    logits, target = torch.randn(5, V), torch.tensor([1, 2, -100, 4, 5])
    loss_fn(logits, target)
    tau = loss_fn.tempnet(logits)[target != -100]
    stats = loss_fn.temperature_stats()
    assert stats.min == tau.min() and stats.max == tau.max() and not stats.mean.requires_grad
    assert stats.floats() == {name: value.item() for name, value in stats._asdict().items()}
    torch.testing.assert_close(stats.mean, tau.mean().detach())
    torch.nn.init.constant_(loss_fn.tempnet.last.bias, 1e4)
    loss_fn(logits, target)
    assert loss_fn.temperature_stats()[3:] == (0.0, 1.0)


def test_statistics_do_not_wait_for_the_device():
    """Fake tensors raise on every read of their data."""
    with torch._subclasses.FakeTensorMode():
        loss_fn = TempNetCrossEntropyLoss(TempNet(V), 3.0)
        loss_fn(torch.randn(5, V, requires_grad=True), torch.zeros(5, dtype=torch.int64)).backward()
        assert all(value.shape == () for value in loss_fn.temperature_stats())


def test_compile_fullgraph_and_autocast():
    loss_fn = TempNetCrossEntropyLoss(make(dropout=0.0), 3.0)
    logits, target = torch.randn(5, V, requires_grad=True), torch.randint(0, V, (5,))
    expected = loss_fn(logits, target)
    torch._dynamo.reset()
    compiled = torch.compile(loss_fn, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, target), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss_fn(logits, target)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, expected, rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"vocab_size": 0}, "vocab_size must be >= 1, got 0"),
        ({"vocab_size": 9, "tau_min": 0}, "0 < tau_min < tau_max, got 0"),
        ({"vocab_size": 9, "tau_min": 3, "tau_max": 2}, "got 3 and 2"),
        ({"vocab_size": 9, "center": "mean"}, "center must be None or 'max', got 'mean'"),
    ],
)
def test_wrong_arguments_are_named(arguments, words):
    with pytest.raises(ValueError, match=f"TempNet: .*{words}"):
        TempNet(**arguments)


def test_wrong_width_is_named():
    with pytest.raises(ValueError, match=r"logits must have 50 columns, got shape \(2, 7\)"):
        make()(torch.randn(2, 7))


@pytest.mark.parametrize(
    "tempnet, rho, error, message",
    [
        (100, 1.0, TypeError, r"tempnet must be a module .*TempNet\(vocab_size\) is, got int"),
        (TempNet(V), None, ValueError, "rho must be given where a tempnet learns"),
        (TempNet(V), math.nan, ValueError, "rho must be a finite number >= 0, got nan"),
        (TempNet(V), "8", TypeError, "rho must be a number, got str"),
        (TempNet(V), -0.5, ValueError, "rho must be a finite number >= 0, got -0.5"),
        (
            TempNet(V),
            math.log(V),
            ValueError,
            r"rho must be below log\(50\) = 3.912, .*near the me",
        ),
    ],
)
def test_misuse_of_the_loss_says_what_to_do(tempnet, rho, error, message):
    with pytest.raises(error, match=f"TempNetCrossEntropyLoss: {message}"):
        TempNetCrossEntropyLoss(tempnet, rho)


def test_rho_may_be_changed_in_the_course_of_a_training():
    loss_fn = TempNetCrossEntropyLoss(make().eval(), 1.0)
    logits, target = torch.randn(4, V), torch.arange(4)
    before = loss_fn(logits, target)
    loss_fn.rho = 2.0
    mean = loss_fn.temperature_stats().mean
    torch.testing.assert_close(loss_fn(logits, target), before + mean)
    assert "rho=2.0" in repr(loss_fn)


def test_a_network_that_does_not_say_its_size_and_a_rho_that_was_changed_are_bounded():
    logits, target = torch.randn(4, V), torch.arange(4)
    unsized = torch.nn.Sequential(torch.nn.Linear(V, 1), torch.nn.Sigmoid(), torch.nn.Flatten(0))
    later = TempNetCrossEntropyLoss(make(), 1.0)
    later.rho = 5.0
    for loss_fn in (TempNetCrossEntropyLoss(unsized, 5.0), later):
        with pytest.raises(ValueError, match=r"rho must be below log\(50\) = 3.912"):
            loss_fn(logits, target)


def test_the_loss_without_a_network_is_cross_entropy_at_rho_log_v():
    logits, target = torch.randn(4, V), torch.arange(4)
    loss = DROCrossEntropyLoss(math.log(V))(logits, target)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, target))
