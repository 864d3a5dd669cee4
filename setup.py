"""Builds tempnet_kernels._C (CPU) and, where torch and nvcc have CUDA, tempnet_kernels._C_cuda."""

import os
import shutil
from glob import glob

import pybind11
import torch
from setuptools import setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

TORCH_TARGET = "0x020b000000000000"  # the stable ABI of torch 2.11, which later versions keep
MACROS = [
    ("TORCH_TARGET_VERSION", TORCH_TARGET),
    ("TEMPNET_TORCH_TARGET", '"2.11"'),
]
# No -ffast-math: it hides NaN. What is left lets the compiler vectorise loops that call exp2 and
# round.
CXX = ["-std=c++17", "-O3", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
CXX += ["-ffp-contract=fast", "-fvisibility=hidden", "-Wall", "-Wno-attributes"]


def want_cuda():
    wanted = os.environ.get("TEMPNET_CUDA")
    if wanted is not None:
        return wanted == "1"
    return torch.version.cuda is not None and CUDA_HOME is not None and shutil.which("nvcc")


extensions = [
    CppExtension(
        "tempnet_kernels._C",
        ["csrc/module.cpp", *sorted(glob("csrc/cpu/*.cpp"))],
        include_dirs=[pybind11.get_include()],
        define_macros=MACROS,
        extra_compile_args=CXX,
    )
]
cuda_sources = sorted(glob("csrc/cuda/*.cu"))
if cuda_sources and want_cuda():
    extensions.append(
        CUDAExtension(
            "tempnet_kernels._C_cuda",
            ["csrc/cuda/module.cpp", *cuda_sources],
            include_dirs=[pybind11.get_include()],
            define_macros=[*MACROS, ("USE_CUDA", None)],
            extra_compile_args={"cxx": CXX, "nvcc": ["-std=c++17", "-O3"]},
        )
    )

setup(ext_modules=extensions, cmdclass={"build_ext": BuildExtension})
