"""The CUDA kernels of the tempered softmax in the emulator, with launch plans of the test's."""

import pytest
import torch
from backends import DTYPES
from emulated import ORDERS, shifted, whole_lines
from tempered import check, logarithm, make, run

OP = "tempered_softmax"
VOCABULARIES = [1, 7, 32, 33, 1000, 4096, 20000]


def plan_of(v, dtype, cluster, twice, held):
    """``held``: vectors that a thread holds."""
    slice_ = v if cluster == 1 else whole_lines(v, cluster, dtype)
    vectors = -(-slice_ * dtype.itemsize // 16)
    threads = 64 if twice else -(-vectors // held // 32) * 32
    return {"twice": twice, "cluster": cluster, "threads": threads, "slice": slice_}


@logarithm
@pytest.mark.parametrize("v", VOCABULARIES)
@pytest.mark.parametrize("cluster", [1, 2, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_in_registers_and_read_twice_match_the_definition(use, dtype, cluster, v, log):
    # Of few numbers the plain formula's error can be small by luck.
    logits, tau, upstream = make((40 if v < 100 else 5, v), dtype)
    use("random", **plan_of(v, dtype, cluster, True, 0))
    for a, b in ((0, 0), (1, 1), (3, 0)):  # on 16 bytes; off; the two streams differ
        check("native", log, shifted(logits, a), tau, shifted(upstream, b))
    if v * dtype.itemsize % 16 == 0:
        operators = use("reversed", **plan_of(v, dtype, cluster, False, 4))
        check("native", log, shifted(logits, 0), tau, shifted(upstream, 0))
        assert [plan["twice"] for plan in operators.launched] == [False, False]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("twice", [False, True])
def test_every_thread_order_gives_the_same_bits(use, order, twice):
    inputs = make((3, 9000), torch.bfloat16)
    results = []
    for name in ("forward", order):
        use(name, **plan_of(9000, torch.bfloat16, 4, twice, 4))
        results.append(run("native", False, *inputs))
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_launch_plan_covers_every_size(module, dtype, arch):
    """Every row is held by the threads of its plan, or read twice; nothing writes past it."""
    params = dict.fromkeys(("tau", "rows", "grad_tau", "tau_stride"), 0)
    params |= {"logits": 16, "log": False, "run": False}
    kinds = set()
    for v in (1, 33, 1000, 32000, 50257, 50304, 128256, 151936, 262144, 2**20):
        for n in (1, 64, 8192):
            for upstream, out in ((0, 16), (16, 16), (16, 0)):
                shape = {"n": n, "v": v, "logits_stride": v, "grad_output_stride": v}
                pointers = {"grad_output": upstream, "out": out}
                name = str(dtype).removeprefix("torch.")
                plan = module.tempered_softmax(name, params | shape | pointers, arch, {})
                kinds.add((plan["twice"], plan["cluster"]))
                assert plan["threads"] % 32 == 0 and 32 <= plan["threads"] <= 1024
                assert plan["cluster"] == 1 or arch >= 90
                assert plan["slice"] * plan["cluster"] >= v
                if not plan["twice"]:
                    held = plan["threads"] * (4 if upstream else 8) * 16
                    assert held >= plan["slice"] * dtype.itemsize
                    assert v * dtype.itemsize % 16 == 0 and out
    assert {(False, 1), (True, 1)} <= kinds
    assert arch < 90 or {(False, 2), (False, 4), (False, 8), (True, 8)} <= kinds


@pytest.mark.parametrize("v", [4096, 4100])  # every vector that a thread holds is the row's, or not
def test_an_infinite_temperature_is_nan(use, v):
    use()
    logits, tau, upstream = make((3, v))
    tau[1] = torch.inf
    for result in run("native", False, logits, tau, upstream):
        assert result[1].isnan().all() and result[[0, 2]].isfinite().all()
