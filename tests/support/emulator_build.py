"""Builds tests/emulator, the CUDA kernels on a CPU."""

import functools
import hashlib
import importlib
import importlib.util
import os
import subprocess
import sysconfig
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).parents[2]
FLAGS = ["-std=c++17", "-O2", "-Wall", "-Wno-unknown-pragmas", "-fPIC", "-shared"]
FLAGS += ["-fvisibility=hidden", "-DTEMPNET_EMULATED"]


@functools.cache
def load():
    """The compiled emulator; compiled again when a source has changed."""
    emulator = ROOT / "tests/emulator"
    patterns = ("tests/emulator/*.h", "tests/emulator/*.cpp", "csrc/*.h", "csrc/cuda/*.cuh")
    sources = sorted(path for pattern in patterns for path in ROOT.glob(pattern))
    text = b"".join(path.read_bytes() for path in sources) + " ".join(FLAGS).encode()
    directory = ROOT / "build" / "cuda_emulator"
    directory.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(text).hexdigest()[:16]
    library = directory / digest / f"cuda_emulator{sysconfig.get_config_var('EXT_SUFFIX')}"
    with FileLock(directory / "lock"):
        if not library.exists():
            import pybind11  # need not be where the kernels run on a GPU

            library.parent.mkdir(exist_ok=True)
            includes = [ROOT / "csrc", emulator, pybind11.get_include()]
            includes.append(sysconfig.get_path("include"))
            partial = library.with_suffix(".partial")
            command = [os.environ.get("CXX", "g++"), *FLAGS, *(f"-I{path}" for path in includes)]
            command += [*map(str, sorted(emulator.glob("*.cpp"))), "-o", str(partial)]
            subprocess.run(command, check=True)
            partial.rename(library)
    spec = importlib.util.spec_from_file_location("cuda_emulator", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
