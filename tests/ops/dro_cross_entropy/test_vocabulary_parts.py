"""The operators on a part of the vocabulary, in one process: parts put together against the fused
operator and the definition."""

import math

import compare
import emulated
import pytest
import torch
from backends import CPU_BACKENDS, DTYPES
from vocabulary import RHO, make

from tempnet_kernels.chunked import dro_cross_entropy as sharded
from tempnet_kernels.core import register
from tempnet_kernels.core.fields import TokenOptions, TokenPart


@pytest.fixture
def emulator():
    """Threads in a random order: one that reads what another has overwritten is seen."""
    module = emulated.load()
    module.set_order("random", 1)
    yield module
    module.set_order("forward", 0)


@pytest.fixture(params=[*CPU_BACKENDS, "emulated slices", "emulated rows"])
def op(request):
    """name -> operator of the backend. "emulated": the CUDA kernels, with rows in slices, as where
    they are few, or whole."""
    if request.param.startswith("emulated"):
        operators = emulated.Operators(request.getfixturevalue("emulator"))
        operators.multiprocessors = 132 if "slices" in request.param else 1
        return lambda name: operators(name, "native")
    return lambda name: register.operator(name, request.param)


@pytest.mark.parametrize(
    "label_smoothing, want_argmax, softcap",
    [(0.0, False, 0.0), (0.0, True, 0.0), (0.1, True, 0.0), (0.0, False, 5.0), (0.1, True, 5.0)],
)
@pytest.mark.parametrize("v", [4, 132, 36004])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merged_parts_are_the_fused_result(op, dtype, v, label_smoothing, want_argmax, softcap):
    """And the gradient of a part is the part of the gradient, in place and not, at any alignment,
    for int32 targets."""
    logits, target, tau, scale = make(3, v, dtype)
    options = -100, label_smoothing, 1e-2, softcap
    fused = register.operator("dro_cross_entropy_fwd", "reference")
    plain = fused(logits.float(), target, tau, scale, RHO, *options, True, want_argmax)
    exact = fused(
        logits.double(),
        target,
        tau.double(),
        scale.double(),
        RHO,
        *options,
        True,
        want_argmax,
    )
    for world_size in (1, 2, 4):
        width = v // world_size
        columns = [(begin, v) for begin in range(0, v, width)]
        shards = [logits[:, b : b + width] for b, _ in columns]
        parts = [
            op("dro_cross_entropy_stats")(
                z, target.int(), tau, -100, softcap, *place, label_smoothing > 0, want_argmax
            )
            for z, place in zip(shards, columns, strict=True)
        ]
        loss, rows, argmax = sharded.merged(
            *map(torch.stack, zip(*parts, strict=True)),
            target,
            tau,
            scale,
            TokenOptions(RHO, *options),
            v,
        )
        got, want, close = ((x[1], *lse_first(x[2])) for x in ((0, loss, rows), exact, plain))
        for g, e, p in zip(got, want, close, strict=True):
            compare.assert_within_twice_plain(g, e, p)
        assert torch.equal(argmax, exact[3])
        args = target.int(), tau, scale, rows, *options
        grads = [
            op("dro_cross_entropy_bwd")(z, *args, *place)
            for z, place in zip(shards, columns, strict=True)
        ]
        rounded = plain[0].to(dtype)
        compare.assert_within_twice_plain(torch.cat(grads, 1), exact[0], rounded, "grad_logits")
        for z, place, grad in zip(shards, columns, grads, strict=True):
            wide = torch.full((3, width + 9), math.nan, dtype=dtype)
            wide[:, 1:-8] = z
            op("dro_cross_entropy_bwd_")(wide[:, 1:-8], *args, *place)
            assert torch.equal(wide[:, 1:-8], grad)
            assert wide[:, 0].isnan().all() and wide[:, -8:].isnan().all()


def lse_first(rows):
    """The statistics of the rows that are not ignored, with the base-2 state as one number."""
    loss, grad_tau, m, log2_s, entropy, log_prob = rows[:, [0, 2]]
    return loss, grad_tau, (m.double() + log2_s.double()).to(m.dtype), entropy, log_prob


def test_targets_of_parts_on_a_gpu_are_nan_where_they_are_of_none(emulator):
    """No out-of-bounds read: the emulator would see it."""
    operators = emulated.Operators(emulator)
    logits, target, tau, scale = make(5, 40)
    target[2], target[3] = 80, 2**40
    columns = 40, 80
    parts, argmax = operators.dro_cross_entropy_stats(
        logits, target, tau, -100, 0.0, *columns, True, True
    )
    assert parts.isnan().all(0).tolist() == [False, True, True, True, False]
    assert argmax.tolist()[1:4] == [-1] * 3 and (argmax[[0, 4]] >= 40).all()
    assert (parts[TokenPart.Z_Y, [0, 4]] == -math.inf).all()  # their columns are the other rank's
    grad = operators.dro_cross_entropy_bwd(
        logits, target, tau, scale, torch.zeros(6, 5), -100, 0.0, 0.0, 0.0, *columns
    )
    assert (grad[1] == 0).all() and grad[2:4].isnan().all() and grad[[0, 4]].isfinite().all()
