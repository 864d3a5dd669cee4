"""The token loss whose columns several gloo processes share against one process and the
definition."""

import copy
import math
from unittest import mock

import compare
import pytest
import torch
from backends import CPU_BACKENDS, DTYPES
from processes import error_of
from vocabulary import RHO, check, expected, make, own_columns, visit

from tempnet_kernels import dro_cross_entropy
from tempnet_kernels.chunked import dro_cross_entropy as sharded
from tempnet_kernels.core import collectives
from tempnet_kernels.core.fields import TokenOptions
from tempnet_kernels.nn import DROCrossEntropyLoss, TempNet, TempNetCrossEntropyLoss

INF = math.inf


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_ranks_are_one_process_with_all_columns(gloo, backend, world_size, dtype, reduction):
    tensors = make(dtype=dtype)
    p = torch.softmax(tensors[0].double() / tensors[2].double()[:, None], 1)
    assert ((p > 0.01) & (p < 0.99)).any(), "a trivial softmax would prove nothing"
    check(gloo, world_size, tensors, backend=backend, reduction=reduction)
    tensors = *make(dtype=dtype)[:3], None
    check(
        gloo, world_size, tensors, backend=backend, reduction=reduction, label_smoothing=0.2,
        z_loss=1e-2,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_the_gradient_in_place_of_the_logits(gloo, backend, dtype):
    """Also: rows longer than the columns, and a normalizer."""
    tensors = make(dtype=dtype)
    options = {"backend": backend, "overwrite_logits": True}
    check(gloo, 2, tensors, padded=True, **options, z_loss=1e-2, label_smoothing=0.1)
    check(gloo, 4, tensors, padded=True, **options, normalizer=3.0)
    check(gloo, 4, tensors, **options, reduction="sum")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_ranks_cap_their_logits(gloo, backend, dtype):
    """Also: which of the logits that tanh makes equal is the largest, in columns of two ranks."""
    tensors = make(dtype=dtype, spread=6.0)
    tensors[0][2, 10], tensors[0][2, 40] = 300, 301
    options = {"backend": backend, "softcap": 5.0}
    check(gloo, 2, tensors, **options, z_loss=1e-2, label_smoothing=0.1, reduction="none")
    check(gloo, 4, tensors, padded=True, **options, overwrite_logits=True)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_float64_is_as_close_as_one_process(gloo, backend, overwrite):
    tensors = make(dtype=torch.float64)
    formula = {"label_smoothing": 0.1, "z_loss": 1e-3}
    options = formula | {"backend": backend, "overwrite_logits": overwrite}
    exact = expected(*tensors, torch.float64, **formula)
    (one,) = gloo.run(1, visit, *tensors, options)
    results = gloo.run(4, visit, *tensors, options)
    got = results[0][0], torch.cat([r[1] for r in results], 1), *results[0][2:4]
    for g, e, p in zip(got, exact, one, strict=False):
        assert g.dtype == torch.float64
        compare.assert_within_twice_plain(g, e, p)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_rows_of_several_dimensions_and_blocks(gloo, backend):
    logits, target, tau, weight = make(6, 4 * 4500, torch.bfloat16)
    shape = (2, 3)
    tensors = logits.view(2, 3, -1), *(x.view(shape) for x in (target, tau, weight))
    check(gloo, 4, tensors, backend=backend, reduction="none", label_smoothing=0.1)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_offset_logits_and_small_temperatures_are_as_close_as_one_process(gloo, backend):
    """The plain formula has lost these digits; a merge that cancels would, too."""
    logits, target, tau, _ = make(5, 2000, spread=0.1)
    tensors = (logits + 1e4, target, tau / 100, None)
    (one,) = gloo.run(1, visit, *tensors, {"backend": backend, "reduction": "none"})
    results = gloo.run(4, visit, *tensors, {"backend": backend, "reduction": "none"})
    loss, grad, grad_tau, _ = expected(*tensors, torch.float64, reduction="none")
    log_prob = torch.log_softmax(tensors[0].double() / tensors[2].double()[:, None], 1)
    log_prob = log_prob.gather(1, target.clamp(min=0)[:, None])[:, 0]
    live = target != -100
    assert ((log_prob[live] > -20) & (log_prob[live] < -0.1)).any()
    whole = torch.cat([result[1] for result in results], 1)
    compare.assert_within_twice_plain(whole, grad, one[1], "grad_logits")
    for i, e in ((0, loss), (2, grad_tau)):
        compare.assert_within_twice_plain(results[0][i], e, one[i])
    got, plain = results[0][4].log_prob[live], one[4].log_prob[live]
    compare.assert_within_twice_plain(got, log_prob[live], plain, "log_prob")


def scaled_fp16(group, logits, target, scale):
    leaf = own_columns(logits, group).clone().requires_grad_()
    loss = dro_cross_entropy(
        leaf * 1, target, normalizer=2.0**20, overwrite_logits=True, process_group=group
    )
    (loss * scale).backward()
    return leaf.grad


def test_fp16_gradients_survive_a_normalizer_that_underflows(gloo):
    """A loss scale brings them back, as without a group."""
    logits, target, *_ = make(dtype=torch.float16)
    got = torch.cat(gloo.run(2, scaled_fp16, logits, target, 2.0**20), 1)
    whole = logits.clone().requires_grad_()
    (dro_cross_entropy(whole, target, normalizer=2.0**20) * 2.0**20).backward()
    assert whole.grad.abs().max() > 0.1
    torch.testing.assert_close(got, whole.grad, rtol=2e-3, atol=2e-3)


# What goes over the wire.


def exchanged(group, dtype, return_stats, reduction):
    """Bytes of each collective of a step, by rank."""
    sizes, own = [], collectives.all_gather_into

    def count(gathered, x, group):
        sizes.append(x.numel() * x.element_size())
        return own(gathered, x, group=group)

    logits, target, *_ = make(100, 64, dtype)
    leaf = own_columns(logits, group).clone().requires_grad_()
    with mock.patch.object(collectives, "all_gather_into", count):
        out = dro_cross_entropy(
            leaf, target, return_stats=return_stats, reduction=reduction, process_group=group
        )
        (out[0] if return_stats else out).sum().backward()
    return sizes


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_one_collective_of_some_bytes_per_row(gloo, dtype, reduction):
    size = 8 if dtype == torch.float64 else 4
    for stats, words in ((False, 7), (True, 8)):
        for sizes in gloo.run(2, exchanged, dtype, stats, reduction):
            assert sizes == [(100 * words + 1) * size]


# Odd input.


def odd(group, logits, target, tau, options):
    loss, *rest = visit(group, logits, target, tau, None, options | {"reduction": "none"})
    return loss, *rest


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_columns_of_a_rank_that_are_all_minus_inf(gloo, backend):
    tensors = make()
    logits = tensors[0]
    logits[0, 11:] = -INF  # of every rank but one
    logits[3, 22:33] = -INF  # that of the third
    tensors[1][3] = 5
    got, _ = check(gloo, 4, tensors, backend=backend)
    assert (got[1][logits == -INF] == 0).all()
    logits[4] = -INF
    results = gloo.run(4, odd, *tensors[:3], {"backend": backend})
    for loss, _, grad_tau, _, stats in results:
        assert loss.isnan().tolist() == [i == 4 for i in range(7)]
        assert grad_tau.isnan().tolist() == [i == 4 for i in range(7)]
        assert stats.argmax[4] == -1 and (stats.argmax[[0, 2, 3, 5, 6]] >= 0).all()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_minus_inf_target_or_smoothed_column_gives_inf_loss(gloo, backend):
    logits, target, tau, _ = make()
    logits[0, target[0]] = -INF
    logits[2, 0] = -INF  # the first column of a rank
    smoothing = {"backend": backend, "label_smoothing": 0.1}
    for options, bad in (({"backend": backend}, [0]), (smoothing, [0, 2])):
        for loss, grad, *_ in gloo.run(2, odd, logits, target, tau, options):
            assert (loss == INF).nonzero().flatten().tolist() == bad
            assert loss.isfinite().sum() == 7 - len(bad) and grad.isfinite().all()


@pytest.mark.parametrize("value", [math.nan, INF])
@pytest.mark.parametrize("column", [0, 21, 43])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_nan_or_inf_on_one_rank_reaches_its_row_on_all(gloo, backend, column, value):
    logits, target, tau, _ = make()
    clean = gloo.run(4, odd, logits, target, tau, {"backend": backend})
    logits[3, column] = value
    results = gloo.run(4, odd, logits, target, tau, {"backend": backend})
    others = [0, 1, 2, 4, 5, 6]
    for got, before in zip(results, clean, strict=True):
        loss, grad, grad_tau, _, stats = got
        assert loss[3].isnan() and grad_tau[3].isnan() and grad[3].isnan().any()
        assert stats.lse[3].isnan() and stats.argmax[3] == -1
        for g, b in zip((loss, grad, grad_tau), before, strict=False):
            assert torch.equal(g[others], b[others])


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_ignored_rows_are_not_read_and_weight_zero_is_zero(gloo, backend, overwrite):
    logits, target, tau, weight = make()
    logits[1], tau[1], weight[1] = math.nan, -1.0, math.nan
    logits[4, 30], weight[4] = math.nan, 0.0
    options = {"backend": backend, "overwrite_logits": overwrite, "reduction": "sum"}
    for loss, grad, grad_tau, _, stats in gloo.run(2, visit, logits, target, tau, weight, options):
        assert loss.isfinite() and grad.isfinite().all() and grad_tau.isfinite().all()
        assert (grad[[1, 4]] == 0).all() and (grad_tau[[1, 4]] == 0).all()
        assert (grad[[0, 2, 3, 5, 6]] != 0).any(1).all()
        assert stats.argmax[1] == -1 and stats.lse[1].isnan()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_every_row_ignored_or_no_rows(gloo, backend):
    logits, _, tau, _ = make(3)
    for rows in (3, 0):
        task = logits[:rows], torch.full((rows,), -100), tau[:rows], None, {"backend": backend}
        for loss, grad, grad_tau, *_ in gloo.run(2, visit, *task):
            assert loss.isnan() and (grad == 0).all() and (grad_tau == 0).all()
            assert grad.shape == (rows, 22)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_bad_temperature(gloo, backend):
    logits, target, tau, _ = make()
    tau[2], tau[3], tau[5] = 0.0, math.nan, math.inf
    for loss, grad, grad_tau, _, stats in gloo.run(
        2, odd, logits, target, tau, {"backend": backend}
    ):
        bad = [i in (2, 3, 5) for i in range(7)]
        assert loss.isnan().tolist() == bad and grad_tau.isnan().tolist() == bad
        assert grad.isnan().all(1).tolist() == bad and stats.argmax[2] == -1


# What goes wrong.


def raises(group, columns, target, options):
    """The error of the rank, and whether its logits are as they were."""
    logits = torch.ones(target.shape[0], columns[group.rank()]).requires_grad_() * 1
    before = logits.detach().clone()
    message = error_of(
        group,
        lambda _: dro_cross_entropy(logits, target, 1.0, process_group=group, **options),
    )
    return message, torch.equal(logits, before)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("bad", [-1, 40, 2**40])
def test_bad_target_raises_on_every_rank(gloo, bad, backend, overwrite):
    target = torch.tensor([0, -100, 39, bad, bad])
    options = {"backend": backend, "overwrite_logits": overwrite}
    for error, untouched in gloo.run(4, raises, (10,) * 4, target, options):
        assert error == (
            "IndexError: dro_cross_entropy: target[3] must be in [0, 40) or ignore_index=-100, "
            f"got {bad}"
        )
        assert untouched, "nothing is written before the check"


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_unlike_numbers_of_columns_raise_on_every_rank(gloo, backend):
    for n in (3, 0):
        target = torch.zeros(n, dtype=torch.int64)
        for error, _ in gloo.run(4, raises, (10, 10, 9, 10), target, {"backend": backend}):
            assert error == (
                "ValueError: dro_cross_entropy: logits must have as many columns on every rank of "
                "process_group, got [10, 10, 9, 10] by rank"
            )


def test_unlike_numbers_of_columns_make_nan_where_nothing_waits_for_the_device(monkeypatch):
    """As on a GPU: the check that raises is left out."""
    monkeypatch.setattr(sharded, "_check_widths", lambda widths: None)

    def other_rank_has_one_less(parts, argmax, v, group):
        return torch.stack([parts] * 2), torch.stack([argmax] * 2), torch.tensor([v, v - 1])

    monkeypatch.setattr(sharded, "_exchange", other_rank_has_one_less)
    logits, target, tau, weight = make()
    group = mock.Mock(**{"rank.return_value": 0, "size.return_value": 2})
    loss, rows, argmax = sharded.sharded_fwd(
        "native", logits, target, tau, weight, TokenOptions(RHO, -100, 0.0, 0.0, 0.0), group, True
    )
    live = target != -100
    assert loss[live].isnan().all() and rows[:2, live].isnan().all() and (argmax == -1).all()


def test_what_is_no_group_says_what_was_expected():
    logits, target, *_ = make()
    with pytest.raises(
        TypeError, match=r"dro_cross_entropy: process_group must be a torch.dis.* got str"
    ):
        dro_cross_entropy(logits, target, process_group="world")
    with pytest.raises(TypeError, match="got int"):
        DROCrossEntropyLoss(process_group=-100)(logits, target)  # of a non-member
    with pytest.raises(ValueError, match="TempNetCrossEntropyLoss: process_group is that of"):
        TempNetCrossEntropyLoss(TempNet(44), 1.0, process_group=-100)


def second_use(group):
    logits, target, *_ = make()
    leaf = own_columns(logits, group).clone().requires_grad_()
    errors = []
    loss = dro_cross_entropy(leaf, target, process_group=group)
    errors.append(error_of(group, lambda _: torch.autograd.grad(loss, leaf, create_graph=True)))
    wide = leaf * 1
    loss = dro_cross_entropy(wide, target, overwrite_logits=True, process_group=group)
    errors.append(error_of(group, lambda _: (loss + wide.sum()).backward()))
    loss = dro_cross_entropy(leaf * 1, target, overwrite_logits=True, process_group=group)
    loss.backward(retain_graph=True)
    errors.append(error_of(group, lambda _: loss.backward()))
    return errors


def test_second_derivative_stale_use_and_second_backward_raise(gloo):
    for double, stale, second in gloo.run(2, second_use):
        assert "there is no second derivative" in double
        assert "the logits were used after overwrite_logits=True" in stale
        assert "dro_cross_entropy: a second backward of one loss" in second


# The module, and compilation.


def module(group, logits, target, tau):
    loss_fn = DROCrossEntropyLoss(RHO, reduction="sum", process_group=group)
    twin = copy.deepcopy(loss_fn)
    assert twin.process_group is group and twin.options is not loss_fn.options
    assert not loss_fn.state_dict() and "process_group" not in repr(loss_fn)
    return twin(own_columns(logits, group), target, tau)


def test_the_module_passes_its_group_on(gloo):
    logits, target, tau, _ = make()
    whole = DROCrossEntropyLoss(RHO, reduction="sum")(logits, target, tau)
    for loss in gloo.run(2, module, logits, target, tau):
        torch.testing.assert_close(loss, whole)


def compiled(group, logits, target, tau, fullgraph):
    torch.compiler.reset()
    results = []
    for overwrite in (False, True):

        def call(z, t, overwrite=overwrite):
            return 2 * dro_cross_entropy(
                z * 1.0, target, t, RHO, overwrite_logits=overwrite, process_group=group
            )

        for f in (call, torch.compile(call, fullgraph=fullgraph, backend="aot_eager")):
            leaf, t = own_columns(logits, group).clone().requires_grad_(), tau.clone()
            loss = f(leaf, t.requires_grad_())
            loss.backward()
            results.append((loss.detach(), leaf.grad, t.grad))
    return results


@pytest.mark.parametrize("world_size", [1, 2])
def test_compiled_whole_in_a_group_of_one_and_with_a_break_in_a_larger(gloo, world_size):
    results = gloo.run(world_size, compiled, *make()[:3], world_size == 1)
    for plain, traced, in_place, traced_in_place in results:
        for pair in ((plain, traced), (in_place, traced_in_place), (plain, in_place)):
            torch.testing.assert_close(*pair, rtol=1e-6, atol=1e-7)
