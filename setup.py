"""Builds the kernels and the two pybind11 modules that ask them things.

The kernels are shared libraries without Python, tempnet_kernels/lib/libtempnet_cpu.so and, where
torch and nvcc have CUDA or TEMPNET_CUDA=1, libtempnet_cuda.so: any Python and any torch from 2.11
on loads them. The modules tempnet_kernels._C and ._C_cuda link to them.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

import pybind11
import torch
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # of torch 2.11; later versions keep it
# No -ffast-math: it hides NaN. What is left lets the compiler vectorise loops that call exp2 and
# round.
CXX = ["-std=c++17", "-O3", "-fPIC", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
CXX += ["-ffp-contract=fast", "-fvisibility=hidden", "-Wall", "-Wno-attributes"]
NVCC = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-DUSE_CUDA"]
# Machine code for 8.x and 9.0, and PTX that a driver compiles for what is newer.
ARCHITECTURES = "8.0+PTX;9.0a"

INCLUDE = Path(torch.__path__[0]) / "include"
HEADERS = [f"-I{INCLUDE}", f"-I{INCLUDE}/torch/csrc/api/include"]
TORCH_LIBRARIES = f"-L{Path(torch.__path__[0]) / 'lib'}"


def want_cuda():
    wanted = os.environ.get("TEMPNET_CUDA")
    if wanted is not None:
        return wanted == "1"
    return torch.version.cuda is not None and shutil.which("nvcc") is not None


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
        subprocess.run([sys.executable, "-m", "ninja", "--quiet", "-C", str(directory)], check=True)


class BuildExtensions(build_ext):
    def get_ext_filename(self, name):
        if name.rpartition(".")[2] in ("libtempnet_cpu", "libtempnet_cuda"):
            return f"{name.replace('.', os.sep)}.so"
        return super().get_ext_filename(name)

    def build_extension(self, extension):
        if isinstance(extension, KernelLibrary):
            name = extension.name.rpartition(".")[2]
            # Where the editable copy goes, which setuptools expects to be there.
            Path("tempnet_kernels/lib").mkdir(exist_ok=True)
            extension.build(
                Path(self.get_ext_fullpath(extension.name)), Path(self.build_temp) / name
            )
            return
        package = Path(self.get_ext_fullpath(extension.name)).parent
        extension.library_dirs.append(str(package / "lib"))
        super().build_extension(extension)


def cpu_library():
    link = [TORCH_LIBRARIES, "-Wl,--no-as-needed", "-ltorch_cpu", "-Wl,-soname,libtempnet_cpu.so"]
    flags = [*CXX, STABLE_ABI, *HEADERS]
    compiler = os.environ.get("CXX", "g++")
    return KernelLibrary("libtempnet_cpu", sorted(glob("csrc/cpu/*.cpp")), compiler, flags, link)


def cuda_library():
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    flags = [*NVCC, STABLE_ABI, *HEADERS, f'-DTEMPNET_ARCHITECTURES="{wanted}"']
    for number, ptx in re.findall(r"(\d+\.\d+[af]?)(\+PTX)?", wanted):
        name = number.replace(".", "")
        codes = f"sm_{name},compute_{name}" if ptx else f"sm_{name}"
        flags.append(f"-gencode=arch=compute_{name},code=[{codes}]")
    # libtorch.so needs libtorch_cuda.so where torch has CUDA, so that this library can be made with
    # a torch that has not.
    link = ["-cudart=shared", TORCH_LIBRARIES, "-Xlinker=--no-as-needed", "-ltorch"]
    link += ["-Xlinker=-soname,libtempnet_cuda.so"]
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

setup(ext_modules=extensions, cmdclass={"build_ext": BuildExtensions})
