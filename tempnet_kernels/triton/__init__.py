"""The operators in Triton, for CUDA tensors; for CPU tensors in its interpreter
(TRITON_INTERPRET=1)."""

import contextlib

import torch


def device_of(tensor):
    """The context in which a kernel is launched on the tensor's GPU."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
