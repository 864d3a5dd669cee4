"""The optimal temperature: kl(tau) = rho in float64, on every backend, for every kind of row."""

import math

import compare
import pytest
import torch
from backends import DTYPES, native_levels
from temperature import HIGH, INF, LOW, check, kinds, kl_at, variance

from tempnet_kernels import dro_cross_entropy, optimal_temperature

SHAPES = [
    (2, 2),
    (3, 33),  # ragged tile
    (2, 1000),
    (2, 9001),  # several blocks, ragged
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kl_is_rho_where_it_is_not_clipped(backend, shape, dtype, device):
    inside = 0
    for kind, logits in kinds(*shape, device).items():
        logits = logits.to(dtype)
        for share in (0.02, 0.5, 0.9):
            if dtype == torch.float16 and not (logits.isfinite() | (kind == "masked")).all():
                continue  # 65504 is passed
            inside += check(logits, share * math.log(shape[1]), backend)[0]
    assert inside > 10 * shape[0], "clipped rows would prove nothing"


@pytest.mark.parametrize("v", [128256, 262144])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", ["reference", "native"])
def test_kl_is_rho_in_long_rows(name, dtype, v):
    inside = 0
    for logits in kinds(2, v).values():
        for share in (0.1, 0.7):
            inside += check(logits.to(dtype), share * math.log(v), name)[0]
    assert inside > 20


@pytest.mark.parametrize("backend", ["triton", "emulated"], indirect=True)
def test_kernels_meet_rho_in_long_rows(backend, device):
    """128256 bfloat16 columns are more than 1024 threads hold in registers."""
    rows = kinds(2, 128256, device)
    for kind in ("normal", "large", "zipf", "stairs"):
        inside, iterations = check(rows[kind].bfloat16(), 8.0, backend)
        assert (inside, iterations <= 12) == (2, True), kind


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v", [33, 20000])
def test_triton_meets_rho_in_rows_that_are_read_again(monkeypatch, v, dtype, device):
    from tempnet_kernels.triton import optimal_temperature as kernels

    monkeypatch.setattr(kernels, "HELD_COLUMNS", 0)
    inside = 0
    for kind in ("normal", "peaked", "stairs", "masked"):
        logits = kinds(2, v, device)[kind].to(dtype)
        inside += check(logits, 0.5 * math.log(v), "triton")[0]
    assert inside >= 6
    logits[0, v - 2] = math.nan
    assert optimal_temperature(logits, 1, 0.1, 9, backend="triton").isnan().tolist() == [1, 0]


@pytest.mark.parametrize("simd_level", native_levels(), indirect=True)
@pytest.mark.parametrize("dtype", [*DTYPES[:2], torch.float64], ids=str)
def test_every_simd_level_is_as_accurate(simd_level, dtype):
    inside = 0
    for logits in kinds(4, 20011).values():
        for share in (0.05, 0.5, 0.8):
            inside += check(logits.to(dtype), share * math.log(20011), "native")[0]
    assert inside > 80


@pytest.mark.parametrize("name", ["reference", "native"])
def test_float64_meets_rho_to_1e_11(name):
    inside = 0
    for logits in kinds(3, 1001).values():
        for share in (0.01, 0.4, 0.95):
            inside += check(logits.double(), share * math.log(1001), name)[0]
    assert inside > 60


def staircases(n, v, generator):
    """Rows of a few levels of equal logits at gaps from 1e-3 to 1e3: kl has plateaus between them,
    where Newton's step leads nowhere."""
    levels = -(10 ** (torch.rand(n, 5, generator=generator) * 6 - 3))
    levels = torch.cat([torch.zeros(n, 1), levels.sort(1, descending=True)[0]], 1)
    ends = v ** torch.rand(n, 5, generator=generator).sort(1)[0]  # columns of the higher levels
    level = (torch.arange(v)[None, :, None] >= ends[:, None]).sum(2)
    return levels.gather(1, level)


@pytest.mark.parametrize("name", ["reference", "native"])
def test_staircases_take_few_iterations(name):
    generator = torch.Generator().manual_seed(1)
    logits = staircases(400, 2000, generator)
    most, inside = 0, 0
    for share in (0.003, 0.05, 0.2, 0.5, 0.8, 0.97):
        found, iterations = check(logits, share * math.log(2000), name)
        most, inside = max(most, iterations), inside + found
    assert inside > 1500
    assert most <= 20  # of the 30 that are allowed


def test_rows_of_a_language_model_take_few_iterations(backend, device):
    logits = torch.randn(16, 3001, device=device) * 3
    logits[:, :40] += torch.rand(16, 40, device=device) * 12
    _, stats = optimal_temperature(logits, 5.0, 0.05, 5, return_stats=True, backend=backend)
    assert stats.iterations.float().mean() <= 5 and stats.iterations.max() <= 8


def test_tau_is_that_of_a_bisection_in_float64(backend, device):
    logits = kinds(6, 501, device)["normal"]
    rho = 2.5
    low, high = (torch.full((6,), t, dtype=torch.float64, device=device) for t in (LOW, HIGH))
    for _ in range(60):
        middle = (low * high).sqrt()
        above = kl_at(logits, middle) > rho
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    tau = optimal_temperature(logits, rho, LOW, HIGH, backend=backend)
    assert (tau > 0.5).all() and (tau < 5).all()
    # What 1e-5 of kl is in log tau.
    assert ((tau / low).log().abs() <= 1e-5 / variance(logits, low)).all()


def test_it_minimises_the_token_loss(backend, device):
    logits = torch.randn(5, 300, device=device) * 2
    target = torch.randint(300, (5,), device=device)
    tau = optimal_temperature(logits, 1.5, 0.01, 10, backend=backend)
    leaf = tau.clone().requires_grad_()
    loss = dro_cross_entropy(logits, target, leaf, 1.5, reduction="none", backend="reference")
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    assert grad.abs().max() <= 2e-5  # rho - kl
    for factor in (0.8, 1.25):
        other = dro_cross_entropy(
            logits, target, factor * tau, 1.5, reduction="none", backend="reference"
        )
        assert (other > loss + 1e-3).all()


def test_clipping(backend, device):
    rows = {
        "flat": torch.zeros(64),  # kl = 0 at every tau
        "offset and flat": torch.full((64,), 1e4),
        "k maxima": torch.where(torch.arange(64) < 16, 0.0, -1.0),  # kl <= log 4
        "normal": torch.randn(64),
        "certain": torch.where(torch.arange(64) == 7, 1e4, 0.0),
        "no other finite logit": torch.where(torch.arange(64) == 7, 0.0, -INF),
        "masked and flat": torch.where(torch.arange(64) < 16, 3.0, -INF),  # kl = log 4
    }
    logits = torch.stack(list(rows.values())).to(device)

    def taus(rho, low=0.25, high=4.0):
        tau = optimal_temperature(logits, rho, low, high, backend=backend)
        return dict(zip(rows, tau.tolist(), strict=True))

    assert set(taus(math.log(64)).values()) == {0.25}
    assert set(taus(INF).values()) == {0.25}
    at_zero = taus(0.0)
    assert at_zero.pop("flat") == at_zero.pop("offset and flat") == 0.25
    assert set(at_zero.values()) == {4.0}
    found = taus(1.39)  # just above log 4
    assert [found[k] for k in ("flat", "k maxima", "masked and flat")] == [0.25] * 3
    assert found["certain"] == found["no other finite logit"] == 4.0
    assert 0.25 < found["normal"] < 4
    assert taus(1.38)["masked and flat"] == 4.0
    assert set(taus(1.0, 0.7, 0.7).values()) == {torch.tensor(0.7).item()}


def test_one_column(backend, device):
    logits = torch.tensor([[3.0], [-1e4]], device=device)
    tau, stats = optimal_temperature(logits, 0.0, 0.5, 2, return_stats=True, backend=backend)
    assert tau.tolist() == [0.5, 0.5] and stats.kl.tolist() == [0, 0]


def test_odd_rows_are_nan_and_leave_the_others_alone(backend, device):
    logits = torch.randn(6, 5000, device=device)
    alone = optimal_temperature(logits, 0.3, 0.1, 9, backend=backend)
    logits[1, 4321] = math.nan
    logits[2, 17] = INF
    logits[3] = -INF
    tau, stats = optimal_temperature(logits, 0.3, 0.1, 9, return_stats=True, backend=backend)
    assert tau.isnan().tolist() == stats.kl.isnan().tolist() == [0, 1, 1, 1, 0, 0]
    assert torch.equal(tau[[0, 4, 5]], alone[[0, 4, 5]])
    assert (alone > 0.1).all() and (alone < 9).all()
    # Masked columns have no weight, and count in log V.
    shorter, log_ratio = logits[4:, :4000].clone(), math.log(5000 / 4000)
    logits[:, 4000:] = -INF
    masked = optimal_temperature(logits[4:], 0.3 + log_ratio, 0.1, 9, backend=backend)
    expected = optimal_temperature(shorter, 0.3, 0.1, 9, backend=backend)
    torch.testing.assert_close(masked, expected, rtol=5e-5, atol=0)


def test_rho_of_each_row(backend, device):
    logits = torch.randn(2, 3, 200, device=device)
    rho = torch.rand(2, 3, device=device)
    tau, stats = optimal_temperature(logits, rho, 0.1, 50, return_stats=True, backend=backend)
    assert tau.shape == stats.kl.shape == stats.iterations.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            one = optimal_temperature(logits[i, j], rho[i, j].item(), 0.1, 50, backend=backend)
            assert one.shape == () and one == tau[i, j]
    shared = optimal_temperature(logits, rho[0, 0], 0.1, 50, backend=backend)
    assert shared[0, 0] == tau[0, 0] and shared[1, 1] != tau[1, 1]
    rho[0, 1], rho[1, 2] = -0.1, math.nan
    bad = optimal_temperature(logits, rho, 0.1, 50, backend=backend)
    assert bad.isnan().tolist() == [[0, 1, 0], [0, 0, 1]]


def test_no_rows(backend, device):
    tau, stats = optimal_temperature(
        torch.empty(0, 7, device=device), 1.0, 0.1, 9, return_stats=True, backend=backend
    )
    assert tau.shape == stats.kl.shape == stats.iterations.shape == (0,)


# In longer rows the order of a kernel's sums follows where a row begins in 16 bytes.
@pytest.mark.parametrize("v, rtol", [(33, 0), (1000, 1e-5)])
def test_views_are_read_in_place_and_padding_is_not_read(backend, device, v, rtol):
    wide = torch.full((5, v + 31), math.nan, device=device)
    logits = torch.randn(5, v, device=device)
    expected = optimal_temperature(logits, 0.5, 0.1, 9, backend=backend)
    for first in (0, 1):
        wide[:] = math.nan
        wide[:, first : first + v] = logits
        got = optimal_temperature(wide[:, first : first + v], 0.5, 0.1, 9, backend=backend)
        torch.testing.assert_close(got, expected, rtol=rtol, atol=0)
    got = optimal_temperature(logits.T.contiguous().T, 0.5, 0.1, 9, backend=backend)
    assert torch.equal(got, expected)


def test_results_are_the_same_in_every_run(backend, device):
    logits = torch.randn(4, 5000, device=device).bfloat16() * 3
    first, *others = (
        optimal_temperature(logits, 3.0, 0.1, 9, return_stats=True, backend=backend)
        for _ in range(3)
    )
    for other in others:
        for x, y in zip((first[0], *first[1]), (other[0], *other[1]), strict=True):
            assert torch.equal(x, y)


def test_there_is_no_gradient(backend, device):
    logits = torch.randn(4, 50, device=device, requires_grad=True)
    rho = torch.rand(4, device=device, requires_grad=True)
    tau = optimal_temperature(logits, rho, 0.1, 9, backend=backend)
    assert not tau.requires_grad
    loss = (logits.sum(1) * tau).sum()  # a constant to the loss
    (grad,) = torch.autograd.grad(loss, logits)
    assert torch.equal(grad, tau[:, None].expand(4, 50))


@pytest.mark.parametrize("name", ["reference", "native", "triton"])
def test_func_grad_takes_it_as_a_constant(name, device):
    logits = torch.randn(4, 50, device=device)
    grad = torch.func.grad(
        lambda z: (z.sum(1) * optimal_temperature(z, 0.5, 0.1, 9, backend=name)).sum()
    )(logits)
    tau = optimal_temperature(logits, 0.5, 0.1, 9, backend=name)
    assert torch.equal(grad, tau[:, None].expand(4, 50))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (([1.0], 1, 1, 2), TypeError, "logits must be a tensor, got list"),
        ((torch.ones(3, 4).int(), 1, 1, 2), TypeError, "logits must be float32.*got torch.int32"),
        ((torch.ones(3, 0), 1, 1, 2), ValueError, r"logits must have shape .*got \(3, 0\)"),
        ((torch.ones(()), 1, 1, 2), ValueError, r"logits must have shape .*got \(\)"),
        ((torch.ones(3, 4), -1e-9, 1, 2), ValueError, "rho must be a number >= 0, got -1e-09"),
        ((torch.ones(3, 4), math.nan, 1, 2), ValueError, "rho must be a number >= 0, got nan"),
        ((torch.ones(3, 4), torch.ones(2), 1, 2), ValueError, r"rho must have shape \(3,\)"),
        ((torch.ones(3, 4), torch.ones(3).int(), 1, 2), TypeError, "rho must be of a floating"),
        ((torch.ones(3, 4), 1, 0, 2), ValueError, "tau_min and tau_max .*got 0 and 2"),
        ((torch.ones(3, 4), 1, 3, 2), ValueError, "0 < tau_min <= tau_max < inf .*got 3 and 2"),
        ((torch.ones(3, 4), 1, math.nan, 2), ValueError, "tau_min and tau_max .*got nan and 2"),
        ((torch.ones(3, 4), 1, 1e-40, 2), ValueError, "in torch.float32, got 1e-40 and 2"),
        ((torch.ones(3, 4), 1, 1, INF), ValueError, "tau_min and tau_max .*got 1 and inf"),
        ((torch.ones(3, 4), 1, torch.ones(3), 2), TypeError, "tau_min must be a number, got a ten"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(arguments, error, message):
    with pytest.raises(error, match=f"optimal_temperature: .*{message}"):
        optimal_temperature(*arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["reference", "native", "triton"])
def test_opcheck(name, dtype, device):
    logits, rho = torch.randn(4, 40, device=device).to(dtype), torch.rand(4, device=device)
    op = getattr(torch.ops.tempnet.optimal_temperature, name)
    torch.library.opcheck(op, (logits, rho, 0.1, 9.0))
    torch.library.opcheck(op, (logits, rho[:1].expand(4), 0.1, 9.0))


@pytest.mark.parametrize("name", ["reference", "native", "triton"])
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
