"""The Triton kernels compiled for sm_80 and sm_90 as the launcher would: nothing spills, NaN is
kept.

Runs without a GPU: ptxas and cuobjdump come with the triton wheel. The kernels are compiled in a
subprocess, since this one may be in interpreter mode.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install triton")

ARCHITECTURES = (80, 90)


def compile_kernels(architecture, program="compile_triton.py"):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    code = Path(__file__).with_name(program)
    result = subprocess.run(
        [sys.executable, code, str(architecture)], capture_output=True, text=True, env=env
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def report(request):
    return compile_kernels(request.param)


@pytest.fixture
def compiled(report):
    return [kernel for kernel in report if kernel["op"] != "starved"]


def test_a_spill_is_seen(report):
    (starved,) = [kernel for kernel in report if kernel["op"] == "starved"]
    assert starved["registers"] <= 32 and starved["spills"] > 0


def test_no_kernel_spills(compiled):
    for kernel in compiled:
        print(f"{kernel['name']:60} {kernel['registers']:4} registers {kernel['spills']:4} spills")
    vocabularies = {f"V={v}" for v in (8192, 32000, 50304, 128256, 262144, 50257)}
    assert vocabularies | {"VEC=4", "VEC=1", "K=256", "K=1000", "B", "N"} == {
        k["shape"] for k in compiled
    }
    assert all(kernel["registers"] > 16 for kernel in compiled if kernel["shape"] not in ("B", "N"))
    assert [kernel["name"] for kernel in compiled if kernel["spills"]] == []


def test_two_programs_of_the_contrastive_loss_fit_on_a_multiprocessor(compiled):
    """Also: Triton gives a patch's axes to warps and lanes as the kernel means it; otherwise sums
    over a patch go through shared memory and take more registers."""
    registers = {k["name"]: k["registers"] for k in compiled if k["op"] == "contrastive_loss"}
    assert registers
    assert [name for name, number in registers.items() if number > 128] == []


def test_exponent_is_not_clamped_before_the_exponential(compiled):
    """min/max drop NaN on a GPU: none may stand between the logit's fma and its ex2."""
    for kernel in compiled:
        assert kernel["exponentials"] > 0 or kernel["op"] == "contrastive_anchors", kernel["name"]
        assert kernel["clamped_exponentials"] == 0, kernel["name"]


def test_no_atomics(compiled):
    assert not any(kernel["atomics"] for kernel in compiled)


def test_optimal_temperature_divides_exactly_where_kl_needs_it(compiled):
    """1 / tau and the mean: the interpreter's / is exact, a GPU's errs by 2 ulp."""
    kernels = [k for k in compiled if k["op"] == "optimal_temperature"]
    assert kernels and all(k["exact_divisions"] == 2 for k in kernels)


def test_tempered_softmax_divides_exactly(compiled):
    """As the interpreter does. With the 2 ulp of a GPU's / in a, 1 / s, 1 / tau and the mean,
    results pass the bound that they are tested against."""
    kernels = [k for k in compiled if k["op"] == "tempered_softmax"]
    assert kernels and all(k["exact_divisions"] for k in kernels)
    assert [k["name"] for k in kernels if k["approximate_divisions"]] == []


def test_launches_with_odd_arguments_compile():
    """What the interpreter takes and the compiler may not: an integer that is 1, so a constant, one
    of 64 bits, an expanded or missing tensor; and no grid is empty."""
    assert compile_kernels(90, "launch_triton.py") > 100
