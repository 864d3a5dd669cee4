"""Nothing on a GPU waits for the host, or takes a tensor from it, but what says so."""

import json
import subprocess
import sys

import fake_gpu
import pytest

FUNCTIONS = list(dict.fromkeys(name.split("(")[0] for name in fake_gpu.CASES))
WAITS = [name for name in FUNCTIONS if name.startswith("waits_for")]


@pytest.fixture(scope="module")
def found():
    """{case: what was found}, of one process for all."""
    done = subprocess.run(
        [sys.executable, fake_gpu.__file__], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == fake_gpu.CASES.keys()
    return found


@pytest.mark.parametrize("function", [name for name in FUNCTIONS if name not in WAITS])
def test_stays_on_the_device_without_waiting_for_it(found, function):
    wrong = {k: v for k, v in found.items() if k.split("(")[0] == function and v}
    assert not wrong, json.dumps(wrong, indent=1)


@pytest.mark.parametrize("function", WAITS)
def test_what_is_documented_to_wait_is_seen_to(found, function):
    assert [x for x in found[function + "()"] if x.startswith("the host reads a value")]
