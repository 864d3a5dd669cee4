"""What every test file uses: devices, processes; and NaN in memory nobody wrote."""

import os

# Read at the first allocation; processes that a test starts have it, too.
os.environ["TEMPNET_FILL_ALLOCATIONS"] = "1"

# Without a GPU the Triton kernels run in the interpreter; it is chosen when triton is imported.
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from backends import DEVICE

# Their asserts say what was compared, as those of a test file do.
pytest.register_assert_rewrite(
    "compare", "contrastive", "linear_loss", "open_clip_by_hand", "temperature", "tempered",
    "tiny_transformers", "token_loss", "vocabulary",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """A test that takes ``device`` has its tensors on the GPU where there is one, and is marked
    "gpu"; in the emulator they stay on the CPU."""
    for item in items:
        if "device" in item.fixturenames and "emulated" not in item.nodeid:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def fill_uninitialized_memory():
    """torch.empty returns NaN, so an output that a kernel does not write is seen; of what the C++
    kernels allocate, TEMPNET_FILL_ALLOCATIONS sees to it."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """For trainings of small models, which are many times slower where each of two test processes
    has a thread for every core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def device(request):
    """The GPU where there is one; the emulator's tensors are on the CPU."""
    callspec = getattr(request.node, "callspec", None)
    return "cpu" if callspec and callspec.params.get("backend") == "emulated" else DEVICE


@pytest.fixture
def simd_level(request):
    """Run the CPU kernels at the SIMD level of the parameter."""
    from tempnet_kernels import _C

    highest = _C.cpu_capability()
    _C.set_cpu_capability(request.param)
    yield request.param
    _C.set_cpu_capability(highest)


@pytest.fixture(scope="session")
def gloo(tmp_path_factory):
    """Four gloo processes."""
    import processes

    pool = processes.Processes(4, tmp_path_factory.mktemp("gloo"))
    yield pool
    pool.stop()


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles in both directions, the last ones ragged."""
    for name, value in (("TILE_ROWS", 64), ("TILE_BYTES", 1)):
        tables = f"tempnet_kernels.chunked.dro_contrastive.{name}"
        monkeypatch.setattr(tables, dict.fromkeys(("cpu", "cuda"), value))


@pytest.fixture
def wide_products(monkeypatch):
    """Products of 16-bit matrices with float32 results on the CPU, as on a GPU."""

    def mm(a, b, out_dtype, *, out):
        return torch.mm(a.to(out_dtype), b.to(out_dtype), out=out)

    def addmm(bias, a, b, out_dtype, *, beta=1, alpha=1, out):
        return torch.addmm(
            bias, a.to(out_dtype), b.to(out_dtype), beta=beta, alpha=alpha, out=out
        )  # fmt: skip

    monkeypatch.setattr("tempnet_kernels.core.matmul.WIDE_PRODUCTS", {"cpu", "cuda"})
    library = torch.library.Library("aten", "IMPL")
    library.impl("mm.dtype_out", mm, "CPU")
    library.impl("addmm.dtype_out", addmm, "CPU")
    yield
    library._destroy()
