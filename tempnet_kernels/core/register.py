"""Operators: one schema, three backends. The only user of ``torch.library.Library``.

An operator ``tempnet::<name>`` is declared once and becomes the overloads ``.native`` (C++ or
CUDA, registered by the compiled libraries through the LibTorch stable ABI), ``.triton`` and
``.reference`` (Python, imported at the first call).
"""

import ctypes
import functools
import importlib
import importlib.machinery
import importlib.util
import os
import sys
import warnings
from pathlib import Path
from typing import Literal

import torch

BACKENDS = ("native", "triton", "reference")
Backend = Literal["auto", "native", "triton", "reference"]
# What backend="auto" takes per device type, fastest first: the first that is built. On an H100
# native is the faster for the token loss from V = 8192 on (benchmarks/results/h100/,
# benchmarks/NOTES.md); the other operators have not been measured.
AUTO = {"cpu": ("native",), "cuda": ("native", "triton")}
_BUILD = "`pip install -e .` in the repository"

_library = torch.library.Library("tempnet", "DEF")
_modules: dict[str, str] = {}
_operators: dict[tuple[str, str], torch._ops.OpOverload] = {}


def define(schema, fake, module, chunked=False):
    """Declare ``name(args) -> returns`` for every backend.

    ``fake`` computes the outputs' metadata; ``module`` is the file stem under ``triton/`` and
    ``reference/`` that holds a function called ``name``. With ``chunked`` the native and the Triton
    overload are that function of the stem under ``chunked/``, with the backend before the
    arguments: a loop around matrix products and smaller operators of that backend.
    """
    name, rest = schema.split("(", 1)
    _modules[name] = module
    for backend in BACKENDS:
        op = f"{name}.{backend}"
        _library.define(f"{op}({rest}")
        torch.library.register_fake(f"tempnet::{op}", fake, lib=_library)
        written = schema.count("!)")
        if written:
            # Library.define does not bump the version of what an op writes: a stale use would be
            # silently wrong.
            bump = _version_bump(name, backend, written)
            _library.impl(op, bump, "ADInplaceOrView", with_keyset=True)
        if chunked and backend != "reference":
            call = _lazy(name, f"chunked.{module}", backend)
            devices = ("CUDA", "CPU")
        else:
            call = _lazy(name, f"{backend}.{module}")
            anywhere = ("CompositeExplicitAutograd",)
            devices = {"native": (), "triton": ("CUDA", "CPU"), "reference": anywhere}[backend]
        for device in devices:
            _library.impl(op, call, device)
        _operators[name, backend] = getattr(getattr(torch.ops.tempnet, name), backend)


def arguments(options):
    """The fields of a NamedTuple of numbers as a schema writes them."""
    return ", ".join(f"{kind.__name__} {name}" for name, kind in options.__annotations__.items())


def _version_bump(name, backend, written):
    """The arguments that an op writes come first."""

    def call(keyset, *args):
        op = getattr(getattr(torch.ops.tempnet, name), backend)
        result = op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)
        for tensor in args[:written]:
            torch.autograd.graph.increment_version(tensor)
        return result

    return call


def _lazy(name, module, *first):
    def call(*args):
        function = getattr(importlib.import_module(f"tempnet_kernels.{module}"), name)
        tensor = args[0][0] if isinstance(args[0], list) else args[0]
        # As a kernel in C++ runs: what is within has no gradient and no versions of its own.
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return without_autocast(tensor.device.type, function, *first, *args)

    return call


def without_autocast(device, function, *args):
    """What an operator does: the caller's autocast would round what it multiplies."""
    if not torch.is_autocast_enabled(device):  # to enter a context takes longer than a launch
        return function(*args)
    with torch.autocast(device, enabled=False):
        return function(*args)


def operator(name, backend):
    """The overload of ``backend``."""
    return _operators[name, backend]


def library(device):
    """Where the library of the kernels on ``device`` ("cpu" or "cuda") is, or would be."""
    return Path(__file__).parents[1] / "lib" / f"libtempnet_{device}.so"


