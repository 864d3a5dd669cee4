"""What PyTorch must be able to do with the contrastive loss."""

import compare
import pytest
import torch
from contrastive import RHO, leaves, make, states

from tempnet_kernels import dro_contrastive
from tempnet_kernels.core import register


def check_op(name, backend, *arguments):
    # Its other tests are of autograd, which these have not.
    torch.library.opcheck(
        getattr(getattr(torch.ops.tempnet, name), backend), arguments,
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


def test_opcheck(backend):
    image, text, tau_image, tau_text = make(9)
    positive, pair = torch.arange(9), torch.arange(9, dtype=torch.int32)
    ids = torch.empty((0, 9), dtype=torch.int32)
    mask = torch.empty((0, 9), dtype=torch.bool)
    states, parameters = torch.rand(2, 5, 9), torch.rand(2, 3, 9)
    options = (positive, ids, mask, True)
    check_op(
        "dro_contrastive_stats_", backend, *states, image, text, 1 / tau_image, 1 / tau_text,
        *options, True,
    )  # fmt: skip
    scale = torch.tensor(0.5)
    for wide in (False, True):
        for want in ((True, True), (True, False), (False, True)):
            check_op(
                "dro_contrastive_grad", backend, image, text, image.new_empty((0, 0)), *parameters,
                states[0, 0], positive, pair, *options[1:], scale, wide, *want,
            )  # fmt: skip
    if backend != "reference":
        similarity = image @ text.T
        check_op(
            "similarity_stats_", backend, *states, similarity, 0, 0, 1 / tau_image, 1 / tau_text,
            *options,
        )  # fmt: skip
        check_op(
            "similarity_weights_", backend, similarity.clone(), similarity, 0, 0, *parameters,
            *options,
        )  # fmt: skip


def test_opcheck_of_the_anchors(backend):
    image, text, *taus = make(9, n=11)
    empty = torch.empty(0)
    for positive in (torch.empty(0, dtype=torch.int64), torch.randperm(11)[:9]):
        check_op("anchor_states", backend, *taus, positive, text, text, 0, False, True)
    op = getattr(torch.ops.tempnet.anchor_states, backend)
    row_a, column_a, rows, columns, *places = op(*taus, positive, text, text, 0, False, True)
    for log_s in (empty, torch.rand(9)):
        check_op(
            "contrastive_anchors", backend, torch.rand_like(rows), torch.rand_like(columns), row_a,
            column_a, *taus, *places, log_s, log_s, 0, 0.8, 1.0,
        )  # fmt: skip
    sums, total, scale = (torch.rand_like(image), torch.rand_like(text)), taus[0], torch.ones(())
    check_op(
        "pair_gradients_", backend, *(x.clone() for x in sums), *sums, image, text, total, *places,
        empty, scale,
    )  # fmt: skip


def test_compiles_without_a_graph_break(backend, monkeypatch):
    monkeypatch.setattr(register, "_available", {})  # as in the first call of a process

    def step(image, text, a, c):
        return dro_contrastive(image, text, a, c, RHO, backend=backend)

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for b in (8, 11):
        tensors = make(b)
        got, want = leaves(tensors), leaves(tensors)
        loss, eager = compiled(*got), step(*want)
        assert torch.equal(loss, eager)
        for g, e in zip(
            torch.autograd.grad(loss, got), torch.autograd.grad(eager, want), strict=True
        ):
            torch.testing.assert_close(g, e)


def test_func_grad(backend):
    tensors = make(7)
    functional = torch.func.grad(
        lambda image: dro_contrastive(image, *tensors[1:], RHO, backend=backend)
    )(tensors[0])
    got = leaves(tensors)
    loss = dro_contrastive(*got, RHO, backend=backend)
    assert torch.equal(functional, torch.autograd.grad(loss, got[0])[0])


def test_autocast_does_not_round_the_similarities(backend):
    tensors = make(20)

    def run():
        got = leaves(tensors)
        loss = dro_contrastive(*got, RHO, backend=backend)
        return (loss.detach(), *torch.autograd.grad(loss, got))

    with torch.autocast(tensors[0].device.type, dtype=torch.bfloat16):
        inside = run()
    for got, expected in zip(inside, run(), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["native", "triton"])
def test_cuda_graph_replays_a_step(name, dtype):
    with torch.device("cuda"):
        got = leaves(make(130, dtype=dtype))
        log_s = states(130)[0]
        ids, mask = torch.arange(130) // 2, torch.rand(130, 130) < 0.8
        positive = torch.randperm(130)

    def step():
        loss = dro_contrastive(
            *got, RHO, log_s_image=log_s, gamma=0.8, image_ids=ids, negative_mask=mask,
            positive=positive, backend=name,
        )  # fmt: skip
        return loss.detach(), *torch.autograd.grad(loss, got)

    compare.assert_graph_replays(step)
