"""The constants that only a GPU can choose, best first: tiles of the contrastive loss, chunks of
the linear one, and the Triton kernels' blocks and warps. Each is set, timed and put back.

    python scripts/gpu_check.py --only sweep --out DIR --device cuda
"""

import functools
import importlib
import itertools
import math
import time
from statistics import median
from unittest import mock

import bench_dro_contrastive as contrastive
import bench_dro_cross_entropy as token
import bench_linear_dro_cross_entropy as linear
import torch
from measure import time_ms

from tempnet_kernels import (
    dro_contrastive,
    dro_cross_entropy,
    optimal_temperature,
    tempered_softmax,
)
from tempnet_kernels.chunked import dro_contrastive as chunked_contrastive
from tempnet_kernels.chunked import linear_dro_cross_entropy as chunked_linear
from tempnet_kernels.core import register
from tempnet_kernels.ops import linear_dro_cross_entropy as linear_op

SECONDS = 9  # of a case; what was not reached is said
MIB = 1 << 20


def best_first(settings, run, default):
    """``settings``: {label: a context manager that sets it}. Times ``run`` under each."""
    begin, ms, failed = time.monotonic(), {}, {}
    for label, setting in settings.items():
        if time.monotonic() - begin > SECONDS:
            failed[label] = "no time"
            continue
        try:
            with setting:
                run()  # compiles
                ms[label] = median(time_ms(run) for _ in range(5))
        except Exception as error:  # a block that does not compile or does not fit
            failed[label] = type(error).__name__
            print(label, error)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    best = min(ms.values(), default=math.nan)
    rows = {
        label + (" (default)" if label == default else ""): {"ms": x, "x best": x / best}
        for label, x in sorted(ms.items(), key=lambda item: item[1])
    }
    return {"rows": rows | {label: {"failed": why} for label, why in failed.items()}}


def constant(module, device, **values):
    """A dict by device type, ``module.NAME``, with another value."""
    return mock.patch.multiple(
        module, **{k: {**getattr(module, k), device: v} for k, v in values.items()}
    )


def tiles(device, backend):
    b, d, dtype = (16384, 768, torch.bfloat16) if device == "cuda" else (48, 8, torch.float32)
    image, text, *taus = contrastive.make(b, d, dtype, 0)

    def run():
        loss = dro_contrastive(image, text, *taus, 7.0, backend=backend)
        torch.autograd.grad(loss, (image, text, *taus))

    rows = (1024, 2048, 4096, 8192) if device == "cuda" else (16, 32)
    sizes = (16, 32, 64, 128, 256) if device == "cuda" else (1,)
    settings = {
        f"{height} rows, {mib} MiB": constant(
            chunked_contrastive, device, TILE_ROWS=height, TILE_BYTES=mib * MIB
        )
        for height, mib in itertools.product(rows, sizes)
    }
    height = chunked_contrastive.TILE_ROWS[device]
    size = chunked_contrastive.TILE_BYTES[device] // MIB
    return best_first(settings, run, f"{height} rows, {size} MiB")


def chunks(device, frozen):
    if device == "cuda":
        shape, sizes = (8192, 128256, 4096, torch.bfloat16), (64, 128, 256, 512, 1024, 2048)
    else:
        shape, sizes = (16, 200, 8, torch.float32), (1, 2)
    tensors = linear.make(*shape, frozen)
    name = "CHUNK_BYTES_WITHOUT_WEIGHT" if frozen else "CHUNK_BYTES"
    settings = {f"{mib} MiB": constant(linear_op, device, **{name: mib * MIB}) for mib in sizes}
    default = f"{getattr(linear_op, name)[device] // MIB} MiB"
    return best_first(settings, lambda: linear.step(linear.OURS, *tensors), default)


def fold(device):
    shape = (
        (8192, 128256, 4096, torch.bfloat16) if device == "cuda" else (16, 200, 8, torch.float32)
    )
    tensors = linear.make(*shape, True)
    sizes = (16, 32, 64, 128, 256, 512, 1024) if device == "cuda" else (1, 16)
    settings = {
        f"{mib} MiB": constant(chunked_linear, device, FOLD_BYTES=mib * MIB) for mib in sizes
    }
    default = f"{chunked_linear.FOLD_BYTES[device] // MIB} MiB"
    return best_first(settings, lambda: linear.step(linear.OURS, *tensors), default)


