"""What every test file uses: backends, dtypes, devices; and NaN in memory nobody wrote."""

import os

# Without a GPU the Triton kernels run in the interpreter; it is chosen when triton is imported.
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def fill_uninitialized_memory():
    """torch.empty returns NaN, so an output that a kernel does not write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def device():
    """The GPU where there is one."""
    return DEVICE


def native_levels():
    """The SIMD levels of this processor, highest first."""
    from tempnet_kernels import _C

    levels = ("baseline", "avx2", "avx512")
    return levels[: levels.index(_C.cpu_capability()) + 1][::-1]


@pytest.fixture
def simd_level(request):
    """Run the CPU kernels at the SIMD level of the parameter."""
    from tempnet_kernels import _C

    highest = _C.cpu_capability()
    _C.set_cpu_capability(request.param)
    yield request.param
    _C.set_cpu_capability(highest)
