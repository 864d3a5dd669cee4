"""The CUDA kernels of the optimal temperature in the emulator."""

import math

import pytest
import torch
from backends import DTYPES
from emulated import ORDERS
from temperature import check, kinds

from tempnet_kernels import optimal_temperature

OP = "optimal_temperature"


@pytest.mark.parametrize("hold", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v", [33, 4099, 10007])
def test_emulated_kernels_meet_rho_on_any_alignment(use, v, dtype, hold):
    """A row in registers and one that is read again, on 16 bytes and off them."""
    use(hold=hold)
    inside = 0
    for kind in ("normal", "peaked", "stairs", "masked"):
        logits = kinds(2, v)[kind].to(dtype)
        wide = torch.full((2, v // 8 * 8 + 16), math.nan, dtype=dtype)
        for first in (0, 1, 7):
            wide[:] = math.nan
            wide[:, first : first + v] = logits
            inside += check(wide[:, first : first + v], 0.5 * math.log(v), "native")[0]
    assert inside >= 18


@pytest.mark.parametrize("hold", [True, False])
def test_every_thread_order_gives_the_same_bits(use, hold):
    logits = torch.randn(2, 9000).bfloat16() * 3
    results = []
    for order in ORDERS:
        use(order, hold=hold)
        results.append(optimal_temperature(logits, 4.0, 0.1, 9, return_stats=True))
    for tau, stats in results[1:]:
        assert torch.equal(tau, results[0][0]) and torch.equal(stats.kl, results[0][1].kl)
