"""What a call launches, counted on the CPU as the operators that do something and call no other."""

import pytest
from bench_overhead import contrastive_calls, linear_calls, step, token_calls
from launches import launches

CHUNKS = 8
# Forward and backward of 64 rows.
MOST = {
    "dro_cross_entropy": 6,
    "DROCrossEntropyLoss": 6,
    "tempered_softmax": 6,
    "tempered_log_softmax": 6,
    "optimal_temperature": 2,
    "linear_dro_cross_entropy": 12 + 5,
    "linear_dro_cross_entropy, 8 chunks": 12 + 5 * CHUNKS,
    "linear_dro_cross_entropy, TempNet": 28 + 14,
    "linear_dro_cross_entropy, TempNet, 8 chunks": 28 + 14 * CHUNKS,
    "dro_contrastive": 16 + 5,  # one tile in two passes has 13
    "ContrastiveTempNet": 18,
    "RobustContrastiveLoss, sogclr": 30,
    "RobustContrastiveLoss, tempnet": 70,
    "TempNet": 18,
    "TempNetCrossEntropyLoss": 24,
    "TempNetCausalLMLoss": 25,
}


def calls():
    return (
        token_calls(64, 1000, "cpu") | linear_calls(64, 1000, 64, "cpu")
        | contrastive_calls(64, 64, "cpu")
    )  # fmt: skip


@pytest.mark.parametrize("name", MOST)
def test_few_launches(name):
    call = calls()[name]
    counts = launches(lambda: step(call))
    assert counts.total() <= MOST[name], counts
    # Ours are among them, so that what is counted is what was meant.
    assert any(operator.startswith("tempnet::") for operator in counts)
