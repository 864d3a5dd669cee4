"""The optimal temperature at the bounds and of odd rows, and wrong arguments."""

import math

import pytest
import torch
from temperature import INF

from tempnet_kernels import optimal_temperature


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
