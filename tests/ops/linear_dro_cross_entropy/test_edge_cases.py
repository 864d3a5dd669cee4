"""What odd input to the token loss of a linear layer gets, and wrong arguments."""

import pytest
import torch
from linear_step import assert_same, gradients, make, step

from tempnet_kernels import linear_dro_cross_entropy
from tempnet_kernels.nn import TempNet
from tempnet_kernels.ops import linear_dro_cross_entropy as linear_module


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


def test_int32_targets(backend, device):
    hidden, weight, target, net = make(device)
    expected = gradients(step(target, net, backend), hidden, weight, net=net)
    assert_same(gradients(step(target.int(), net, backend), hidden, weight, net=net), expected)


@pytest.mark.parametrize(
    "kind, error, words",
    [
        ("hidden list", TypeError, "hidden must be a tensor, got list"),
        ("weight width", ValueError, r"weight must have shape \(V, 8\) with V >= 1, got \(40, 7\)"),
        ("weight dtype", TypeError, "weight must be torch.float32, got torch.float64"),
        ("bias shape", ValueError, r"bias must have shape \(40,\), got \(39,\)"),
        ("bias dtype", TypeError, "bias must be torch.float32, got torch.float64"),
        ("target shape", ValueError, r"target must have shape \(6,\), got \(5,\)"),
        ("softcap", ValueError, "softcap must be a number > 0 that float32 holds, or None, got -1"),
        ("chunk_rows", ValueError, "chunk_rows must be >= 1 or None, got 0"),
        ("tau", ValueError, "tau must be left out where a tempnet predicts it, got 2.0"),
        ("taus", ValueError, r"tau must be left out .*, got a tensor of shape \(6,\)"),
        ("no rho", ValueError, "rho must be given where a tempnet learns"),
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
        "taus": {"tau": torch.ones(6, device=device)},
        "no rho": {"tau": 1.0},
        "tempnet": {"tempnet": torch.nn.Linear(40, 1)},
        "width": {"tempnet": TempNet(41).to(device)},
        "row_weight": {"row_weight": torch.ones(5, device=device)},
        "reduction": {"reduction": "avg"},
        "backend": {"backend": "cuda"},
    }[kind]
    with pytest.raises(error, match="linear_dro_cross_entropy: .*" + words):
        linear_dro_cross_entropy(**arguments)


def test_a_wrapped_network_is_not_gone_around(device):
    """As FSDP1 and torch.compile wrap it: with the attributes of what is inside."""

    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def __getattr__(self, name):
            own = super().__getattr__
            return own(name) if name == "module" else getattr(own("module"), name)

    hidden, weight, target, net = make(device)
    with pytest.raises(TypeError, match="tempnet must be a TempNet, got Wrapper"):
        linear_dro_cross_entropy(hidden, weight, target, tempnet=Wrapper(net), rho=1.0)


def test_rho_may_be_left_out_of_an_evaluation(device):
    hidden, weight, target, net = make(device)
    with torch.no_grad():
        loss = linear_dro_cross_entropy(hidden, weight, target, tempnet=net.eval())
        expected = linear_dro_cross_entropy(hidden, weight, target, tempnet=net, rho=0.0)
    assert torch.equal(loss, expected)


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
            hidden,
            weight,
            target,
            tempnet=net,
            rho=1.0,
            bias=bias,
            return_stats=True,
            backend=backend,
        )
        taus.append(stats.tau)
    torch.testing.assert_close(*taus, rtol=1e-6, atol=0)
