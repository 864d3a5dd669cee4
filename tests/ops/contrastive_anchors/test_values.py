"""What stands before and behind the tiles of the contrastive loss against its definition."""

import math

import compare
import pytest
import torch

from tempnet_kernels.core.fields import AnchorState
from tempnet_kernels.reference import contrastive_anchors as definition
from tempnet_kernels.reference.dro_contrastive import dro_contrastive_stats_


@pytest.fixture
def wide_dtypes(request, device):
    """Those that the backend takes: a GPU's kernels have no float64."""
    name = request.node.callspec.params["backend"]
    has_float64 = name == "reference" or (name == "native" and device == "cpu")
    return [torch.float32, torch.float64][: 1 + has_float64]


@pytest.fixture
def op(backend):
    return lambda name: getattr(getattr(torch.ops.tempnet, name), backend)


def positives(m, n, is_given):
    return torch.randperm(n)[:m] if is_given else torch.empty(0, dtype=torch.int64)


def start(op, m, n, all_n, begin, is_given, include_positive=False, every_pair=True, stride=1):
    tau_image, tau_text = torch.rand(2, m, stride)[:, :, 0] + 0.05
    text, candidates = torch.empty(n, 3), torch.empty(all_n, 3)
    arguments = (tau_image, tau_text, positives(m, n, is_given), text, candidates, begin)
    return arguments, op(*arguments, include_positive, every_pair)


@pytest.mark.parametrize("every_pair", [False, True])
@pytest.mark.parametrize("include_positive", [False, True])
@pytest.mark.parametrize("is_given", [False, True])
# Within a block of threads, several of them, the second of two ranks, a rank without pairs.
@pytest.mark.parametrize("m, n, all_n, begin", [(5, 7, 7, 0), (260, 300, 300, 0), (9, 9, 21, 12),
                                                (0, 0, 8, 3), (0, 0, 0, 0)])  # fmt: skip
def test_the_states_of_nothing(op, m, n, all_n, begin, is_given, include_positive, every_pair):
    options = (include_positive, every_pair)
    arguments, got = start(op("anchor_states"), m, n, all_n, begin, is_given, *options, stride=2)
    expected = definition.anchor_states(*arguments, *options)
    exact = definition.anchor_states(*(x.double() for x in arguments[:2]), *arguments[2:], *options)
    for a, plain, e in zip(got[:2], expected, exact, strict=False):  # row_a, column_a
        assert a.dtype == torch.float32
        compare.assert_within_twice_plain(a, e, plain)
    for x, e in zip(got[2:], expected[2:], strict=True):
        assert x.dtype == e.dtype and torch.equal(x, e)
    _, column_a, rows, _, place, pair = got
    if m:
        assert torch.equal(pair[place].long(), torch.arange(m))
        assert (pair >= 0).sum() == m and (column_a == definition.NO_ANCHOR).sum() == n - m
        assert rows[AnchorState.COUNT, 0] == (all_n - (not include_positive)) * every_pair


def test_a_positive_outside_is_not_followed(op):
    tau, text = torch.full((4,), 0.1), torch.empty(6, 3)
    row_a, column_a, _, _, place, pair = op("anchor_states")(
        tau, tau, torch.tensor([2, -1, 6, 1 << 40]), text, text, 0, False, True
    )
    assert row_a.isnan().tolist() == [False, True, True, True]
    assert place.tolist()[:2] == [2, 0] and set(place.tolist()[2:]) == {5}
    assert pair.tolist() == [-1, -1, 0, -1, -1, -1]
    assert (column_a == definition.NO_ANCHOR).tolist() == [True, True, False, True, True, True]


def visited(m, n, include_positive=False):
    """The arguments of contrastive_anchors in float32: the states of random similarities, with an
    anchor without negatives, one that met NaN and temperatures that are none."""
    tau_image, tau_text = torch.rand(2, m) * 0.2 + 0.05
    if m > 6:
        tau_image[1], tau_image[2], tau_text[3], tau_text[4] = math.nan, -0.1, 0.0, math.inf
    image, text = torch.randn(m, 8) / 3, torch.randn(n, 8) / 3
    if m > 6:
        image[5, 0] = math.nan
    states = definition.anchor_states(
        tau_image, tau_text, positives(m, n, True), text, text, 0, include_positive, False
    )
    row_a, column_a, rows, columns, place, pair = states
    mask = torch.rand(m, n) < 0.7
    mask[m - 1] = mask[:, place[m - 1]] = False
    ids = torch.empty((0, n), dtype=torch.int32)
    dro_contrastive_stats_(
        rows, columns, image, text, row_a, column_a, place, ids, mask, include_positive, False
    )
    return rows, columns, row_a, column_a, tau_image, tau_text, place, pair


def wide(tensors):
    return [x.double() if x.is_floating_point() else x for x in tensors]


