"""The optimal temperature: kl(tau) = rho in float64, on every backend, for every kind of row."""

import math

import pytest
import torch
from backends import DTYPES, native_levels
from temperature import HIGH, LOW, check, kinds, kl_at, variance

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


def test_results_are_the_same_in_every_run(backend, device):
    logits = torch.randn(4, 5000, device=device).bfloat16() * 3
    first, *others = (
        optimal_temperature(logits, 3.0, 0.1, 9, return_stats=True, backend=backend)
        for _ in range(3)
    )
    for other in others:
        for x, y in zip((first[0], *first[1]), (other[0], *other[1]), strict=True):
            assert torch.equal(x, y)
