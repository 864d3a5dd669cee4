"""What `import tempnet_kernels` costs beyond `import torch`."""

import subprocess
import sys

CODE = """
import time, torch
begin = time.process_time()
import tempnet_kernels
print(time.process_time() - begin)
"""
HEAVY = {"torch._dynamo", "torch._inductor", "triton", "typer", "rich", "safetensors", "numpy"}


def imported_after_torch():
    """(seconds of processor time, {module: microseconds with what it imports})"""
    command = [sys.executable, "-X", "importtime", "-c", CODE]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [line.split("|") for line in result.stderr.splitlines() if line.count("|") == 2]
    modules = {name.strip(): int(time) for _, time, name in rows if time.strip().isdigit()}
    names = list(modules)
    begin = names.index("torch") + 1  # a module stands behind those that it imports
    return float(result.stdout), {name: modules[name] for name in names[begin:]}


def test_import_costs_at_most_150_ms_beyond_torch():
    """Of processor time: other processes of the tests take turns with this one."""
    runs = [imported_after_torch() for _ in range(3)]
    seconds, modules = min(runs, key=lambda run: run[0])
    longest = sorted(modules.items(), key=lambda item: -item[1])[:8]
    assert "tempnet_kernels.ops.dro_cross_entropy" in modules
    assert not HEAVY & modules.keys()
    assert seconds <= 0.15, f"{seconds:.3f} s, longest: {longest}"