@pytest.mark.parametrize("visits", ["first", "later", "later of one side"])
@pytest.mark.parametrize("gamma", [0.8, 1.0])
@pytest.mark.parametrize("m, n", [(2, 2), (9, 12), (200, 300)])
def test_anchors_match_the_definition(op, wide_dtypes, m, n, gamma, visits):
    empty = torch.empty(0)
    for dtype in wide_dtypes:
        if visits == "first":
            old = [empty, empty]
        else:
            old = list(torch.randn(2, m) + math.log(n))
            old[0][::3], old[1][:2] = math.nan, math.inf
            if visits == "later of one side":
                old[1] = empty
        given = [*visited(m, n), *old]
        options = (0, gamma, 3.0)
        exact = definition.contrastive_anchors(*wide(given), *options)
        plain = definition.contrastive_anchors(*given, *options)
        given = wide(given) if dtype == torch.float64 else given
        for got, e, p in zip(
            op("contrastive_anchors")(*given, *options), exact, plain, strict=True
        ):
            assert got.dtype == dtype and got.shape == e.shape
            assert torch.equal(got.isfinite(), e.isfinite())
            assert torch.equal(got.isnan(), e.isnan())
            rows = (got, e, p) if got.dim() == 2 else (x[None] for x in (got, e, p))
            for x, y, z in zip(*rows, strict=True):
                usual = y.abs() < 1e6  # beside what a temperature that is none makes of the state
                assert torch.equal(usual, x.abs() < 1e6)
                compare.assert_within_twice_plain(x[usual], y[usual], z[usual])
        stats, _, total, row_parameters, _ = exact
        if m > 6:  # nothing of what is wrong here is a number, and the state has nothing else
            assert stats[2::2, [1, 5]].isnan().all() and total[[1, 2, 3, 4, 5]].isnan().all()
            assert row_parameters[0, m - 1] == definition.NO_ANCHOR and total[m - 1] == 0


def test_anchors_of_the_second_rank(op):
    """Their columns are a part of all, and have no fifth field."""
    rows, columns, row_a, column_a, tau_image, tau_text, place, pair = visited(6, 8)
    empty = torch.empty(0)
    alone = op("contrastive_anchors")(
        rows, columns, row_a, column_a, tau_image, tau_text, place, pair, empty, empty, 0, 1.0, 2.0
    )
    others = torch.full((5,), -1, dtype=torch.int32)
    ranked = op("contrastive_anchors")(
        rows, columns[:4].contiguous(), row_a, column_a, tau_image, tau_text, place + 5,
        torch.cat([others, pair]), empty, empty, 5, 1.0, 2.0,
    )  # fmt: skip
    for got, expected in zip(ranked, alone, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("want", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("m, n, d", [(1, 1, 1), (7, 9, 33), (20, 20, 600)])  # 600: two visits
def test_the_positives_share_is_rounded_once(op, wide_dtypes, m, n, d, dtype, want):
    if dtype == torch.float64 and dtype not in wide_dtypes:
        pytest.skip("a GPU's kernels have no float64")
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    image, text = torch.randn(m, d).to(dtype), torch.randn(n, d).to(dtype)
    place = torch.randperm(n)[:m]
    pair = torch.full((n,), -1, dtype=torch.int32).scatter(0, place, torch.arange(m).int())
    total, scale = torch.rand(m).to(acc) + 1, torch.tensor(0.01, dtype=acc)
    # The sums nearly cancel the share: what is left would be lost in 16 bits.
    sums = [1e-3 * torch.randn(m, d, dtype=acc), 1e-3 * torch.randn(n, d, dtype=acc)]
    sums[0] += total[:, None] * text[place]
    sums[1][place] += total[:, None] * image
    for unit, wide_text in ((torch.empty(0, dtype=acc), False), (torch.tensor(4.0).to(acc), True)):
        given = [x * (unit if unit.numel() else 1) for x in sums]
        tensors = (*given, image, text, total, place, pair, unit, scale)

        def run(function, tensors, of_image, of_text):
            nothing = tensors[0].new_empty((0, 0))
            grads = [
                torch.full_like(x, math.nan, dtype=of) if w else nothing.to(of)
                for x, w, of in zip((image, text), want, (of_image, of_text), strict=True)
            ]
            function(*grads, *tensors)
            return grads

        of_text = acc if wide_text else dtype
        got = run(op("pair_gradients_"), tensors, dtype, of_text)
        plain = run(definition.pair_gradients_, tensors, dtype, of_text)
        exact = run(definition.pair_gradients_, wide(tensors), torch.float64, torch.float64)
        for g, e, p in zip(got, exact, plain, strict=True):
            compare.assert_within_twice_plain(g, e, p)
        if dtype == acc and all(want):  # in the sums' own memory
            own = [x.clone() for x in given]
            op("pair_gradients_")(*own, *own, *tensors[2:])
            assert all(torch.equal(x, g) for x, g in zip(own, got, strict=True))
