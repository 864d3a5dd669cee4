"""Time and peak memory of functions that do the same work."""

import ctypes
import gc
import multiprocessing
import os
import platform
import shutil
import subprocess
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_ms(function):
    """One call, in milliseconds: of the GPU where there is one. The result is freed outside."""
    synchronize()
    if torch.cuda.is_available():
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The GPU is busy while Python queues the call, so that it does not wait for Python.
        torch.cuda._sleep(4_000_000)
        start.record()
        result = function()
        end.record()
        end.synchronize()
        del result
        return start.elapsed_time(end)
    begin = time.perf_counter()
    result = function()
    elapsed = (time.perf_counter() - begin) * 1e3
    del result
    return elapsed


def time_in_turn(benchmark, ours, variants, rounds, clock=time_ms, **info):
    """Times ``variants``, {name: function}, by ``clock`` round by round, so that a drift of the
    machine meets all of them; ``ours`` is the one that pytest-benchmark shows. Times and ``info``
    go into the JSON."""
    times = {name: [] for name in variants}

    def once(name):
        times[name].append(clock(variants[name]))

    def others():
        for name in variants:
            if name != ours:
                once(name)

    benchmark.pedantic(lambda: once(ours), setup=others, rounds=rounds, warmup_rounds=1)
    benchmark.extra_info.update(
        environment=environment(),
        **{clock.__name__: {name: t[1:] for name, t in times.items()}},
        **info,
    )


def peak_extra_mib(function):
    """The most memory held during a call beyond what was held before, its results included."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = function()
        synchronize()
        del result
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    status = Path("/proc/self/status")
    if not status.exists():
        raise RuntimeError("peak_extra_mib: needs /proc/self/status (Linux) or a GPU")
    # The allocator keeps what earlier calls freed, and would lend it without a trace.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = _field(status, "VmRSS")
    result = function()
    del result
    return (_field(status, "VmHWM") - before) / 2**10


def peak_extra_mib_alone(function, *arguments):
    """The peak of the second call of ``function(*arguments)``, which a module must define. Without
    a GPU in a process of its own, whose allocator returns what is freed: in this one it would lend
    a call what an earlier one left."""
    if torch.cuda.is_available():
        return _peak_of_second_call(function, arguments)
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 20)  # read by the process at its start
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(_peak_of_second_call, function, arguments).result()
    finally:
        del os.environ["MALLOC_MMAP_THRESHOLD_"]


def _peak_of_second_call(function, arguments):
    call = function(*arguments)
    call()
    return peak_extra_mib(call)


def _field(status, name):
    line = next(line for line in status.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1])


def environment():
    """What a result depends on."""
    commit = ""  # of a copy without its history
    if shutil.which("git"):
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip()
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
        versions["cuda"] = torch.version.cuda
    else:
        device = f"{platform.machine()} CPU, {_simd()}, {torch.get_num_threads()} threads"
    import triton

    versions["triton"] = triton.__version__
    return {"device": device, **versions, "commit": commit}


def _simd():
    try:
        from tempnet_kernels import _C
    except ImportError:
        return "SIMD unknown"
    return _C.cpu_capability()
