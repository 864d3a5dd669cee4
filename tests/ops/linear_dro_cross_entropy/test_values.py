"""The token loss of a linear layer: value and every gradient against the float64 definition, with
and without a TempNet, folded and direct, in chunks."""

import copy

import linear_step
import pytest
import torch
from backends import DTYPES
from compare import (
    assert_entropy_accurate,
    counted_flops,
    definition,
    statistics,
)
from linear_loss import RHO, check, gradients, layer, network, ours, plain

from tempnet_kernels import dro_cross_entropy, linear_dro_cross_entropy
from tempnet_kernels.chunked import linear_dro_cross_entropy as chunked_linear
from tempnet_kernels.core import tempnet
from tempnet_kernels.ops import linear_dro_cross_entropy as linear


@pytest.fixture(params=["folded", "direct"])
def fold(request, monkeypatch):
    """Whether the TempNet's first layer is applied through the head, whatever it costs."""
    monkeypatch.setattr(linear, "folding_pays", lambda n, v, d: request.param == "folded")
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "n, v, d", [(19, 301, 24), (3, 1, 5), (40, 4099, 16)]  # ragged; one column; two blocks of a row
)  # fmt: skip
def test_given_temperatures(backend, n, v, d, dtype):
    *tensors, target = layer(n, v, d, dtype)
    tau = torch.rand(n) + 0.4
    if v == 1:
        tensors[0] *= 0  # the loss is tau rho, whatever the logit; its rounding would remain
        got = gradients(ours, tensors, target, tau, backend=backend)
        live = target != -100
        torch.testing.assert_close(got["loss"], (tau * RHO)[live].mean())
        assert not any(got[name].any() for name in ("hidden", "weight", "bias"))
        return
    check(tensors, target, tau, backend, chunk_rows=8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_tau_has_its_absolute_bound(backend, dtype):
    hidden, weight, bias, target = layer(dtype=dtype)
    tau = torch.rand(19) + 0.4
    got = gradients(ours, (hidden, weight, bias), target, tau, backend=backend, reduction="sum")
    z = torch.nn.functional.linear(hidden, weight, bias)
    _, _, kl = statistics(z, tau)
    exact = torch.where(target == -100, 0, RHO - kl)
    assert exact.abs().max() > 0.1
    assert_entropy_accurate(got["tau"], exact, 301)


@pytest.mark.parametrize("center", [None, "max"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_predicted_temperatures(backend, fold, dtype, center):
    *tensors, target = layer(dtype=dtype)
    net = network(301, center)
    tau = net(torch.nn.functional.linear(*tensors))
    assert tau.max() - tau.min() > 0.05
    check(tensors, target, net, backend, chunk_rows=8, draws=4)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("net", [None, "raw", "max"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_are_capped_with_one_rounding(backend, dtype, net, reduction):
    *tensors, target = layer(dtype=dtype)
    tau = torch.rand(19) + 0.4 if net is None else network(301, None if net == "raw" else net)
    upstream = torch.ones(19) if reduction == "none" else None
    options = {"softcap": 3.0, "reduction": reduction, "upstream": upstream}
    check(tensors, target, tau, backend, chunk_rows=8, **options)


@pytest.mark.parametrize("dtype, limit", [(torch.bfloat16, 6.5e-3), (torch.float16, 1e-3)], ids=str)
@pytest.mark.parametrize("spread", [0.8, 16])
def test_error_of_a_token_with_a_softcap_is_that_of_the_product(backend, spread, dtype, limit):
    """Capped logits that are rounded again err more than twice as much."""
    n, v, d, c = 64, 2000, 64, 20.0
    hidden, weight = torch.randn(n, d).to(dtype), (torch.randn(v, d) * spread / d**0.5).to(dtype)
    target, tau = torch.randint(0, v, (n,)), torch.ones(n, dtype=torch.float64)
    got = linear_dro_cross_entropy(
        hidden, weight, target, rho=RHO, softcap=c, reduction="none", backend=backend
    )
    z = torch.nn.functional.linear(hidden, weight)
    twice = (c * torch.tanh(z / c)).double()
    assert (twice - c * torch.tanh(z.double() / c)).abs().max() > 0
    of_product = definition(z.double(), target, tau, RHO, softcap=c)
    assert (got - of_product).abs().max() <= 2e-5
    exact = definition(hidden.double() @ weight.double().T, target, tau, RHO, softcap=c)
    error, before = ((x - exact).abs().max() for x in (got, definition(twice, target, tau, RHO)))
    print(f"{dtype}, spread {spread}: {error:.2e}, rounded again {before:.2e}")
    assert error < before
    if spread < 1:
        assert error <= limit


@pytest.mark.parametrize("center", [None, "max"])
def test_products_of_16_bits_with_wide_results(fold, center, wide_products):
    """As on a GPU: the TempNet's first layer is multiplied in bfloat16."""
    *tensors, target = layer(dtype=torch.bfloat16)
    check(tensors, target, network(301, center), "native", chunk_rows=8)


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softcap": 4.0},
        {"label_smoothing": 0.1, "z_loss": 0.02},
        {"reduction": "none", "z_loss": 0.02, "softcap": 4.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("bias", ["none", "bias", "minus inf"])
@pytest.mark.parametrize("center", [None, "max"])
def test_float64_equals_the_formula_to_rounding(backend, fold, center, bias, options):
    hidden, weight, b, target = layer(dtype=torch.float64, bias=bias != "none")
    if bias == "minus inf":
        if "label_smoothing" in options:
            return  # the loss is +inf, as the token loss's edge cases say
        b[[5, 300]] = -torch.inf
        target[target == 5] = 6
        target[target == 300] = 6
    net = network(301, center, dropout=0.5, dtype=torch.float64)
    upstream = torch.rand(19) if "reduction" in options else torch.tensor(3.0)
    results = []
    for function, more in ((plain, {}), (ours, {"backend": backend, "chunk_rows": 7})):
        torch.manual_seed(5)  # the dropout of TempNet.forward
        results.append(
            gradients(
                function, (hidden, weight, b), target, net, upstream,
                torch.float64, **options, **more,
            )
        )  # fmt: skip
    exact, got = results
    for name, value in got.items():
        torch.testing.assert_close(value, exact[name], rtol=1e-10, atol=1e-13, msg=name)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_gradcheck(backend, fold):
    hidden, weight, bias, target = layer(5, 11, 4, torch.float64)
    net = network(11, "max", dtype=torch.float64, hidden_size=6)
    names, parameters = zip(*net.named_parameters(), strict=True)
    row_weight = torch.randn(5, dtype=torch.float64)

    def function(hidden, weight, bias, row_weight, *parameters):
        def loss(net):
            return linear_dro_cross_entropy(
                hidden, weight, target, tempnet=net, bias=bias, rho=RHO, row_weight=row_weight,
                label_smoothing=0.1, z_loss=0.05, reduction="none", chunk_rows=2,
                backend=backend,
            )  # fmt: skip

        values = dict(zip(names, parameters, strict=True))
        with torch.nn.utils.stateless._reparametrize_module(net, values):
            return loss(net)

    inputs = (hidden, weight, bias, row_weight)
    inputs = [x.detach().clone().requires_grad_() for x in (*inputs, *parameters)]
    # The TempNet learns from the temperature only: its input is detached, so d hidden and d weight
    # are not those of the whole function. Each half is checked with the other held.
    frozen = copy.deepcopy(net)
    assert torch.autograd.gradcheck(lambda *p: function(*inputs[:4], *p), inputs[4:])
    tau = frozen(torch.nn.functional.linear(*inputs[:3])).detach().requires_grad_()
    given = lambda h, w, b, r, t: linear_dro_cross_entropy(  # noqa: E731
        h, w, target, bias=b, tau=t, rho=RHO, row_weight=r, softcap=3.0, reduction="none",
        chunk_rows=2, backend=backend,
    )  # fmt: skip
    assert torch.autograd.gradcheck(given, (*inputs[:4], tau))


@pytest.mark.parametrize("center", [None, "max"])
def test_folded_equals_direct(center, monkeypatch):
    hidden, weight, bias, target = layer(64, 2000, 32)
    net = network(2000, center)
    results = []
    for folded in (True, False):
        monkeypatch.setattr(linear, "folding_pays", lambda *sizes, folded=folded: folded)
        grads = gradients(ours, (hidden, weight, bias), target, net)
        loss = linear_dro_cross_entropy(
            hidden, weight, target, tempnet=net, bias=bias, rho=RHO, return_stats=True
        )
        results.append(grads | {"tau": loss[1].tau})
    folded, direct = results
    for name, value in folded.items():
        live = torch.isfinite(direct[name])
        error = (value - direct[name])[live].abs().max() / direct[name][live].abs().max()
        assert error <= 1e-5, (name, error)


def test_folding_is_chosen_by_its_cost():
    assert linear.folding_pays(8192, 128256, 4096)
    assert not linear.folding_pays(64, 128256, 4096)


def products(function):
    """Multiply-adds of the matrix products, in units of 2 flops."""
    with counted_flops(chunked_linear, "linear_dro_cross_entropy_fwd") as flops:
        function()
    return sum(flops) / 2


@pytest.mark.parametrize(
    "wanted, number",
    [("all", 3), ("hidden", 2), ("weight", 2), ("tempnet", 1), ("nothing", 1)],
)
def test_only_what_is_wanted_is_multiplied(wanted, number):
    n, v, d = 64, 3000, 32
    hidden, weight, _, target = layer(n, v, d, bias=False)
    target = target.clamp(min=0)
    net = network(v)
    net.requires_grad_(wanted in ("all", "tempnet"))
    hidden.requires_grad_(wanted in ("all", "hidden"))
    weight.requires_grad_(wanted in ("all", "weight"))

    def step():
        loss = linear_dro_cross_entropy(hidden, weight, target, tempnet=net, rho=RHO)
        if loss.requires_grad:
            loss.backward()

    h = 40
    fold = h * v * d * (1 + (wanted in ("all", "tempnet")))
    small = 2 * h * n * (d + 2 * h)
    assert number * n * v * d <= products(step) <= number * n * v * d + fold + small
    assert (hidden.grad is None) == (wanted not in ("all", "hidden"))
    assert (weight.grad is None) == (wanted not in ("all", "weight"))
    grads = [p.grad is not None for p in net.parameters()]
    assert all(grads) if wanted in ("all", "tempnet") else not any(grads)


@pytest.mark.parametrize("part", ["first", "rest"])
def test_half_of_a_tempnet_trains(fold, part):
    hidden, weight, bias, target = layer()
    net = network(301)
    whole = gradients(ours, (hidden, weight, bias), target, net)
    for name, p in net.named_parameters():
        p.requires_grad_((name == "proj.0.weight") == (part == "first"))
    linear_dro_cross_entropy(hidden, weight, target, tempnet=net, bias=bias, rho=RHO).backward()
    for name, p in net.named_parameters():
        assert (p.grad is None) != p.requires_grad
        if p.requires_grad:
            assert torch.equal(p.grad, whole[name])


def test_ignored_rows_are_left_out_of_the_products():
    hidden, weight, _, target = layer(64, 1000, 16, bias=False)
    target[::2] = -100
    live = (target != -100).sum().item()
    hidden[target == -100] = torch.nan  # nothing of them is read
    net = network(1000).requires_grad_(False)
    results = []
    for dropped in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()

        def step(h=h, w=w, dropped=dropped):
            loss, stats = linear_dro_cross_entropy(
                h, w, target, tempnet=net, rho=RHO, drop_ignored=dropped, return_stats=True
            )
            loss.backward()
            results.append((loss.detach(), h.grad, w.grad, *stats))

        count = products(step) / (1000 * 16)
        assert abs(count - 3 * (live if dropped else 64)) < 64, count
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    loss, grad_hidden, _, *stats = results[0]
    assert loss.isfinite() and (grad_hidden[target == -100] == 0).all()
    assert all(s[target == -100].isnan().all() for s in stats if s.is_floating_point())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_row_weights_normalizer_and_statistics_are_those_of_the_token_loss(backend, reduction):
    hidden, weight, bias, target = layer(20)
    tau = torch.rand(4, 5) + 0.4
    weights = torch.randn(4, 5).requires_grad_()
    normalizer = 7.0 if reduction == "mean" else None
    options = {
        "row_weight": weights, "normalizer": normalizer, "reduction": reduction,
        "return_stats": True, "backend": backend,
    }  # fmt: skip
    target = target.view(4, 5)
    loss, stats = linear_dro_cross_entropy(
        hidden.view(4, 5, -1), weight, target, bias=bias, tau=tau, rho=RHO, chunk_rows=3, **options
    )
    loss.sum().backward()
    got, weights.grad = weights.grad, None
    z = torch.nn.functional.linear(hidden, weight, bias).view(4, 5, -1)
    options["backend"] = "reference"
    expected, expected_stats = dro_cross_entropy(z, target, tau, RHO, **options)
    expected.sum().backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got, weights.grad, rtol=1e-5, atol=1e-6)
    for value, other in zip(stats, expected_stats, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_small_gradients_of_float16_survive_a_large_batch(reduction, dtype):
    """1 / N is multiplied in the backward, where a loss scale can come first."""
    hidden, weight, bias, target = layer(19, 50, dtype=dtype)
    upstream = torch.tensor(2.0**16) if reduction == "mean" else torch.full((19,), 2.0**16 / 1e5)
    options = {"normalizer": 1e5} if reduction == "mean" else {}
    tau = torch.rand(19) + 0.4
    got = gradients(
        ours, (hidden, weight, bias), target, tau, upstream, reduction=reduction, **options
    )
    exact = gradients(
        plain, (hidden, weight, bias), target, tau, torch.full((19,), 2.0**16 / 1e5),
        torch.float64, reduction="none",
    )  # fmt: skip
    for name in ("hidden", "weight", "bias"):
        error = (got[name].double() - exact[name]).abs().max() / exact[name].abs().max()
        assert error <= 8 * torch.finfo(dtype).eps, (name, error)


def test_chunks_do_not_change_a_row():
    hidden, weight, bias, target = layer()
    net = network(301)
    whole, *others = (
        linear_dro_cross_entropy(
            hidden, weight, target, tempnet=net, bias=bias, rho=RHO, reduction="none",
            chunk_rows=rows,
        )
        for rows in (None, 1, 7, 1000)
    )  # fmt: skip
    for other in others:
        torch.testing.assert_close(other, whole, rtol=1e-6, atol=1e-6)


def test_results_do_not_change_between_runs(fold):
    hidden, weight, bias, target = layer(64, 3000, 32)
    net = network(3000)
    first, second = (gradients(ours, (hidden, weight, bias), target, net) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_dropout_is_that_of_the_network(fold):
    """The same generator state gives the same masks as TempNet.forward."""
    hidden, weight, bias, target = layer()
    net = network(301, dropout=0.5)
    torch.manual_seed(3)
    _, stats = linear_dro_cross_entropy(
        hidden, weight, target, tempnet=net, bias=bias, rho=RHO, return_stats=True
    )
    torch.manual_seed(3)
    tau = net(torch.nn.functional.linear(hidden, weight, bias))
    live = target != -100
    torch.testing.assert_close(stats.tau[live], tau[live], rtol=1e-5, atol=1e-6)
    assert (tau - net.eval()(torch.nn.functional.linear(hidden, weight, bias))).abs().max() > 1e-3


# The moments of rows.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("v", [1, 33, 4100, 20000])
def test_row_moments(backend, v, center, dtype, request):
    if "triton" in request.node.name and v == 20000 and dtype != torch.float32:
        v = 9000  # the interpreter
    padded = torch.full((5, v + 3), torch.nan).to(dtype)
    logits = padded[:, 1 : v + 1]  # off 16 bytes; its neighbours are poison
    logits.copy_(torch.randn(5, v) * 3 + 20)
    logits[1, v // 2 :] = -torch.inf
    logits[2, : v - v // 3] = -torch.inf
    logits[3, v // 2] = torch.nan
    operator = chunked_linear._op("row_moments", backend)
    shift, squares, total, count, inverse = operator(logits, center, 0.0)
    z = logits.double()
    counted = z != -torch.inf
    exact_shift = torch.where(z.isnan(), -torch.inf, z).amax(1) if center else torch.zeros(5)
    x = torch.where(counted, z - exact_shift[:, None], 0)
    rows = [0, 1, 2, 4]
    if center:
        assert torch.equal(shift[rows].double(), exact_shift[rows])
        torch.testing.assert_close(total.double(), x.sum(1), rtol=1e-5, atol=0, equal_nan=True)
        assert torch.equal(count, counted.sum(1).float())
    torch.testing.assert_close(squares.double(), (x * x).sum(1), rtol=2e-6, atol=0, equal_nan=True)
    torch.testing.assert_close(
        inverse, torch.where(squares == 0, 0, squares.rsqrt()), rtol=1e-6, atol=0, equal_nan=True
    )
    assert squares[3].isnan() and inverse[3].isnan()
    normalized = chunked_linear._op("normalized_rows", backend)(logits, shift, inverse, 0.0)
    expected = torch.where(logits == -torch.inf, 0, logits.float() - shift[:, None])
    live = [i for i in rows if counted[i].any()]  # of nothing, centred, it is NaN
    assert torch.equal(normalized[live], (expected * inverse[:, None])[live])
    assert normalized[3].isnan().all()
    none = chunked_linear._op("normalized_rows", backend)(logits, shift, -torch.ones(5), 0.0)
    assert (none == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v", [1, 33, 4101])
def test_row_moments_of_capped_logits(backend, v, dtype):
    padded = torch.full((4, v + 3), torch.nan).to(dtype)
    logits = padded[:, 1 : v + 1]  # off 16 bytes; its neighbours are poison
    logits.copy_(torch.randn(4, v) * 9)
    logits[1, v // 2 :] = -torch.inf
    logits[2, v // 3] = torch.inf
    logits[3, v // 2] = torch.nan
    operator = chunked_linear._op("row_moments", backend)
    z = 5 * torch.tanh(logits.double() / 5)
    for center in (False, True):
        shift, squares, total, count, inverse = operator(logits, center, 5.0)
        normalized = chunked_linear._op("normalized_rows", backend)(logits, shift, inverse, 5.0)
        x = z - (z.amax(1, keepdim=True) if center else 0)
        exact = (x * x).sum(1)
        torch.testing.assert_close(squares.double(), exact, rtol=2e-6, atol=0, equal_nan=True)
        if center:
            torch.testing.assert_close(shift[:3].double(), z[:3].amax(1), rtol=1e-6, atol=0)
            torch.testing.assert_close(total[:3].double(), x[:3].sum(1), rtol=1e-5, atol=1e-6)
            assert torch.equal(count[:3], torch.full((3,), float(v)))
        exact = torch.where(squares[:, None] == 0, 0, x / x.norm(dim=1, keepdim=True))
        torch.testing.assert_close(normalized.double(), exact, rtol=0, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("v", [40, 9000])
@pytest.mark.parametrize("low", [torch.finfo(torch.bfloat16).min, torch.finfo(torch.float32).min])
def test_row_moments_of_a_finite_mask(backend, v, low):
    """The sums overflow, and what has overflowed is not multiplied by a shift of 0."""
    logits = torch.randn(3, v)
    logits[0, : v // 2] = low
    logits[1, v // 2 :] = low
    logits[2, :-1] = low
    shift, squares, total, count, inverse = chunked_linear._op("row_moments", backend)(
        logits, True, 0.0
    )
    assert torch.equal(shift, logits.amax(1)) and (count == v).all()
    assert (squares == torch.inf).all() and (inverse == 0).all()
    assert not total.isnan().any()
    for sizes in ((v // 2, v - v // 2), (v - 1, 1)):
        parts = [chunked_linear._op("row_moments", backend)(p.contiguous(), True, 0.0)[:4]
                 for p in logits.split(sizes, 1)]  # fmt: skip
        top, inverse = tempnet.merged_moments(torch.stack(parts))
        assert torch.equal(top, shift) and (inverse == 0).all()


@pytest.mark.parametrize("value", [-torch.inf, torch.inf, torch.nan])
def test_row_moments_of_one_value(backend, value):
    logits = torch.full((2, 50), value)
    logits[0, 7] = 3.0
    operator = chunked_linear._op("row_moments", backend)
    shift, squares, _, count, inverse = operator(logits, True, 0.0)
    if value == -torch.inf:
        assert (shift[0], squares[0], count[0]) == (3, 0, 1)
        assert (shift[1], squares[1], count[1]) == (-torch.inf, 0, 0)
        assert (inverse == 0).all()
    else:
        assert squares.isnan().all()


@pytest.mark.parametrize("of", ["tau", "row_weight"])
def test_gradient_of_each_row_in_tau_or_weight_makes_no_logits_again(of):
    hidden, weight, target, _ = linear_step.make("cpu")
    options = {"tau": torch.rand(6) + 0.5, "row_weight": torch.rand(6)}
    options[of].requires_grad_()
    with counted_flops(chunked_linear, "linear_dro_cross_entropy_fwd") as flops:
        loss = linear_dro_cross_entropy(
            hidden, weight, target, rho=0.5, reduction="none", **options
        )
        loss.sum().backward()
    assert len(flops) == 1 and options[of].grad.abs().max() > 0


def test_equals_the_token_loss_of_the_linear_layer(backend, device):
    hidden, weight, target, net = linear_step.make(device)
    got = linear_step.gradients(linear_step.step(target, net, backend), hidden, weight, net=net)

    def unfused(h, w):
        z = h @ w.T
        return dro_cross_entropy(z, target, net(z), 0.5, backend=backend)

    linear_step.assert_same(
        got, linear_step.gradients(unfused, hidden, weight, net=net), rtol=1e-4, atol=1e-6
    )
    assert all(grad.abs().max() > 0 for grad in got)
