"""The library of kernels for this device: the one that is there, or built now."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

from tempnet_kernels.cli.env import library_state
from tempnet_kernels.core import register

ROOT = Path(__file__).parents[2]


def runs_on(capability, architectures):
    """Whether code for ``architectures`` ("8.0+PTX;9.0a") runs on a GPU of that capability."""
    for major, minor, exact, ptx in re.findall(r"(\d+)\.(\d+)(a?)(\+PTX)?", architectures):
        compiled = int(major), int(minor)
        same = compiled == capability if exact else compiled[0] == capability[0]
        if (same or ptx) and compiled <= capability:
            return True
    return False


def serves(device):
    """Whether the library is loaded and has code for every GPU that is there."""
    if not register.library(device).exists() or device in register.load_native():
        return False
    if device == "cpu":
        return True
    gpus = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
    return all(runs_on(gpu, register.cuda_architectures()) for gpu in gpus)


def library(device):
    if serves(device):
        return {"row": {"library": library_state(device), "built in s": None}}
    begin = time.monotonic()
    wanted = {"TEMPNET_CUDA": str(int(device == "cuda"))}
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=ROOT, check=True,
        env={**os.environ, **wanted},
    )  # fmt: skip
    register.load_native.cache_clear()
    assert device not in register.load_native(), register.load_native()[device]
    return {"row": {"library": library_state(device), "built in s": time.monotonic() - begin}}


def cases(device, part):
    yield "library", lambda: library(device)
