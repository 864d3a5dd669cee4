"""Which backends, dtypes and SIMD levels the tests run, and where their tensors are."""

import os

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["reference", "native", "triton"]
# Of CPU tensors, where Triton runs in its interpreter only.
CPU_BACKENDS = BACKENDS[: 3 if os.environ.get("TRITON_INTERPRET") == "1" else 2]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def native_levels():
    """The SIMD levels of this processor, highest first; none where ``_C`` is not built, which alone
    can set one."""
    try:
        from tempnet_kernels import _C
    except ImportError:
        return []

    levels = ("baseline", "avx2", "avx512")
    return levels[: levels.index(_C.cpu_capability()) + 1][::-1]
