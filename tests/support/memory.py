"""Peak memory on the CPU, as the operating system counts it; each case in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"  # measure.py

needs_linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs /proc/self/clear_refs (Linux)"
)


def printed_by(code):
    """The numbers that the code prints."""
    code = f"import sys\nsys.path.insert(0, {str(BENCHMARKS)!r})\n{code}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    print(result.stdout)
    return [float(x) for x in result.stdout.split()]
