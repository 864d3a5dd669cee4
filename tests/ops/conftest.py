"""The backends of an op."""

import contextlib

import emulated
import pytest
import torch
from backends import BACKENDS


@pytest.fixture(params=[*BACKENDS, "emulated"])
def backend(request, monkeypatch, device):
    """A backend of the op that the folder is named after. "emulated" is native on the CPU with the
    CUDA kernels in the emulator. Where there is a GPU, tensors are made there."""
    name = request.param
    if name == "emulated":
        emulated.install(request, monkeypatch, request.path.parent.name)
        name = "native"
    with contextlib.nullcontext() if device == "cpu" else torch.device(device):
        yield name
