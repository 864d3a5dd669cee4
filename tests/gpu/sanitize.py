"""NVIDIA's compute-sanitizer over every CUDA kernel on small shapes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

SHAPES = Path(__file__).with_name("small_shapes.py")


def sanitize(tool, device):
    if device == "cpu":
        return {"status": "unable", "error": "compute-sanitizer checks kernels on a GPU"}
    if shutil.which("compute-sanitizer") is None:
        return {"status": "unable", "error": "compute-sanitizer is not on the PATH"}
    # initcheck must see torch's kernels, too: they initialise what ours read.
    ours = [] if tool == "initcheck" else ["--kernel-name", "kns=tempnet"]
    # Every allocation on its own, so that an access past its end is seen.
    variables = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = ["compute-sanitizer", "--tool", tool, *ours, "--error-exitcode", "9"]
    result = subprocess.run(
        [*command, sys.executable, str(SHAPES)], env=variables, capture_output=True, text=True
    )
    print(result.stdout[-20_000:], result.stderr[-5_000:])
    said = [line for line in result.stdout.splitlines() if line.startswith("=========")]
    if "Device not supported" in result.stdout:
        return {"status": "unable", "error": "compute-sanitizer: device not supported"}
    if result.returncode:
        found = next((x for x in said if "Invalid" in x or "Error" in x or "hazard" in x), "")
        found = found or (result.stderr.splitlines() or [""])[-1]
        return {"status": "wrong", "error": f"exit status {result.returncode}: {found[:200]}"}
    return {"row": {"said": said[-1].strip("= ") if said else ""}}


def cases(device, part):
    for tool in ("memcheck", "racecheck", "initcheck"):
        yield tool, lambda tool=tool: sanitize(tool, device)
