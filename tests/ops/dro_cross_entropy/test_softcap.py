"""The loss of ``c * tanh(logits / c)``, with the gradient of the logits given."""

import math

import emulated
import pytest
import torch
import torch.nn.functional as F
from backends import DTYPES, native_levels
from compare import (
    assert_entropy_accurate,
    assert_within_twice_plain,
    definition,
    statistics,
)
from token_loss import RHO, check, make

from tempnet_kernels import dro_cross_entropy, linear_dro_cross_entropy
from tempnet_kernels.core import register
from tempnet_kernels.core.fields import Moments
from tempnet_kernels.nn import (
    DROCrossEntropyLoss,
    TempNet,
    TempNetCausalLMLoss,
    TempNetCrossEntropyLoss,
)

SPREAD = 15.0
# (N, V, c): one column; ragged; two blocks of a row; nearly every logit at the cap
SHAPES = [(1, 1, 20.0), (7, 33, 20.0), (3, 1001, 50.0), (2, 4097, 20.0), (3, 1001, 0.5)]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, v, c", SHAPES, ids=str)
def test_value_and_gradients_match_the_definition(backend, n, v, c, dtype, reduction, device):
    logits, target, tau = make((n, v), dtype, device, spread=SPREAD)
    check(backend, logits, target, tau, reduction=reduction, softcap=c)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_with_every_other_option(backend, dtype, device):
    logits, target, tau = make((5, 4999), dtype, device, spread=SPREAD)
    options = {"softcap": 20.0, "label_smoothing": 0.1, "z_loss": 1e-2}
    check(backend, logits, target, tau, **options, reduction="none")
    check(backend, logits, target, tau, **options, row_weight=torch.rand(5, device=device) + 0.2)
    check(backend, logits, target, tau, softcap=20.0, reduction="sum")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("columns", [0, 1])  # rows on 16 bytes, and off
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_between_others_in_place_or_not(backend, dtype, columns, overwrite, device):
    logits, target, tau = make((4, 1003), dtype, device, spread=SPREAD)
    base = emulated.shifted(logits, columns)._base.requires_grad_()
    used = base * 1
    view = used[:, columns : columns + 1003]
    loss = dro_cross_entropy(
        used[..., :1003] if columns == 0 else view.clone() if overwrite else view,
        target, tau, RHO, softcap=20.0, overwrite_logits=overwrite, backend=backend,
    )  # fmt: skip
    (grad,) = torch.autograd.grad(loss, base)
    results = []
    for wide in (torch.float64, torch.float32):
        z = logits.to(wide).requires_grad_()
        rows = definition(z, target, tau.to(wide), RHO, softcap=20.0)
        (rows.sum() / 3).backward()
        results.append(z.grad if wide == torch.float64 else z.grad.to(dtype))
    assert_within_twice_plain(grad[:, columns : columns + 1003], *results)
    assert (grad[:, columns + 1003 :] == 0).all()


@pytest.mark.parametrize("simd_level", native_levels(), indirect=True)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_every_simd_level_is_as_accurate(simd_level, dtype):
    logits, target, tau = make((5, 9001), dtype, spread=SPREAD)
    tau = tau.to(torch.float64 if dtype == torch.float64 else torch.float32)
    for reduction in ("mean", "none"):
        check("native", logits, target, tau, reduction=reduction, softcap=20.0, z_loss=1e-3)


def test_triton_kernel_of_long_rows(device, monkeypatch):
    from tempnet_kernels.triton import dro_cross_entropy as kernels

    monkeypatch.setattr(kernels, "ONE_PASS_COLUMNS", 0)
    logits, target, tau = make((3, 9001), torch.bfloat16, device, spread=SPREAD)
    check("triton", logits, target, tau, softcap=20.0)
    check("triton", logits, target, tau, softcap=20.0, label_smoothing=0.1)


