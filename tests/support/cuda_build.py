"""The CUDA library as `make cuda` makes it, beside this checkout's own, and what ptxas said of its
kernels. Compiled once for all tests, and again where a source has changed."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "test_cuda"
LIBRARY = BUILD / "lib" / "tempnet_kernels" / "lib" / "libtempnet_cuda.so"
REPORT = BUILD / "ptxas.txt"
# By the namespace below tempnet::device that the kernels of an op are in.
SOURCES = {
    "anchors": "contrastive_anchors",
    "contrastive": "dro_contrastive",
    "head": "temperature_head",
    "linear": "linear_dro_cross_entropy",
    "samples": "per_sample_state",
    "softmax": "tempered_softmax",
    "token_rows": "token_rows",
    None: "dro_cross_entropy",
}
NAMESPACES = "|".join(filter(None, SOURCES))
KERNEL = re.compile(
    rf"Compiling entry function '\w*?device(?:\d+({NAMESPACES}))?"
    r"\d+(\w+?_kernel)(?:I(\w+?)v|E)NS\d?_\d+\w*Params(?:IfE)?E' for 'sm_(\w+)'.*?"
    r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
    re.S,
)


def build():
    """The library's path."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on the PATH: not compiled")
    BUILD.mkdir(parents=True, exist_ok=True)
    with FileLock(BUILD / "lock"):
        sources = [ROOT / "setup.py", *ROOT.glob("csrc/**/*.*")]
        if not REPORT.exists() or max(map(os.path.getmtime, sources)) > REPORT.stat().st_mtime:
            for folder in ("lib", "temp"):
                shutil.rmtree(BUILD / folder, ignore_errors=True)
            command = [sys.executable, "setup.py", "-q", "build_ext"]
            result = subprocess.run(
                [*command, f"--build-lib={BUILD / 'lib'}", f"--build-temp={BUILD / 'temp'}"],
                cwd=ROOT, capture_output=True, text=True,
                env={
                    **os.environ, "TEMPNET_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "8.0+PTX;9.0a",
                    "NVCC_APPEND_FLAGS": "-Xptxas=-v -Werror=all-warnings",
                },
            )  # fmt: skip
            assert result.returncode == 0, result.stdout + result.stderr
            REPORT.write_text(result.stdout + result.stderr)
    return LIBRARY


def kernels():
    """{(source, architecture): [(kernel, its mangled template arguments, registers, spilled
    bytes)]}"""
    build()
    found = {}
    for space, kernel, arguments, architecture, *numbers in KERNEL.findall(REPORT.read_text()):
        source = "optimal_temperature" if kernel == "temperature_kernel" else SOURCES[space or None]
        stores, loads, registers = map(int, numbers)
        row = (kernel, arguments, registers, stores + loads)
        found.setdefault((source, architecture), []).append(row)
    return found
