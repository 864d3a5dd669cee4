"""What nothing on this device can be faster than: bandwidth of a copy, matrix products, a launch,
and the host's share of a call."""

import time
from statistics import median

import torch
from measure import time_ms


def copy(device):
    source = torch.randn((1 << 30 if device == "cuda" else 1 << 24) // 4, device=device)
    target = torch.empty_like(source)
    time_ms(lambda: target.copy_(source))
    ms = median(time_ms(lambda: target.copy_(source)) for _ in range(7))
    return {"row": {"value": 2 * source.nbytes / ms / 1e6, "unit": "GB/s, read and written"}}


def product(device, dtype):
    n = (8192 if dtype == torch.bfloat16 else 4096) if device == "cuda" else 512
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    time_ms(lambda: a @ b)
    ms = median(time_ms(lambda: a @ b) for _ in range(7))
    return {"row": {"value": 2 * n**3 / ms / 1e9, "unit": f"TFLOP/s at {n}^3"}}


def launches(device):
    if device == "cpu":
        return {"status": "unable", "error": "a CPU launches nothing"}
    count = 1000

    def many():
        for _ in range(count):
            torch.cuda._sleep(0)  # an empty kernel

    many()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        many()
    graph.replay()
    queued = median(time_ms(many) for _ in range(5)) / count
    replayed = median(time_ms(graph.replay) for _ in range(5)) / count
    unit = f"us per empty kernel; in a graph {1e3 * replayed:.2f}"
    return {"row": {"value": 1e3 * queued, "unit": unit}}


def host(device):
    """Far fewer calls than the queue of a GPU holds."""
    x, count = torch.zeros(1, device=device), 500
    times = []
    for _ in range(7):
        torch.cuda.synchronize() if device == "cuda" else None
        begin = time.perf_counter()
        for _ in range(count):
            x.add_(1)
        times.append((time.perf_counter() - begin) / count)
    return {"row": {"value": 1e6 * median(times), "unit": "us of the host per eager x.add_(1)"}}


def cases(device, part):
    yield "copy", lambda: copy(device)
    yield "bfloat16 product", lambda: product(device, torch.bfloat16)
    yield "float32 product", lambda: product(device, torch.float32)
    yield "launch", lambda: launches(device)
    yield "host", lambda: host(device)