def capped_logits(backend, z, c):
    """What the backend takes for c tanh(z / c): the largest logit of rows of one."""
    if backend == "emulated":
        return emulated.Operators(emulated.load()).row_moments(z[:, None], True, c)[Moments.SHIFT]
    return register.operator("row_moments", backend)(z[:, None], True, c)[Moments.SHIFT]


@pytest.mark.parametrize("c", [2.0, 30.0])
@pytest.mark.parametrize("kernels", ["native", "triton", "emulated"])
def test_a_logit_is_capped_within_three_units(kernels, c, request):
    """Relative to the capped logit, small ones too; a large one gives exactly c."""
    size = torch.logspace(-30, 2, 400) if kernels != "native" else torch.logspace(-30, 2, 100_000)
    z = torch.cat([size, -size, torch.linspace(0.4, 0.7, 200)]) * c
    exact = c * torch.tanh(z.double() / c)
    error = (capped_logits(kernels, z, c) - exact).abs() / exact.abs()
    assert error.max() <= 3 * torch.finfo(torch.float32).eps
    large = torch.tensor([30.0, math.inf, -math.inf]) * c
    assert capped_logits(kernels, large, c).tolist() == [c, c, -c]


def test_statistics_are_those_of_capped_logits(backend, device):
    logits, target, tau = make((6, 2000), device=device, spread=SPREAD)
    _, stats = dro_cross_entropy(
        logits, target, tau, RHO, softcap=20.0, return_stats=True, backend=backend
    )
    live = target != -100
    z = 20 * torch.tanh(logits.double() / 20)
    lse, entropy, kl = statistics(z, tau)
    log_p = torch.log_softmax(z / tau.double()[:, None], 1)
    log_prob = log_p.gather(1, target.clamp(min=0)[:, None])[:, 0]
    assert (entropy[live] > 0.1).any()
    assert_entropy_accurate(stats.entropy[live], entropy[live], 2000, "entropy")
    assert_entropy_accurate(stats.kl[live], kl[live], 2000, "kl")
    torch.testing.assert_close(stats.lse[live].double(), lse[live], rtol=1e-6, atol=0)
    torch.testing.assert_close(stats.log_prob[live].double(), log_prob[live], rtol=1e-6, atol=2e-5)
    assert torch.equal(stats.argmax, torch.where(live, logits.argmax(1), -1))


