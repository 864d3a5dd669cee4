"""The contract for odd input (test_contract.py) on the emulated CUDA kernels."""

import sys

import emulated
import pytest
import test_contract

pytestmark = pytest.mark.parametrize("backend", ["native"])

for _name, _test in vars(test_contract).items():
    # The launcher of CPU tensors checks targets; that of CUDA tensors must not wait for them.
    if _name.startswith("test_") and _name != "test_target_out_of_range":
        globals()[_name] = _test


@pytest.fixture
def device():
    return "cpu"


@pytest.fixture(autouse=True)
def emulate(monkeypatch):
    operators = emulated.Operators(emulated.load())
    monkeypatch.setattr(sys.modules["tempnet_kernels.dro_cross_entropy"], "_op", operators)
