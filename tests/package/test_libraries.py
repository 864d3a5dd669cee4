"""The compiled libraries depend on torch's stable C symbols and on no Python, so that one build
serves any Python and any torch from 2.11 on, and CUDA kernels are built without a GPU."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import cuda_build
import pytest
import torch

from tempnet_kernels.core import register

LIBTORCH = Path(torch.__path__[0]) / "lib" / "libtorch_cpu.so"
# torch's C shims, the CUDA runtime, and what gcc needs: from libc, libm and libstdc++.
STABLE = re.compile(r"(aoti_)?torch_|cuda[A-Z]|__cuda|_ITM_|__gmon_start__$|.*@(GLIBC|GCC|CXXABI)")


@pytest.fixture
def cuda_library():
    return cuda_build.build()


def undefined(library):
    out = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True)
    return [line.split()[-1] for line in out.stdout.splitlines()]


def assert_stable(library):
    symbols = undefined(library)
    assert any("torch_" in symbol for symbol in symbols)  # nm read it
    unstable = [s for s in symbols if not STABLE.match(s) and "@GLIBCXX" not in s]
    assert not unstable


def test_an_element_that_a_cpu_kernel_does_not_write_is_nan():
    """In the tests, which rely on it: of a column that is said to be an anchor's, but no row's, the
    parameters are nobody's."""
    m, n = 2, 3
    rows, columns, one = torch.ones(5, m), torch.ones(5, n), torch.ones(n)
    nobody, none = torch.zeros(n, dtype=torch.int32), one.new_empty(0)
    place = torch.arange(m)
    *_, parameters = torch.ops.tempnet.contrastive_anchors.native(
        rows, columns, one[:m], one, one[:m], one[:m], place, nobody, none, none, 0, 1.0, 0.5
    )
    assert parameters[:, :m].isfinite().all() and parameters[:, m].isnan().all()


def test_the_cpu_library_needs_stable_symbols_only():
    assert_stable(register.library("cpu"))


def test_the_cuda_library_needs_stable_symbols_only(cuda_library):
    assert_stable(cuda_library)
    needed = subprocess.run(["readelf", "-d", cuda_library], capture_output=True, text=True).stdout
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", needed))
    # Of torch libtorch.so alone, which a torch without CUDA has, too.
    assert {n for n in needed if "torch" in n or "cuda" in n} == {
        "libtorch.so",
        "libcudart.so.13",
    }
    assert cuda_library.stat().st_size < 16 << 20


def test_the_cuda_library_registers_every_operator_of_the_cpu_library(cuda_library):
    """By name: it does not load without a CUDA runtime."""

    def operators(library):
        return set(re.findall(rb"\b\w+\.native\b", library.read_bytes()))

    on_cpu = operators(register.library("cpu"))
    assert len(on_cpu) >= 12 and operators(cuda_library) == on_cpu


def other_pythons():
    """Interpreters of other versions, by version."""
    found = {}
    candidates = [f"python3.{minor}" for minor in range(10, 16)]
    candidates += map(str, Path(sys.base_prefix).parent.glob("3.*/bin/python3"))
    for candidate in candidates:
        path = shutil.which(candidate)
        if path is None:
            continue
        code = "import sys; print(*sys.version_info[:2])"
        result = subprocess.run([path, "-c", code], capture_output=True, text=True)
        if result.returncode == 0:
            found[tuple(map(int, result.stdout.split()))] = path
    found.pop(sys.version_info[:2], None)
    return found


def test_another_python_loads_the_cpu_library():
    pythons = other_pythons()
    if not pythons:
        pytest.skip("no Python of another version is here")
    path = pythons[max(pythons)]
    # Without torch's Python half, which is of one version: its C++ half is loaded as it stands.
    code = (
        "import ctypes, sys\n"
        "ctypes.CDLL(sys.argv[1])\n"
        "library = ctypes.CDLL(sys.argv[2])\n"
        "print(library._handle != 0)\n"
    )
    arguments = [str(LIBTORCH), str(register.library("cpu"))]
    result = subprocess.run([path, "-c", code, *arguments], capture_output=True, text=True)
    assert result.stdout == "True\n", result.stderr


def test_a_library_that_does_not_load_is_reported(tmp_path, monkeypatch):
    broken = tmp_path / "libtempnet_cpu.so"
    broken.write_text("not a library")
    monkeypatch.setattr(register, "library", lambda device: broken)
    assert "libtempnet_cpu.so" in register.load_native.__wrapped__()["cpu"]
    monkeypatch.setattr(register, "load_native", register.load_native.__wrapped__)
    # The kernels of this process are there whatever the file is now.
    assert register.missing("row_moments", "native", "cpu") is None
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *a: False)
    assert "does not load: " in register.missing("row_moments", "native", "cpu")
    broken.unlink()
    assert "not built: run `pip install" in register.missing("row_moments", "native", "cpu")