def hidden_installation():
    """The folder of another copy of this package, which would be imported if this one were not
    found before it, as a checkout is from within the repository; None if there is none."""
    package = __name__.partition(".")[0]
    here = Path(sys.modules[package].__file__).resolve().parent
    by_folder = importlib.machinery.PathFinder
    finders = [finder for finder in sys.meta_path if finder is not by_folder]  # of editable ones
    specs = [by_folder.find_spec(package, [folder]) for folder in sys.path]
    specs += [finder.find_spec(package, None) for finder in finders]
    for spec in specs:
        if spec is not None and spec.origin is not None:
            folder = Path(spec.origin).resolve().parent
            if folder != here:
                return folder
    return None


@functools.cache
def load_native():
    """Load the compiled libraries that are there; each registers its kernels as ``.native``.
    Returns {device: why its library, which is there, does not load}."""
    failed = {}
    for device in ("cpu", "cuda") if torch.version.cuda else ("cpu",):
        if library(device).exists():
            try:
                torch.ops.load_library(library(device))
            except OSError as error:
                failed[device] = str(error)
    return failed


def cuda_architectures():
    """What the CUDA library was compiled for, as TORCH_CUDA_ARCH_LIST writes it."""
    function = ctypes.CDLL(str(library("cuda"))).tempnet_architectures
    function.restype = ctypes.c_char_p
    return function().decode()


def missing(op, backend, device):
    """Why ``backend`` cannot run ``tempnet::op`` on ``device`` ("cpu" or "cuda"), and what to do;
    None if it can."""
    if backend == "native":
        key = "CUDA" if device == "cuda" else "CPU"
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"tempnet::{op}.native", key):
            return None
        if device in load_native():
            return f"{library(device).name} does not load: {load_native()[device]}"
        if library(device).exists():
            if device == "cuda" and not torch.version.cuda:
                return "this torch has no CUDA"
            return f"{library(device).name} has no such kernel: build it again, with {_BUILD}"
        unbuilt = f"the {'CUDA' if device == 'cuda' else 'C++'} kernels are not built"
        hidden = hidden_installation()
        if hidden is not None and (hidden / "lib" / library(device).name).exists():
            return (
                f"{unbuilt} in {library(device).parents[1]}, which hides the installed {hidden}, "
                "where they are: run from another folder"
            )
        needs = "with nvcc and a torch with CUDA, " if device == "cuda" else ""
        return f"{unbuilt}: {needs}run {_BUILD}"
    if backend == "triton":
        if importlib.util.find_spec(f"tempnet_kernels.triton.{_modules[op]}") is None:
            return "it has no Triton kernels: use backend='reference'"
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed: run `pip install triton`"
        if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return (
                "Triton runs on CPU tensors only in its interpreter: "
                "set TRITON_INTERPRET=1 before the import"
            )
    return None


_available: dict[tuple[str, str, str, str | None], str] = {}


def auto_backend(op, device):
    """The first backend of ``AUTO[device]`` that can run ``op``; the first if none can."""
    order = AUTO.get(device, ("reference",))
    return next((b for b in order if missing(op, b, device) is None), order[0])


def _found(op, backend, device, otherwise):
    """The backend that runs ``op`` on ``device`` where ``backend`` was asked for, ``otherwise`` if
    it cannot."""
    key = (op, backend, device, otherwise)
    if key not in _available:
        chosen = auto_backend(op, device) if backend == "auto" else backend
        reason = missing(op, chosen, device)
        if reason is not None:
            if otherwise is None:
                return None
            if library(device).exists():  # and is of no use, which nobody may want
                warnings.warn(f"{op} falls back to {otherwise!r}: {reason}", stacklevel=4)
            chosen = otherwise
        _available[key] = chosen
    return _available[key]


# The first call may be a compiled one, and what these remember is not to be guarded: the second
# would be compiled again. torch.compiler.assume_constant_result sets the same, and imports all of
# torch._dynamo.
for _function in (missing, _found):
    setattr(_function, "_dynamo_marked_constant", True)  # noqa: B010


def pick(function, op, backend, device, otherwise=None):
    """The backend that runs ``op`` on tensors of ``device``; ``otherwise`` where it cannot, or
    without one an error."""
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(
            f"{function}: backend must be one of {('auto', *BACKENDS)}, got {backend!r}"
        )
    chosen = _found(op, backend, device.type, otherwise)
    if chosen is None:
        chosen = auto_backend(op, device.type) if backend == "auto" else backend
        raise RuntimeError(
            f"{function}: backend {chosen!r} cannot run on {device.type} tensors: "
            f"{missing(op, chosen, device.type)}"
        )
    return chosen
