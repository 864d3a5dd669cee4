"""The CUDA sources, run on a CPU by tests/emulator/; and the emulator, which
must see planted faults."""

import math
import subprocess
import sys
from pathlib import Path

import compare
import emulated
import pytest
import test_dro_cross_entropy as token_loss
import torch

from tempnet_kernels import dro_cross_entropy

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VOCABULARIES = [1, 7, 33, 1000, 4096, 32000]
ORDERS = ["forward", "reversed", "random"]


@pytest.fixture(scope="module")
def module():
    return emulated.load()


@pytest.fixture
def use(module, monkeypatch):
    """Make the public function run the emulated kernels, with a launch plan of the test's."""

    def install(order="forward", **plan):
        operators = emulated.Operators(module, **plan)
        monkeypatch.setattr(
            sys.modules["tempnet_kernels.dro_cross_entropy"], "_op", operators, raising=True
        )
        module.set_order(order, 1)
        return operators

    yield install
    module.set_order("forward", 0)


def whole_lines(v, parts, dtype):
    """Columns of each of so many parts of a row, in whole lines of 128 bytes."""
    line = 128 // dtype.itemsize
    return math.ceil(v / parts / line) * line


def row_plan(v, dtype, cluster):
    """A row over ``cluster`` CTAs in slices of whole 128-byte lines, held in registers."""
    slice_ = v if cluster == 1 else whole_lines(v, cluster, dtype)
    vectors = slice_ * dtype.itemsize // 16 + 2
    threads = math.ceil(vectors / 8 / 32) * 32
    return {
        "kernel": emulated.KERNELS["row"], "cluster": cluster, "threads": threads, "slice": slice_,
    }  # fmt: skip


def shifted(logits, columns):
    """A view of the same numbers with NaN around every row; its rows begin on 16 bytes where
    ``columns`` is 0."""
    n, v = logits.shape
    wide = torch.full((n, -(-v // 8) * 8 + 8), torch.nan, dtype=logits.dtype)
    wide[:, columns : columns + v] = logits
    return wide[:, columns : columns + v]


@pytest.mark.parametrize("v", VOCABULARIES)
@pytest.mark.parametrize("cluster", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_kernel_matches_the_definition(use, dtype, cluster, v):
    plan = row_plan(v, dtype, cluster)
    logits, target, tau = token_loss.make((4, v), dtype)
    operators = use("random", **plan)
    for columns in (0, 1):  # rows on 16 bytes, and off
        check_view(shifted(logits, columns), target, tau)
    check_view(shifted(logits, 0), target, tau, label_smoothing=0.1, z_loss=1e-2)
    assert {launch["cluster"] for launch in operators.launched} == {cluster}


def check_view(logits, target, tau, **options):
    """Values and gradients, out of place and in place; padding between the rows stays as it is."""
    n, v = logits.shape
    exact = token_loss.expected(logits, target, tau, torch.float64, **options)
    plain = token_loss.expected(logits, target, tau, torch.float32, **options)
    leaf = logits.detach().requires_grad_()
    t = tau.clone().requires_grad_()
    loss = dro_cross_entropy(leaf, target, t, token_loss.RHO, backend="native", **options)
    got = loss.detach(), *torch.autograd.grad(loss, (leaf, t))
    names = ("loss", "grad_logits", "grad_tau")
    for name, g, e, p in zip(names, got, exact, plain, strict=True):
        token_loss.assert_within_twice_plain(g, e, p, name)
    # The operator itself, since the public function zeroes the padding.
    op = sys.modules["tempnet_kernels.dro_cross_entropy"]._op("dro_cross_entropy_fwd_", "native")
    storage, first = logits._base.clone(), logits.storage_offset()
    view = storage[:, first : first + v]
    live = (target != -100).sum().float()
    scale = (1 / live).expand(n)
    numbers = (token_loss.RHO, -100, options.get("label_smoothing", 0.0))
    rows_loss, _, argmax = op(view, target, tau, scale, *numbers, options.get("z_loss", 0.0), True)
    # float16 is stored without the row's scale.
    in_place = (view.float() * scale[:, None]).half() if view.dtype == torch.float16 else view
    token_loss.assert_within_twice_plain(in_place, exact[1], plain[1], "in place")
    token_loss.assert_within_twice_plain(rows_loss.sum(), exact[0], plain[0], "loss in place")
    assert torch.equal(argmax, torch.where(target == -100, -1, logits.float().argmax(1)))
    outside = torch.cat([storage[:, :first], storage[:, first + v :]], 1)
    assert outside.isnan().all(), "what lies between the rows was written"


@pytest.mark.parametrize("name", ["row, two passes", "split"])
@pytest.mark.parametrize("v", VOCABULARIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_visits_and_split_rows_match_the_definition(use, dtype, v, name):
    slice_ = v if name != "split" else whole_lines(v, 3, dtype)
    use("reversed", kernel=emulated.KERNELS[name], cluster=1, threads=64, slice=slice_)
    logits, target, tau = token_loss.make((3, v), dtype)
    token_loss.check("native", logits, target, tau)  # rows of stride v: odd alignment for odd v
    token_loss.check("native", logits, target, tau, reduction="none")
    check_view(shifted(logits, 1), target, tau)
    check_view(shifted(logits, 0), target, tau, label_smoothing=0.1, z_loss=1e-2)


@pytest.mark.parametrize("order", ORDERS)
def test_every_thread_order_gives_the_same_bits(use, order):
    logits, target, tau = token_loss.make((3, 9000), torch.bfloat16)
    results = []
    for name in ("forward", order):
        use(name, **row_plan(9000, torch.bfloat16, 4))
        results.append(token_loss.run("native", logits, target, tau))
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)


def test_launch_plan_covers_every_size(module):
    """Every row is held by the threads of its plan, or read twice."""
    for dtype in DTYPES:
        for v in (1, 33, 1000, 32000, 50257, 50304, 128256, 151936, 262144, 2**20):
            for n in (1, 64, 8192):
                for arch in (80, 90):
                    size = dtype.itemsize
                    params = emulated.shape_params(n, v, v)
                    plan = module.plan(str(dtype).removeprefix("torch."), params, arch)
                    assert plan["threads"] % 32 == 0 and 32 <= plan["threads"] <= 1024
                    assert plan["cluster"] == 1 or arch >= 90
                    assert plan["slice"] * plan["cluster"] >= v or plan["name"] == "split"
                    if plan["name"] == "row":
                        held = plan["threads"] * plan["vectors"] * 16
                        assert held >= plan["slice"] * size


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
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(emulated.__file__).parent
    )
    assert result.returncode == 86 and "out of bounds" in result.stderr
