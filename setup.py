"""Builds the kernels and the two pybind11 modules that ask them things.

The kernels are shared libraries without Python, tempnet_kernels/lib/libtempnet_cpu.so and, where
torch and nvcc have CUDA or TEMPNET_CUDA=1, libtempnet_cuda.so: any Python and any torch from 2.11
on loads them. The modules tempnet_kernels._C and ._C_cuda link to them.
"""

import importlib.util
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path

# The lowest versions that build: pyproject.toml has them too, torch among what runs.
REQUIRED = {"setuptools": "77", "torch": "2.11", "pybind11": "2.13", "ninja": "1.11"}


def find_torch():
    """The folder of torch, of which the build needs headers and the names of libraries alone."""
    # pip's isolated build hides the environment that it installs into. A torch of the build's own
    # would be a download of gigabytes.
    hidden = [sysconfig.get_path("platlib")]
    spec = importlib.util.find_spec("torch") or PathFinder.find_spec("torch", hidden)
    return Path(spec.origin).parent if spec and spec.origin else None


TORCH = find_torch()
# Read, not imported: a torch that does not load here builds as well.
TORCH_VERSION = runpy.run_path(str(TORCH / "version.py")) if TORCH else {}


def installed(name):
    if name == "torch":
        return TORCH_VERSION.get("__version__")
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def lacking():
    """What is missing or too old, in words."""

    def numbers(version):
        return [int(n) for n in re.findall(r"\d+", version)[:2]]

    for name, lowest in REQUIRED.items():
        version = installed(name)
        if version is None:
            yield f"{name}>={lowest}"
        elif numbers(version) < numbers(lowest):
            yield f"{name}>={lowest} (here {version})"


# Before setuptools is imported, which may be missing, and before it reads pyproject.toml, of which
# an old one says something else.
if problems := ", ".join(lacking()):
    packages = shlex.join(f"{name}>={lowest}" for name, lowest in REQUIRED.items())
    sys.exit(
        f"tempnet_kernels: the build lacks {problems}; run `pip install {packages}`, then "
        "`pip install --no-build-isolation .`"
    )

import pybind11  # noqa: E402
from setuptools import Extension, setup  # noqa: E402
from setuptools.command.build import build  # noqa: E402
from setuptools.command.build_ext import build_ext  # noqa: E402
from setuptools.errors import CompileError  # noqa: E402

STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # of torch 2.11; later versions keep it
# No -ffast-math: it hides NaN. What is left lets the compiler vectorise loops that call exp2 and
# round.
CXX = ["-std=c++17", "-O3", "-fPIC", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
CXX += ["-ffp-contract=fast", "-fvisibility=hidden", "-Wall", "-Wno-attributes"]
NVCC = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-DUSE_CUDA"]
# Machine code for 8.x and 9.0, and PTX that a driver compiles for what is newer.
ARCHITECTURES = "8.0+PTX;9.0a"

HEADERS = [f"-I{TORCH}/include", f"-I{TORCH}/include/torch/csrc/api/include"]
TORCH_LIBRARIES = f"-L{TORCH}/lib"
# An error of a kernel says csrc/cpu/..., not where this build was.
SHORT_PATHS = [f"-ffile-prefix-map={folder}/=" for folder in (Path.cwd(), TORCH / "include")]


def want_cuda():
    wanted = os.environ.get("TEMPNET_CUDA")
    if wanted is not None:
        return wanted == "1"
    return TORCH_VERSION["cuda"] is not None and shutil.which("nvcc") is not None


class KernelLibrary(Extension):
    """A shared library of kernels: compiled by ninja, loaded by torch.ops.load_library."""

    def __init__(self, name, sources, compiler, flags, link):
        super().__init__(f"tempnet_kernels.lib.{name}", sources)
        self.compiler, self.flags, self.link = compiler, flags, link

    def build(self, output, directory):
        output, directory = output.absolute(), directory.absolute()
        output.parent.mkdir(parents=True, exist_ok=True)
        directory.mkdir(parents=True, exist_ok=True)
        flags, link = (shlex.join(x).replace("$", "$$") for x in (self.flags, self.link))
        rules = [
            "rule compile",
            f"  command = {self.compiler} {flags} -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {self.compiler} -shared $in {link} -o $out",
        ]
        objects = []
        for source in self.sources:
            objects.append(f"{Path(source).stem}.o")
            rules.append(f"build {objects[-1]}: compile {Path(source).absolute()}")
        rules.append(f"build {output}: link {' '.join(objects)}")
        (directory / "build.ninja").write_text("\n".join(rules) + "\n")
        ninja = [sys.executable, "-m", "ninja", "--quiet", "-C", str(directory)]
        if subprocess.run(ninja).returncode:
            raise CompileError(f"{output.name} is not built: {self.compiler} says why above")


class Build(build):
    def run(self):
        # What an earlier build left would be packed too: modules that have moved, CUDA kernels.
        if Path(self.build_base) in Path(self.build_lib).parents:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        # An editable copy, which is made without this command, keeps the symbols for profilers.
        self.get_finalized_command("build_ext").strip = True
        super().run()


class BuildExtensions(build_ext):
    strip = False

    def get_ext_filename(self, name):
        if name.rpartition(".")[2] in ("libtempnet_cpu", "libtempnet_cuda"):
            return f"{name.replace('.', os.sep)}.so"
        return super().get_ext_filename(name)

    def build_extension(self, extension):
        strip = ["-Xlinker", "-s"] if self.strip else []
        if isinstance(extension, KernelLibrary):
            name = extension.name.rpartition(".")[2]
            extension.link += strip
            # Where the editable copy goes, which setuptools expects to be there.
            Path("tempnet_kernels/lib").mkdir(exist_ok=True)
            extension.build(
                Path(self.get_ext_fullpath(extension.name)), Path(self.build_temp) / name
            )
            return
        package = Path(self.get_ext_fullpath(extension.name)).parent
        extension.library_dirs.append(str(package / "lib"))
        extension.extra_link_args += strip
        super().build_extension(extension)


def cpu_library():
    link = [TORCH_LIBRARIES, "-Wl,--no-as-needed", "-ltorch_cpu", "-Wl,-soname,libtempnet_cpu.so"]
    flags = [*CXX, STABLE_ABI, *HEADERS, *SHORT_PATHS]
    compiler = os.environ.get("CXX", "g++")
    return KernelLibrary("libtempnet_cpu", sorted(glob("csrc/cpu/*.cpp")), compiler, flags, link)


def cuda_library():
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    flags = [*NVCC, STABLE_ABI, *HEADERS, *(f"-Xcompiler={flag}" for flag in SHORT_PATHS)]
    flags.append(f'-DTEMPNET_ARCHITECTURES="{wanted}"')
    for number, ptx in re.findall(r"(\d+\.\d+[af]?)(\+PTX)?", wanted):
        name = number.replace(".", "")
        codes = f"sm_{name},compute_{name}" if ptx else f"sm_{name}"
        flags.append(f"-gencode=arch=compute_{name},code=[{codes}]")
    # libtorch.so needs libtorch_cuda.so where torch has CUDA, so that this library can be made with
    # a torch that has not.
    link = ["-cudart=shared", TORCH_LIBRARIES, "-Xlinker=--no-as-needed", "-ltorch"]
    # No code of one file calls another's on the device; nvcc would write this machine's paths down.
    link += ["-Xlinker=-soname,libtempnet_cuda.so", "--no-device-link"]
    return KernelLibrary("libtempnet_cuda", sorted(glob("csrc/cuda/*.cu")), "nvcc", flags, link)


def module(name, source, library):
    return Extension(
        f"tempnet_kernels.{name}",
        [source],
        depends=glob("csrc/**/*.h", recursive=True),
        include_dirs=[pybind11.get_include()],
        extra_compile_args=[*CXX, "-g0"],
        extra_link_args=[f"-l:{library}.so", "-Wl,-rpath,$ORIGIN/lib"],
        language="c++",
    )


extensions = [cpu_library(), module("_C", "csrc/module.cpp", "libtempnet_cpu")]
if want_cuda():
    extensions += [cuda_library(), module("_C_cuda", "csrc/cuda/module.cpp", "libtempnet_cuda")]

setup(ext_modules=extensions, cmdclass={"build": Build, "build_ext": BuildExtensions})
