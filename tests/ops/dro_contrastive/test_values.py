"""The contrastive loss against its definition in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from backends import native_levels
from contrastive import NAMES, RHO, check, leaves, make, states

from tempnet_kernels import dro_contrastive
from tempnet_kernels.chunked import dro_contrastive as tiles
from tempnet_kernels.ops import dro_contrastive as MODULE
from tempnet_kernels.reference.official import official_contrastive

# Backends with weights of 16 bits.
NARROW = ["triton", "emulated"] + ["native"] * torch.cuda.is_available()


@pytest.mark.parametrize("gamma", [1.0, 0.8])
@pytest.mark.parametrize("b", [2, 7, 33, 513, 1030])  # within a strip, on and over its edge
def test_first_and_later_visits_match_the_definition(backend, gamma, b):
    if backend == "triton" and b > 300:
        b = b // 4 + 16  # several strips and chunks as well; the interpreter is slow
    tensors = make(b)
    grads = check(tensors, backend, gamma=gamma)
    assert all(g.norm() > 1e-3 for g in grads[:2])  # not all at the optimum
    check(tensors, backend, gamma=gamma, log_s=states(b))


@pytest.mark.parametrize("keep_bytes", [0, 64 << 20])
@pytest.mark.parametrize("m, n", [(130, 130), (65, 1100), (200, 1031), (70, 592)])  # 592: aligned
def test_tiles_match_the_definition_with_and_without_kept_similarities(
    small_tiles, monkeypatch, backend, keep_bytes, m, n
):
    if backend == "triton" and m == 200:
        pytest.skip("the interpreter is slow, and the other shapes have ragged tiles, too")
    monkeypatch.setattr(MODULE, "KEEP_BYTES", keep_bytes)
    positive = torch.randperm(n)[:m]
    check(make(m, n=n), backend, gamma=0.8, log_s=states(m), positive=positive)


@pytest.mark.parametrize("simd_level", native_levels(), indirect=True)
def test_every_simd_level_matches_the_definition(simd_level):
    check(make(519), "native", gamma=0.8, log_s=states(519))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_features_of_16_bits_lose_only_the_gradient_s_rounding(backend, dtype):
    check(make(67, dtype=dtype), backend, gamma=0.8, log_s=states(67))


@pytest.mark.parametrize("keep_bytes", [0, 64 << 20])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", NARROW, indirect=True)
def test_weights_of_16_bits_as_on_a_gpu(
    wide_products, small_tiles, monkeypatch, backend, dtype, keep_bytes
):
    monkeypatch.setattr(MODULE, "KEEP_BYTES", keep_bytes)
    dtypes, original = set(), tiles._op

    def op(name, backend):
        function = original(name, backend)

        def seen(weights, *args):
            dtypes.add(weights.dtype)
            function(weights, *args)

        return seen if name == "similarity_weights_" else function

    monkeypatch.setattr(tiles, "_op", op)
    for m in (67, 96, 65):  # ragged, aligned, a tile of one row
        check(make(m, dtype=dtype), backend, gamma=0.8, log_s=states(m))
    assert dtypes == {dtype}


@pytest.mark.parametrize("backend", NARROW, indirect=True)
@pytest.mark.parametrize("gamma", [1e-5, 1.0])
def test_weights_of_float16_neither_overflow_nor_vanish(wide_products, backend, gamma):
    """w is up to 1 / gamma after an average that was small, or 1 / B with many negatives."""
    tensors = make(40, dtype=torch.float16, low=0.5 if gamma == 1 else 0.1)
    old = None if gamma == 1 else torch.full((40,), -50.0)
    check(tensors, backend, gamma=gamma, log_s=(old, old))


def test_equal_ids_are_not_negatives_of_each_other(backend, small_tiles):
    b = 150
    image_ids, text_ids = torch.randint(40, (b,)) + (1 << 40), torch.randint(100, (b,))
    same = (image_ids[:, None] == image_ids) | (text_ids[:, None] == text_ids)
    tensors = make(b)
    check(tensors, backend, image_ids=image_ids, text_ids=text_ids, excluded=same)
    only_image = image_ids[:, None] == image_ids
    check(tensors, backend, image_ids=image_ids, excluded=only_image, include_positive=True)


@pytest.mark.parametrize("n", [600, 592])  # ragged, aligned
def test_the_mask_takes_false_negatives_out(backend, small_tiles, n):
    m = 70
    negative = torch.rand(m, n) < 0.6
    positive = torch.randperm(n)[:m]
    check(make(m, n=n), backend, negative_mask=negative, excluded=~negative, positive=positive)


def test_with_the_positive_it_is_the_loss_of_clip(backend):
    b, tau = 65, 0.07
    image, text, _, _ = make(b)
    a, c = leaves((image, text))
    loss = dro_contrastive(a, c, tau, tau, include_positive=True, backend=backend)
    clip = loss / (2 * tau) + math.log(b)
    e, f = leaves((image, text), torch.float64)
    logits = e @ f.T / tau
    y = torch.arange(b)
    exact = (F.cross_entropy(logits, y) + F.cross_entropy(logits.T, y)) / 2
    torch.testing.assert_close(clip.double(), exact, rtol=2e-6, atol=1e-6)
    for g, h in zip(
        torch.autograd.grad(clip, (a, c)), torch.autograd.grad(exact, (e, f)), strict=True
    ):
        assert (g - h).norm() <= 2e-6 * h.norm()


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_gradcheck(backend):
    """At gamma = 1 the gradients are the derivative of the value."""
    tensors = leaves(make(5, d=3), torch.float64)
    assert torch.autograd.gradcheck(lambda *t: dro_contrastive(*t, 0.5, backend=backend), tensors)


def test_equal_bits_from_run_to_run(small_tiles, backend):
    tensors = make(300 if backend == "native" else 150)

    def run():
        got = leaves(tensors)
        loss = dro_contrastive(*got, RHO, backend=backend)
        return (loss.detach(), *torch.autograd.grad(loss, got))

    first = run()
    assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_the_kernels_do_not_depend_on_the_number_of_threads():
    similarity = torch.randn(70, 2000)
    row_a, column_a = torch.rand(70) + 5, torch.rand(2000) + 5
    empty = torch.empty(0, 2000)
    results = []
    threads = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        rows, columns = torch.zeros(5, 70), torch.zeros(5, 2000)
        rows[0] = columns[0] = -1e30
        torch.ops.tempnet.similarity_stats_.native(
            rows, columns, similarity, 0, 0, row_a, column_a, torch.arange(70), empty.int(),
            empty.bool(), False,
        )  # fmt: skip
        results.append((rows, columns))
    torch.set_num_threads(threads)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("begin, masked", [(0, False), (1, True), (16, True)])
def test_a_tile_anywhere_has_the_states_and_weights_of_the_cpu_kernels(device, begin, masked):
    """Strides, offsets, states of earlier tiles, and a similarity of -inf, which counts."""
    m, n, height, width = 60, 200, 38, 160
    similarity = torch.randn(height, width + 32)[:, :width]
    similarity[3, 5] = -math.inf
    positive = torch.randperm(n)[:m]
    ids = torch.randint(90, (2 if masked else 0, n), dtype=torch.int32)
    mask = (torch.rand(m if masked else 0, n + 8) < 0.7)[:, :n]
    options = (positive, ids, mask)
    row_a, column_a = torch.rand(m) + 1, torch.rand(n) + 1
    column_a[begin + 7] = 1e-30
    inputs = (similarity, row_a, column_a, *options)

    def run(backend, where):
        s, ra, ca, *pairs = (x.to(where) for x in inputs)
        states = torch.ones(5, m, device=where), torch.ones(5, n, device=where)
        weights = torch.full((height, width + 16), 7.0, device=where)
        getattr(torch.ops.tempnet.similarity_stats_, backend)(
            *states, s, begin, begin, ra, ca, *pairs, masked
        )
        parameters = torch.stack([ra, ra, ra]), torch.stack([ca, ca, ca])
        getattr(torch.ops.tempnet.similarity_weights_, backend)(
            weights[:, :width], s, begin, begin, *parameters, *pairs, masked
        )
        return (*states, weights)

    for backend in ["triton"] + ["native"] * (device != "cpu"):
        for got, expected in zip(run(backend, device), run("native", "cpu"), strict=True):
            torch.testing.assert_close(got.cpu(), expected, rtol=2e-6, atol=2e-6)


def test_the_official_code_has_the_same_gradients_in_epoch_0_and_later(backend):
    b, gamma = 32, 0.8
    zeros = torch.zeros(b, dtype=torch.float64)
    official = {k: zeros.clone() for k in ("s_I", "b_I", "s_T", "b_T")}
    log_s = [None, None]
    for step in range(20):
        tensors = make(b)
        exact = leaves(tensors, torch.float64)
        epoch = 0 if step == 0 else 1
        expected = torch.autograd.grad(
            official_contrastive(*exact, RHO, gamma, official, torch.arange(b), epoch), exact
        )
        got = leaves(tensors)
        loss, stats = dro_contrastive(
            *got, RHO, log_s_image=log_s[0], log_s_text=log_s[1], gamma=gamma, return_stats=True,
            backend=backend,
        )  # fmt: skip
        log_s = stats[:2]
        for name, g, e in zip(NAMES, torch.autograd.grad(loss, got), expected, strict=True):
            assert (g - e).norm() <= 2e-6 * e.norm(), (step, name)


def test_the_state_recovers_from_one_visit_at_a_bad_temperature(backend):
    """A batch whose negatives look like positives at tau = 0.005 (a gap of more than
    0.5), then good
    ones: the log state follows the recurrence in float64, and the gradient comes back. The official
    state does not."""
    b, d, tau = 16, 32, 0.005
    gamma = 0.98 if backend == "triton" else 0.8  # fewer visits in the slow interpreter
    eye = torch.eye(d)
    good = eye[:b], F.normalize(eye[:b] + 0.3 * eye[b:].sum(0) / 4, dim=1)
    bad_image = F.normalize(eye[:b].roll(1, 0) + eye[:b] * 0.2, dim=1)

    def grad(image, text, log_s, official, epoch):
        leaf = image.clone().requires_grad_()
        loss, stats = dro_contrastive(
            leaf, text, tau, tau, RHO, log_s_image=log_s[0], log_s_text=log_s[1], gamma=gamma,
            return_stats=True, backend=backend,
        )  # fmt: skip
        theirs = image.clone().requires_grad_()
        taus = torch.full((b,), tau)
        their_loss = official_contrastive(
            theirs, text, taus, taus, RHO, gamma, official, torch.arange(b), epoch
        )
        their_grad = torch.autograd.grad(their_loss, theirs)[0]
        return torch.autograd.grad(loss, leaf)[0], stats, their_grad

    official = {k: torch.zeros(b) for k in ("s_I", "b_I", "s_T", "b_T")}
    _, stats, _ = grad(bad_image, eye[:b], (None, None), official, 0)
    recurrence = stats.log_s_image.double()
    x = (good[0] @ good[1].T).double()
    x = (x - x.diagonal()[:, None]) / tau
    log_g = torch.logsumexp(x.fill_diagonal_(-math.inf), 1)
    gap = tau * (recurrence - log_g).max().item()
    assert gap > 0.5
    visits = math.ceil(gap / (tau * math.log(1 / (1 - gamma)))) + 5
    for _ in range(visits):
        ours, stats, theirs = grad(*good, stats[:2], official, 1)
        recurrence = torch.logaddexp(recurrence + math.log(1 - gamma), log_g + math.log(gamma))
        error = (stats.log_s_image - recurrence).abs().max()
        assert error <= visits * torch.finfo(torch.float32).eps * gap / tau  # one rounding a visit
    fresh, _, _ = grad(*good, (None, None), {k: v * 0 for k, v in official.items()}, 0)
    assert fresh.norm() > 0
    assert (ours - fresh).norm() <= 0.3 * fresh.norm()
    assert theirs.norm() <= 1e-3 * fresh.norm()
