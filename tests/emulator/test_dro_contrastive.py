"""The CUDA kernels on a tile of similarities in the emulator."""

import compare
import emulated
import pytest
import torch
from backends import DTYPES
from emulated import ORDERS, shifted


@pytest.fixture
def tile():
    """The arguments of the operators on a tile of similarities: a part of a larger matrix, with NaN
    around it, ids and a mask."""

    def build(columns, masked):
        m, n, row_begin, column_begin, rows = 150, 700, 30, 40, 70
        similarity = shifted(torch.rand(rows, columns), 0)
        positive = torch.randperm(n)[:m]
        positive[row_begin] = column_begin + columns - 1  # in the last column of the tile
        ids = torch.randint(300, (2, n), dtype=torch.int32) if masked else torch.empty(0, n).int()
        mask = torch.rand(m, n) < 0.7 if masked else torch.empty(0, n).bool()
        return m, n, (similarity, row_begin, column_begin), (positive, ids, mask, masked)

    return build


@pytest.mark.parametrize("multiprocessors", [1, 132])  # one chunk of rows, and several
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("columns", [520, 601])  # whole groups of columns, and not
def test_states_of_a_tile_match_the_cpu_in_every_order(
    module, tile, columns, masked, multiprocessors
):
    m, n, place, options = tile(columns, masked)
    row_a, column_a = 5 + torch.rand(m), 5 + torch.rand(n)
    begin = torch.rand(5, m), torch.rand(5, n)  # what earlier tiles left
    operators = emulated.ContrastiveOperators(module, multiprocessors)
    native = torch.ops.tempnet.similarity_stats_.native

    def run(function, dtype=torch.float32):
        rows, columns_ = (x.to(dtype, copy=True) for x in begin)
        wide = place[0].to(dtype), *place[1:]
        function(rows, columns_, *wide, row_a.to(dtype), column_a.to(dtype), *options)
        return rows, columns_

    plain, exact = run(native), run(native, torch.float64)
    results = []
    for order in ORDERS:
        module.set_order(order, 1)
        results.append(run(operators.similarity_stats_))
    module.set_order("forward", 0)
    for got, p, e, first in zip(results[0], plain, exact, begin, strict=True):
        for field in range(5):
            compare.assert_within_twice_plain(got[field], e[field], p[field], field)
        assert (got[:3] != first[:3]).sum() > 100  # of the tile's rows, and of its columns
    for other in results[1:]:
        assert torch.equal(other[0], results[0][0]) and torch.equal(other[1], results[0][1])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("columns", [520, 601])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_of_a_tile_match_the_cpu_and_stay_inside(module, tile, dtype, columns, masked):
    m, n, place, options = tile(columns, masked)
    parameters = [torch.stack([5 + torch.rand(k), torch.rand(k), torch.rand(k)]) for k in (m, n)]
    plain, exact = torch.empty(place[0].shape), torch.empty(place[0].shape, dtype=torch.float64)
    native = torch.ops.tempnet.similarity_weights_.native
    native(plain, *place, *parameters, *options)
    native(exact, place[0].double(), *place[1:], *(x.double() for x in parameters), *options)
    assert exact.max() > 0.1 and (exact == 0).any()
    got = shifted(torch.full(exact.shape, torch.nan, dtype=dtype), 0)
    operators = emulated.ContrastiveOperators(module)
    operators.similarity_weights_(got, *place, *parameters, *options)
    compare.assert_within_twice_plain(got, exact, plain)
    assert got._base[:, columns:].isnan().all(), "what lies between the rows was written"
    if dtype == torch.float32:  # in the similarities' place
        operators.similarity_weights_(place[0], *place, *parameters, *options)
        assert torch.equal(place[0], got)
