"""The CUDA kernels of the token loss in the emulator, with launch plans of the test's."""

import math

import emulated
import pytest
import token_loss
import torch
from backends import DTYPES
from emulated import ORDERS, shifted, whole_lines

from tempnet_kernels import dro_cross_entropy
from tempnet_kernels.ops import dro_cross_entropy as token_loss_op

OP = "dro_cross_entropy"
VOCABULARIES = [1, 7, 33, 1000, 4096, 32000]


def row_plan(v, dtype, cluster):
    """A row over ``cluster`` CTAs in slices of whole 128-byte lines, held in registers."""
    slice_ = v if cluster == 1 else whole_lines(v, cluster, dtype)
    vectors = slice_ * dtype.itemsize // 16 + 2
    threads = math.ceil(vectors / 8 / 32) * 32
    return {
        "kernel": emulated.KERNELS["row"], "cluster": cluster, "threads": threads, "slice": slice_,
    }  # fmt: skip


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
    op = token_loss_op._op("dro_cross_entropy_fwd_", "native")
    storage, first = logits._base.clone(), logits.storage_offset()
    view = storage[:, first : first + v]
    live = (target != -100).sum().float()
    scale = (1 / live).expand(n)
    numbers = (token_loss.RHO, -100, options.get("label_smoothing", 0.0))
    numbers += (options.get("z_loss", 0.0), options.get("softcap", 0.0))
    rows_loss, _, argmax = op(view, target, tau, scale, *numbers, True)
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
