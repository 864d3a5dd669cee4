"""Which backend is taken, what the import needs, and that the public names are documented."""

import inspect
import subprocess
import sys

import torch

import tempnet_kernels
from tempnet_kernels.core import register


def test_import_needs_neither_triton_nor_the_extension():
    """Each missing backend raises when it is asked for, and says how to get it."""
    code = """
import importlib.util, pathlib, sys
find, exists = importlib.util.find_spec, pathlib.Path.exists
importlib.util.find_spec = lambda name, *a: None if name == "triton" else find(name, *a)
pathlib.Path.exists = lambda path: "libtempnet" not in path.name and exists(path)
sys.modules["triton"] = None
import torch, tempnet_kernels
z, y = torch.randn(2, 5), torch.tensor([1, 2])
print(tempnet_kernels.dro_cross_entropy(z, y, backend="reference").item())
for backend in ("auto", "native", "triton"):
    try:
        tempnet_kernels.dro_cross_entropy(z, y, backend=backend)
    except RuntimeError as error:
        print(backend, error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert "pip install -e ." in lines[1] and lines[1].startswith("auto")
    assert "pip install -e ." in lines[2]
    assert "pip install triton" in lines[3]


def test_auto_takes_the_first_backend_that_is_built(monkeypatch):
    chosen = {}
    for built in ({"native", "triton"}, {"triton"}, set()):
        monkeypatch.setattr(
            register, "missing", lambda op, b, d, built=built: None if b in built else "not built"
        )
        for device in ("cpu", "cuda"):
            chosen[device, len(built)] = register.auto_backend("op", device)
    assert [chosen["cuda", n] for n in (2, 1, 0)] == ["native", "triton", "native"]
    assert [chosen["cpu", n] for n in (2, 1, 0)] == ["native"] * 3  # slow Triton is no fallback


def test_the_definition_runs_on_any_device():
    """Also one that has no kernels here: a network needs it there."""
    for op in register._modules:
        for key in ("CPU", "CUDA", "MPS", "XPU"):
            name = f"tempnet::{op}.reference"
            assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(name, key), (op, key)


def public_callables():
    """(name, function) of the package and of nn, and of the classes' own methods."""
    for module in (tempnet_kernels, tempnet_kernels.nn):
        for name in module.__all__:
            x = getattr(module, name)
            if inspect.isfunction(x):
                yield name, x
            elif inspect.isclass(x) and issubclass(x, torch.nn.Module):
                for method, y in vars(x).items():
                    if inspect.isfunction(y) and (method == "__init__" or method[0] != "_"):
                        yield f"{name}.{method}", y


def test_public_names_are_documented():
    for module in (tempnet_kernels, tempnet_kernels.nn):
        for name in module.__all__:
            assert getattr(module, name).__doc__, name


def test_public_signatures_are_typed():
    found = dict(public_callables())
    assert {"dro_contrastive", "load_tempnet", "TempNet.__init__", "TempNet.forward"} <= set(found)
    for name, function in found.items():
        signature = inspect.signature(function)
        for parameter in list(signature.parameters.values())["." in name :]:
            assert parameter.annotation is not parameter.empty, f"{name}: {parameter}"
        assert signature.return_annotation is not signature.empty, name