def triton_module(name):
    """Imported at the first call elsewhere."""
    return importlib.import_module(f"tempnet_kernels.triton.{name}")


def patches(device, which):
    """Rows, strip and chunk of a Triton program of the contrastive loss."""
    module = triton_module("dro_contrastive")
    m = n = 8192 if device == "cuda" else 64
    similarity = torch.rand(m, n, device=device) * 0.5
    states, parameters = (torch.zeros(k, m, device=device) for k in (5, 3))
    at, empty = torch.arange(m, device=device), torch.empty(0, device=device)
    ids, mask = empty.int(), torch.empty(0, 0, dtype=torch.bool, device=device)
    a = torch.full((m,), 15.0, device=device)
    weights = torch.empty(m, n, dtype=torch.bfloat16, device=device)

    def stats():
        op = register.operator("similarity_stats_", "triton")
        op(states, states.clone(), similarity, 0, 0, a, a, at, ids, mask, False)

    def weigh():
        op = register.operator("similarity_weights_", "triton")
        op(weights, similarity, 0, 0, parameters, parameters, at, ids, mask, False)

    run, values = {
        "STATS": (
            stats,
            [(r, s, c) for r in (8, 16, 32, 64) for s in (128, 256) for c in (128, 256)],
        ),
        "WEIGHTS": (
            weigh,
            [(r, s, c) for r in (4, 8, 16) for s in (128, 256, 512) for c in (32, 64)],
        ),
    }[which]
    if device == "cpu":
        values = values[-2:]
    names = ("ROWS", "STRIP", "CHUNK")
    default = tuple(getattr(module, which)[k] for k in names)
    # The likely ones first: the compiler takes a second or two for each.
    values = sorted(
        {*values, default},
        key=lambda v: sum(abs(math.log2(x / y)) for x, y in zip(v, default, strict=True)),
    )
    settings = {
        "x".join(map(str, v)): mock.patch.object(module, which, dict(zip(names, v, strict=True)))
        for v in values
    }
    return best_first(settings, run, "x".join(map(str, default)))


def blocks(device, op, v):
    """(block, warps) of the Triton kernels that walk over rows."""
    module = triton_module(op)
    n, dtype = (8192, torch.bfloat16) if device == "cuda" else (4, torch.float32)
    logits, target, tau = token.make(n, v, dtype)

    def both(x):
        return torch.autograd.grad(x, (logits, tau), torch.ones_like(x))

    run = {
        "dro_cross_entropy": lambda: both(
            dro_cross_entropy(logits, target, tau, 8.0, backend="triton")
        ),
        "tempered_softmax": lambda: both(tempered_softmax(logits, tau, backend="triton")),
        "optimal_temperature": lambda: optimal_temperature(
            logits.detach(), 4.0, 0.05, 5.0, backend="triton"
        ),
    }[op]
    config = module.config
    extra = {"dro_cross_entropy": (False,), "tempered_softmax": ("forward",)}.get(op, ())
    kernel, block, warps = config(v, *extra)
    held = kernel is True or getattr(kernel, "__name__", "") == "one_pass_kernel"
    pairs = [(block, w) for w in (4, 8, 16, 32)]
    if not held:
        pairs = [(b, w) for b in (2048, 4096, 8192, 16384) for w in (4, 8, 16, 32)]
    if device == "cpu":
        pairs = [(block, warps)]
    settings = {
        f"block {b}, {w} warps": mock.patch.object(
            module, "config", lambda v, *extra, b=b, w=w: (config(v, *extra)[0], b, w)
        )
        for b, w in sorted(
            pairs, key=lambda x: abs(math.log2(x[0] / block)) + abs(math.log2(x[1] / warps))
        )
    }
    return best_first(settings, run, f"block {block}, {warps} warps")


def cases(device, part):
    yield "tiles, native", functools.partial(tiles, device, "native")
    yield "chunks", functools.partial(chunks, device, False)
    yield "chunks, frozen", functools.partial(chunks, device, True)
    yield "fold", functools.partial(fold, device)
    for which in ("STATS", "WEIGHTS"):
        yield f"Triton {which} of a tile", functools.partial(patches, device, which)
    yield "tiles, Triton", functools.partial(tiles, device, "triton")
    for op in ("tempered_softmax", "optimal_temperature", "dro_cross_entropy"):
        for v in (32000, 128256) if device == "cuda" else (200,):
            yield f"Triton {op}, V = {v}", functools.partial(blocks, device, op, v)