def test_argmax_is_the_first_of_the_largest_logits_given(backend, device):
    """tanh makes logits equal that are not."""
    logits = torch.zeros(3, 1500, device=device)
    logits[0, [17, 1400]] = torch.tensor([300.0, 301.0], device=device)
    logits[1, [17, 1400]] = 301.0
    logits[2] = -math.inf
    _, stats = dro_cross_entropy(
        logits, torch.zeros(3, dtype=torch.int64, device=device), softcap=2.0, return_stats=True,
        backend=backend,
    )  # fmt: skip
    assert stats.argmax.tolist() == [1400, 17, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_argmax_of_rows_of_minus_inf_off_16_bytes(backend, dtype, device):
    """The columns before an unaligned row are read as -inf, too."""
    logits = torch.full((8, 33), -math.inf, dtype=dtype, device=device)
    target = torch.zeros(8, dtype=torch.int64, device=device)
    _, stats = dro_cross_entropy(logits, target, softcap=30.0, return_stats=True, backend=backend)
    assert (stats.argmax == 0).all()


@pytest.mark.parametrize("softcap", [0.5, 1e-3])
def test_a_logit_that_overflows_over_the_softcap_is_at_the_cap(backend, softcap, device):
    logits = torch.randn(3, 200, device=device) * softcap
    logits[0, :50] = torch.finfo(torch.float32).min
    logits[1, 7] = torch.finfo(torch.float32).max
    target = torch.tensor([3, 7, 1], device=device)
    check(backend, logits, target, torch.ones(3, device=device), softcap=softcap)


def test_infinite_logits_are_at_the_cap_and_nan_stays(backend, device):
    """As torch.nn.functional.cross_entropy has it of c * tanh(logits / c)."""
    logits = torch.randn(5, 700, device=device) * 4
    logits[0, 100:600] = -math.inf
    logits[1, 5] = math.inf
    logits[2] = -math.inf
    logits[3, 650] = math.nan
    target = torch.tensor([300, 5, 7, 1, 2], device=device)
    z = logits.clone().requires_grad_()
    loss = dro_cross_entropy(
        z, target, 1.0, math.log(700), softcap=3.0, reduction="none", backend=backend
    )
    loss.sum().backward()
    plain = F.cross_entropy(3 * torch.tanh(logits / 3), target, reduction="none")
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert loss[3].isnan() and z.grad[3].isnan().any()
    assert z.grad[[0, 1, 2, 4]].isfinite().all()
    assert (z.grad[logits.isinf()] == 0).all() and z.grad[0, :100].abs().max() > 0


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_gradcheck(backend):
    logits, target, tau = make((3, 11), torch.float64, spread=3.0)
    tau = tau.double().requires_grad_()

    def function(z, t):
        return dro_cross_entropy(
            z, target, t, RHO, softcap=2.0, label_smoothing=0.1, z_loss=0.1, reduction="none",
            backend=backend,
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, (logits.requires_grad_(), tau))


@pytest.mark.parametrize(
    "softcap", [0, -1.0, math.inf, math.nan, 1e40, 1e-300, "30", torch.tensor(30.0)], ids=str
)
def test_a_bad_softcap_raises(softcap):
    logits, target, _ = make((2, 5))
    number = isinstance(softcap, int | float)
    error, words = (ValueError, "a number > 0 that float32 holds") if number else (
        TypeError, f"a number or None, got {type(softcap).__name__}"
    )  # fmt: skip
    with pytest.raises(error, match=f"dro_cross_entropy: softcap must be {words}"):
        dro_cross_entropy(logits, target, softcap=softcap)
    with pytest.raises(error, match=f"DROCrossEntropyLoss: softcap must be {words}"):
        DROCrossEntropyLoss(1.0, softcap=softcap)
    with pytest.raises(error, match=f"TempNetCausalLMLoss: softcap must be {words}"):
        TempNetCausalLMLoss(TempNet(5), 1.0, softcap=softcap)


def test_modules_pass_it_on_and_the_tempnet_sees_capped_logits():
    hidden, weight, target = torch.randn(6, 8), torch.randn(40, 8) * 4, torch.randint(0, 40, (6,))
    net = TempNet(40, hidden_size=12, dropout=0.0)
    z = hidden @ weight.T
    loss = DROCrossEntropyLoss(1.0, softcap=5.0)(z, target, 0.7)
    assert torch.equal(loss, dro_cross_entropy(z, target, 0.7, 1.0, softcap=5.0))

    def gradients(loss):
        return loss.detach(), *torch.autograd.grad(loss, tuple(net.parameters()))

    module = TempNetCrossEntropyLoss(net, 1.0, softcap=5.0)
    assert "softcap=5.0" in repr(module)
    linear = linear_dro_cross_entropy(hidden, weight, target, tempnet=net, rho=1.0, softcap=5.0)
    for got, expected in zip(gradients(module(z, target)), gradients(linear), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)
    assert not torch.equal(net(z), net(5 * torch.tanh(z / 5)))
    assert module(z.bfloat16(), target).isfinite()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile_fullgraph(reduction):
    logits, target, tau = make((6, 40), spread=6.0)

    def function(z, t):
        return dro_cross_entropy(z, target, t, RHO, softcap=4.0, reduction=reduction).sum()

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    results = []
    for call in (function, compiled):
        z, t = logits.clone().requires_grad_(), tau.clone().requires_grad_()
        loss = call(z, t)
        results.append((loss.detach(), *torch.autograd.grad(loss, (z, t))))
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)
    grads = torch.func.grad(function, argnums=(0, 1))(logits, tau)
    assert all(torch.equal(g, e) for g, e in zip(grads, results[0][1:], strict=True))
