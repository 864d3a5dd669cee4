"""The CUDA sources of the token loss, run on a CPU by tests/cuda_emulator/; and the emulator, which
must see planted faults."""

import subprocess
import sys
from pathlib import Path

import emulated
import pytest
import test_contract
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


def cluster_plan(v, dtype, cluster):
    """A row over ``cluster`` CTAs in slices of whole 128-byte lines."""
    line = 128 // dtype.itemsize
    slice_ = -(-(-(-v // cluster)) // line) * line
    vectors = 4 if slice_ * dtype.itemsize <= 4 * 16 * 512 else 8
    return {
        "kernel": emulated.KERNELS["cluster"], "cluster": cluster, "threads": 512,
        "vectors": vectors, "slice": slice_,
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
def test_cluster_kernel_matches_the_definition(use, dtype, cluster, v):
    plan = cluster_plan(v, dtype, cluster)
    if plan["slice"] * dtype.itemsize > 8 * 16 * 512:
        pytest.skip("a slice of this row does not fit in a CTA's registers")
    # 5 rows over 2 resident clusters: each takes several, one of them ignored.
    logits, target, tau = token_loss.make((5, v), dtype)
    operators = use("random", **plan)
    wide = shifted(logits, 0)
    check_view(wide, target, tau)
    check_view(wide, target, tau, label_smoothing=0.1, z_loss=1e-2)
    assert {launch["kernel"] for launch in operators.launched} == {plan["kernel"]}


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
    rows_loss, _, argmax = op(
        view, target, tau, scale, *numbers, options.get("z_loss", 0.0), True
    )
    # float16 is stored without the row's scale.
    in_place = (view.float() * scale[:, None]).half() if view.dtype == torch.float16 else view
    token_loss.assert_within_twice_plain(in_place, exact[1], plain[1], "in place")
    token_loss.assert_within_twice_plain(rows_loss.sum(), exact[0], plain[0], "loss in place")
    assert torch.equal(argmax, torch.where(target == -100, -1, logits.float().argmax(1)))
    outside = torch.cat([storage[:, :first], storage[:, first + v :]], 1)
    assert outside.isnan().all(), "what lies between the rows was written"


@pytest.mark.parametrize("name", ["row", "row, two passes", "split"])
@pytest.mark.parametrize("v", VOCABULARIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_kernels_match_the_definition_on_rows_of_any_alignment(use, dtype, v, name):
    plan = {"kernel": emulated.KERNELS[name], "cluster": 1}
    if name == "row":
        columns = 16 // dtype.itemsize
        threads = -(-(v // columns + 2) // 8 // 32) * 32 + 32
        if threads > 512:
            pytest.skip("this row does not fit in a CTA's registers")
        plan |= {"threads": threads}
    else:
        line = 128 // dtype.itemsize
        plan |= {"threads": 64, "slice": max(line, -(-v // 3 // line) * line)}
    use("reversed", **plan)
    logits, target, tau = token_loss.make((3, v), dtype)
    token_loss.check("native", logits, target, tau)  # rows of stride v: odd alignment for odd v
    token_loss.check("native", logits, target, tau, label_smoothing=0.1, z_loss=1e-2)
    token_loss.check("native", logits, target, tau, reduction="none")
    check_view(shifted(logits, 1), target, tau)

