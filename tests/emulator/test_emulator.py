"""The emulator must see planted faults."""

import math
import subprocess
import sys
from pathlib import Path

import emulated
import pytest
from emulated import ORDERS


@pytest.mark.parametrize("order", ORDERS)
def test_emulator_sees_a_missing_barrier(module, order):
    module.set_order(order, 3)
    right = [float(63 - i) for i in range(64)]
    assert module.reverse_blocks(False) == right
    assert module.reverse_blocks(True) != right


def test_emulator_sees_a_divergent_barrier(module):
    assert module.divergent_barrier(False) == [1.0] * 64
    with pytest.raises(RuntimeError, match="divergent __syncthreads: threads wait at lines"):
        module.divergent_barrier(True)


def test_emulator_sees_a_thread_that_leaves_before_a_barrier(module):
    assert module.early_exit(False) == [1.0] * 64
    with pytest.raises(RuntimeError, match="deadlock: 63 threads wait at a __syncthreads, 1 "):
        module.early_exit(True)


def test_emulator_sees_a_bulk_copy_that_is_not_waited_for(module):
    assert module.copy_through_shared(False) == [float(i) for i in range(64)]
    assert all(math.isnan(x) for x in module.copy_through_shared(True))


def test_emulator_sees_writes_past_shared_memory(module):
    module.overrun(66)  # 64 floats and the barrier
    with pytest.raises(RuntimeError, match="out-of-bounds write of shared memory at offset 264"):
        module.overrun(67)
    # Past the page it is a fault, which ends the process.
    code = "import emulated; emulated.load().overrun(2000)"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(emulated.__file__).parent,
    )
    assert result.returncode == 86 and "out of bounds" in result.stderr
