"""The state per sample: read and written at ids."""

import math

import pytest
import torch

SAMPLES = 300


@pytest.fixture
def op(backend):
    return lambda name: getattr(getattr(torch.ops.tempnet, name), backend)


def ids_of(b):
    """With equal ones, neighbours and not, in a view of stride 2."""
    ids = torch.randint(SAMPLES, (b, 2))
    ids[b // 2 :, 0] = ids[: b - b // 2, 0]
    ids[:3, 0] = 7
    return ids[:, 0]


@pytest.mark.parametrize("count", [1, 2, 6])
@pytest.mark.parametrize("b", [1, 40, 260])  # 260: several blocks of threads
def test_the_last_of_equal_ids_is_written(op, b, count):
    tables, ids = list(torch.randn(count, SAMPLES)), ids_of(b)
    values = torch.randn(b, count).T
    expected = [table.clone() for table in tables]
    for table, value in zip(expected, values, strict=True):
        for id, x in zip(ids.tolist(), value.tolist(), strict=True):
            table[id] = x
    assert torch.equal(
        op("read_samples")(tables, ids), torch.stack([table[ids] for table in tables])
    )
    versions = [table._version for table in tables]
    op("write_samples_")(tables, ids, ids.new_empty(0), values)
    assert all(torch.equal(x, y) for x, y in zip(tables, expected, strict=True))
    assert all(x._version > v for x, v in zip(tables, versions, strict=True))


def test_sorted_ids_with_their_order_write_the_same(op):
    ids, values = ids_of(50), torch.randn(2, 50)
    tables = [torch.zeros(2, SAMPLES) for _ in range(2)]
    op("write_samples_")(list(tables[0]), ids, ids.new_empty(0), values)
    op("write_samples_")(list(tables[1]), *torch.sort(ids, stable=True), values)
    assert torch.equal(*tables) and tables[0].count_nonzero() == 2 * len(set(ids.tolist()))


def test_an_id_outside_reads_inf_and_writes_nothing(op):
    table, ids = torch.arange(5.0), torch.tensor([4, 5, -1, 0, 1 << 40])
    assert op("read_samples")([table], ids).tolist() == [[4, math.inf, math.inf, 0, math.inf]]
    op("write_samples_")([table], ids, ids.new_empty(0), torch.full((1, 5), 9.0))
    assert table.tolist() == [9, 1, 2, 3, 9]


def test_no_ids(op):
    table, ids = torch.zeros(3), torch.empty(0, dtype=torch.int64)
    assert op("read_samples")([table, table], ids).shape == (2, 0)
    op("write_samples_")([table], ids, ids, torch.empty(1, 0))
    assert not table.any()


def test_opcheck(op):
    tables, ids = [torch.zeros(9), torch.ones(9)], torch.tensor([3, 1, 3])
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(op("read_samples"), (tables, ids), test_utils=tests)
    values = torch.rand(2, 3)
    torch.library.opcheck(
        op("write_samples_"), (tables, ids, ids.new_empty(0), values), test_utils=tests
    )


def test_compiles(op):
    def step(tables, ids, values):
        op("write_samples_")(tables, ids, ids.new_empty(0), values)
        return op("read_samples")(tables, ids)

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    tables, values = list(torch.zeros(2, SAMPLES)), torch.rand(2, 4)
    assert torch.equal(compiled(tables, torch.arange(4), values), values)
    assert torch.equal(torch.stack(tables)[:, :4], values)
