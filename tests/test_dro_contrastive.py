"""The contrastive loss against its definition in float64."""

import math
import sys

import compare
import conftest
import pytest
import torch
import torch.nn.functional as F

from tempnet_kernels import _register, _similarity, dro_contrastive
from tempnet_kernels.reference.official import official_contrastive

MODULE = sys.modules["tempnet_kernels.dro_contrastive"]
BACKENDS = ["reference", "native"]
RHO = 7.0
NAMES = ("image", "text", "tau_image", "tau_text")


def make(m, d=24, n=None, dtype=torch.float32, low=0.1):
    n = n or m
    image = F.normalize(torch.randn(m, d), dim=1)
    text = torch.randn(n, d)
    text[:m] += 2 * image
    taus = (low + 0.2 * torch.rand(m) for _ in range(2))
    return (image.to(dtype), F.normalize(text, dim=1).to(dtype), *taus)


def definition(
    image, text, tau_image, tau_text, rho=RHO, *, gamma=1.0, log_s=(None, None), excluded=None,
    positive=None, include_positive=False,
):  # fmt: skip
    """(value, a function with its gradients, log_s of both sides, kl of both sides) as the formulas
    read, in the dtype of the input."""
    m, n = image.shape[0], text.shape[0]
    positive = torch.arange(m) if positive is None else positive
    similarity = image @ text.T
    s_positive = similarity.gather(1, positive[:, None])[:, 0]
    counts = torch.ones(m, n, dtype=torch.bool) if excluded is None else ~excluded
    counts = counts.scatter(1, positive[:, None], include_positive)
    value, surrogate, states, kls = 0.0, 0.0, [], []
    for h, tau, old, c in (
        (similarity - s_positive[:, None], tau_image, log_s[0], counts),
        ((similarity[:, positive] - s_positive).T, tau_text, log_s[1], counts[:, positive].T),
    ):
        number = c.sum(1)
        x = (h / tau[:, None]).detach().masked_fill(~c, -math.inf)
        log_g = torch.logsumexp(x, 1)
        log_new = log_g
        if old is not None:
            averaged = torch.log((1 - gamma) * old.exp() + gamma * log_g.exp())
            log_new = torch.where(old.isnan(), log_g, averaged)
        live = number > 0
        w = torch.where(c, torch.exp(x - log_new[:, None]), 0)
        x = torch.where(c, x, 0)
        k = torch.where(live, log_new - number.log() + rho - (w * x).sum(1), 0)
        term = tau.detach() * (log_new - number.log() + rho)
        value = value + torch.where(live, term, 0).sum() / m
        terms = (w * torch.where(c, h, 0)).sum(1) + k.detach() * tau
        surrogate = surrogate + torch.where(live, terms, 0).sum() / m
        states.append(torch.where(live, log_new, math.nan if old is None else old))
        p = torch.where(c, torch.exp(x - log_g[:, None]), 0)
        kl = number.log() - log_g + (p * x).sum(1)
        kls.append(torch.where(live, kl, math.nan))
    return value, surrogate, states, kls


def leaves(tensors, dtype=None):
    return [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]


def check(tensors, backend, log_s=(None, None), excluded=None, **options):
    """Value, statistics and the four gradients: 2e-6 of their norm."""
    own = {k: options.pop(k) for k in ("image_ids", "text_ids", "negative_mask") if k in options}
    exact = leaves(tensors, torch.float64)
    wide = tuple(None if old is None else old.double() for old in log_s)
    value, surrogate, states, kls = definition(*exact, log_s=wide, excluded=excluded, **options)
    grads = torch.autograd.grad(surrogate, exact)

    got = leaves(tensors)
    loss, stats = dro_contrastive(
        *got, RHO, log_s_image=log_s[0], log_s_text=log_s[1], return_stats=True, backend=backend,
        **own, **options,
    )  # fmt: skip
    got_grads = torch.autograd.grad(loss, got)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), value, rtol=2e-6, atol=0)
    for name, g, e, t in zip(NAMES, got_grads, grads, tensors, strict=True):
        assert g.dtype == t.dtype
        # Features of 16 bits round their gradient.
        bound = 2e-6 if g.dtype == torch.float32 else torch.finfo(g.dtype).eps
        assert (g.double() - e).norm() <= bound * e.norm(), name
    for g, e in zip(stats[:2], states, strict=True):
        torch.testing.assert_close(g.double(), e, rtol=2e-6, atol=2e-6, equal_nan=True)
    for g, e in zip(stats[2:4], kls, strict=True):
        live = ~e.isnan()
        assert torch.equal(live, ~g.isnan())
        if live.any():
            compare.assert_entropy_accurate(g[live], e[live], tensors[1].shape[0], "kl")
    return grads


def states(m):
    """Later visits, and first ones among them."""
    log_s = torch.randn(2, m) * 0.5 + math.log(m)
    log_s[0, ::3] = math.nan
    return tuple(log_s)


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles in both directions, the last ones ragged."""
    monkeypatch.setattr(_similarity, "TILE_ROWS", {"cpu": 64})
    monkeypatch.setattr(_similarity, "TILE_BYTES", {"cpu": 1})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gamma", [1.0, 0.8])
@pytest.mark.parametrize("b", [2, 7, 33, 513, 1030])  # within a strip, on and over its edge
def test_first_and_later_visits_match_the_definition(backend, gamma, b):
    tensors = make(b)
    grads = check(tensors, backend, gamma=gamma)
    assert all(g.norm() > 1e-3 for g in grads[:2])  # not all at the optimum
    check(tensors, backend, gamma=gamma, log_s=states(b))


@pytest.mark.parametrize("keep_bytes", [0, 64 << 20])
@pytest.mark.parametrize("m, n", [(130, 130), (65, 1100), (200, 1031)])
def test_tiles_match_the_definition_with_and_without_kept_similarities(
    small_tiles, monkeypatch, keep_bytes, m, n
):
    monkeypatch.setattr(MODULE, "KEEP_BYTES", keep_bytes)
    positive = torch.randperm(n)[:m]
    check(make(m, n=n), "native", gamma=0.8, log_s=states(m), positive=positive)


@pytest.mark.parametrize("simd_level", conftest.native_levels(), indirect=True)
def test_every_simd_level_matches_the_definition(simd_level):
    check(make(519), "native", gamma=0.8, log_s=states(519))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_features_of_16_bits_lose_only_the_gradient_s_rounding(backend, dtype):
    check(make(67, dtype=dtype), backend, gamma=0.8, log_s=states(67))


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_ids_are_not_negatives_of_each_other(backend, small_tiles):
    b = 150
    image_ids, text_ids = torch.randint(40, (b,)) + (1 << 40), torch.randint(100, (b,))
    same = (image_ids[:, None] == image_ids) | (text_ids[:, None] == text_ids)
    tensors = make(b)
    check(tensors, backend, image_ids=image_ids, text_ids=text_ids, excluded=same)
    only_image = image_ids[:, None] == image_ids
    check(tensors, backend, image_ids=image_ids, excluded=only_image, include_positive=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_mask_takes_false_negatives_out(backend, small_tiles):
    m, n = 70, 600
    negative = torch.rand(m, n) < 0.6
    positive = torch.randperm(n)[:m]
    check(make(m, n=n), backend, negative_mask=negative, excluded=~negative, positive=positive)


@pytest.mark.parametrize("backend", BACKENDS)
def test_anchor_without_negatives_has_no_term_and_keeps_its_state(backend):
    b = 9
    ids = torch.arange(b)
    negative = torch.ones(b, b, dtype=torch.bool)
    negative[4] = negative[:, 4] = False
    log_s = states(b)
    check(make(b), backend, negative_mask=negative, excluded=~negative, gamma=0.8, log_s=log_s)
    for tensors, options in ((make(1), {}), (make(5), {"image_ids": ids[:5] * 0})):
        got = leaves(tensors)
        m = got[0].shape[0]
        old = torch.full((m,), 0.5)
        loss, stats = dro_contrastive(
            *got, RHO, log_s_image=old, gamma=0.8, return_stats=True, backend=backend, **options
        )
        assert loss == 0
        assert torch.equal(stats.log_s_image, old)
        assert stats.log_s_text.isnan().all() and stats.kl_image.isnan().all()
        assert all((g == 0).all() for g in torch.autograd.grad(loss, got))


@pytest.mark.parametrize("backend", BACKENDS)
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


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    """At gamma = 1 the gradients are the derivative of the value."""
    tensors = leaves(make(5, d=3), torch.float64)
    assert torch.autograd.gradcheck(lambda *t: dro_contrastive(*t, 0.5, backend=backend), tensors)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("low", [0.005, 1e-3])
def test_small_temperatures_stay_finite(backend, low):
    tensors = make(40, low=low)
    got = leaves((*tensors[:2], tensors[2] * 0 + low, tensors[3] * 0 + low))
    loss = dro_contrastive(*got, RHO, backend=backend)
    grads = torch.autograd.grad(loss, got)
    assert all(t.isfinite().all() for t in (loss, *grads))
    exact = leaves(got, torch.float64)
    value, surrogate, *_ = definition(*exact)
    torch.testing.assert_close(loss.double(), value, rtol=1e-5, atol=0)
    # The exponent's error is that of a similarity in float32 over the temperature.
    for g, e in zip(grads, torch.autograd.grad(surrogate, exact), strict=True):
        assert (g - e).norm() <= 4 * torch.finfo(torch.float32).eps / low * e.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_0d_and_number_temperatures(backend):
    image, text, *_ = make(12)
    tau = torch.tensor(0.2, requires_grad=True)
    loss = dro_contrastive(image, text, tau, 0.3, RHO, backend=backend)
    (grad,) = torch.autograd.grad(loss, tau)
    rows = torch.full((12,), 0.2, requires_grad=True)
    same = dro_contrastive(image, text, rows, 0.3, RHO, backend=backend)
    assert torch.equal(loss, same)
    torch.testing.assert_close(grad, torch.autograd.grad(same, rows)[0].sum())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, 0.0, -1.0])
def test_bad_temperature_gives_nan(backend, bad):
    tensors = leaves(make(6))
    tau = tensors[2].detach().clone()
    tau[2] = bad
    old = torch.zeros(6)
    loss, stats = dro_contrastive(
        tensors[0], tensors[1], tau, tensors[3], log_s_image=old, gamma=0.5, return_stats=True,
        backend=backend,
    )  # fmt: skip
    assert loss.isnan()
    assert stats.log_s_image.isfinite().all()  # a bad batch does not reach the state
    assert torch.autograd.grad(loss, tensors[0])[0][2].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_feature_gives_nan_and_leaves_the_state(backend):
    image, text, *taus = make(6)
    text[3, 1] = math.nan
    old = torch.arange(6.0)
    loss, stats = dro_contrastive(
        image, text, *taus, log_s_text=old, gamma=0.5, return_stats=True, backend=backend
    )
    assert loss.isnan()
    assert stats.log_s_text[3] == old[3]


def test_equal_bits_from_run_to_run(small_tiles):
    tensors = make(300)

    def run():
        got = leaves(tensors)
        loss = dro_contrastive(*got, RHO, backend="native")
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


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_only_where_wanted_and_two_backwards_agree(backend):
    image, text, *taus = make(30)
    image.requires_grad_()
    loss = dro_contrastive(image, text, *taus, RHO, backend=backend)
    (first,) = torch.autograd.grad(loss, image, retain_graph=True)
    (again,) = torch.autograd.grad(loss, image)
    assert torch.equal(first, again)
    tau = taus[0].requires_grad_()
    loss = dro_contrastive(image.detach(), text, tau, 0.1, RHO, backend=backend)
    assert torch.autograd.grad(3 * loss, tau)[0].norm() > 0
    image, text, *taus = leaves((image, text, *taus))
    loss = dro_contrastive(image, text, *taus, backend=backend)
    with pytest.raises(RuntimeError, match="dro_contrastive: there is no second derivative"):
        torch.autograd.grad(loss, image, create_graph=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_pairs(backend):
    image = torch.zeros(0, 4, requires_grad=True)
    loss = dro_contrastive(image, torch.zeros(0, 4), 0.1, 0.1, backend=backend)
    assert loss.isnan()
    assert torch.autograd.grad(loss, image)[0].shape == (0, 4)


def test_one_temperature_per_anchor_not_per_candidate():
    """Raising text anchor 0's temperature does not change the images' terms."""
    image, text, tau_image, tau_text = make(8)
    hotter = tau_text.clone()
    hotter[0] *= 2
    stats = [
        dro_contrastive(image, text, tau_image, t, return_stats=True)[1] for t in (tau_text, hotter)
    ]
    assert torch.equal(stats[0].kl_image, stats[1].kl_image)
    assert torch.equal(stats[0].kl_text[1:], stats[1].kl_text[1:])
    assert stats[0].kl_text[0] > stats[1].kl_text[0]


@pytest.mark.parametrize("backend", BACKENDS)
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


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_state_recovers_from_one_visit_at_a_bad_temperature(backend):
    """A batch whose negatives look like positives at tau = 0.005 (a gap of more than
    0.5), then good
    ones: the log state follows the recurrence in float64, and the gradient comes back. The official
    state does not."""
    b, d, gamma, tau = 16, 32, 0.8, 0.005
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


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, device):
    if backend == "native" and device != "cpu":
        pytest.skip("the op has no CUDA kernel")
    image, text, tau_image, tau_text = (t.to(device) for t in make(9))
    op = getattr(torch.ops.tempnet.dro_contrastive_stats, backend)
    positive = torch.arange(9, device=device)
    ids = torch.empty((0, 9), dtype=torch.int32, device=device)
    mask = torch.empty((0, 9), dtype=torch.bool, device=device)
    # opcheck compares with ==, which the NaN of a column's positive fails: not autograd's business.
    tests = ("test_schema", "test_faketensor")
    arguments = (image, text, 1 / tau_image, 1 / tau_text, positive, ids, mask, True, True)
    torch.library.opcheck(op, arguments, test_utils=tests)
    rows, columns = torch.rand(2, 3, 9, device=device)
    options = (positive, ids, mask, True)
    for want in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(
            getattr(torch.ops.tempnet.dro_contrastive_grad, backend),
            (image, text, image.new_empty((0, 0)), rows, columns, rows[0], *options, *want),
            test_utils=tests,
        )
    if backend != "reference":
        similarity = image @ text.T
        states = torch.rand(2, 5, 9, device=device)
        stats = getattr(torch.ops.tempnet.similarity_stats_, backend)
        torch.library.opcheck(
            stats, (*states, similarity, 0, 0, 1 / tau_image, 1 / tau_text, *options),
            test_utils=tests,
        )  # fmt: skip
        weights = getattr(torch.ops.tempnet.similarity_weights_, backend)
        torch.library.opcheck(
            weights, (similarity.clone(), similarity, 0, 0, rows, columns, *options),
            test_utils=tests,
        )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_a_graph_break(backend, monkeypatch):
    monkeypatch.setattr(_register, "_available", {})  # as in the first call of a process

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


@pytest.mark.parametrize("backend", BACKENDS)
def test_func_grad(backend):
    tensors = make(7)
    functional = torch.func.grad(
        lambda image: dro_contrastive(image, *tensors[1:], RHO, backend=backend)
    )(tensors[0])
    got = leaves(tensors)
    loss = dro_contrastive(*got, RHO, backend=backend)
    assert torch.equal(functional, torch.autograd.grad(loss, got[0])[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_round_the_similarities(backend):
    tensors = make(20)

    def run():
        got = leaves(tensors)
        loss = dro_contrastive(*got, RHO, backend=backend)
        return (loss.detach(), *torch.autograd.grad(loss, got))

    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run()
    for got, expected in zip(inside, run(), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"image": torch.zeros(4)}, ValueError, "image must have 2 dimensions, got 1"),
        ({"image": [1.0]}, TypeError, "image must be a tensor, got list"),
        ({"text": torch.zeros(3, 8)}, ValueError, r"text must have shape \(N, 8\) with N >= 4"),
        ({"text": torch.zeros(4, 7)}, ValueError, r"got \(4, 7\)"),
        ({"text": torch.zeros(4, 8).half()}, TypeError, "text must be of image's torch.float32"),
        ({"tau_image": 0}, ValueError, "tau_image must be a finite number > 0, got 0"),
        ({"tau_text": torch.ones(5)}, ValueError, r"tau_text must have shape \(4,\), got \(5,\)"),
        ({"tau_text": torch.ones(4).int()}, TypeError, "tau_text must be of a floating-point"),
        ({"gamma": 0}, ValueError, r"gamma must be in \(0, 1\], got 0"),
        ({"rho": math.inf}, ValueError, "rho must be finite, got inf"),
        ({"log_s_text": torch.ones(3)}, ValueError, r"log_s_text must have shape \(4,\)"),
        ({"log_s_image": 1.0}, TypeError, "log_s_image must be a tensor"),
        ({"image_ids": torch.zeros(4)}, TypeError, "image_ids must be of an integer dtype"),
        ({"text_ids": torch.zeros(3).long()}, ValueError, r"text_ids must have shape \(4,\)"),
        ({"negative_mask": torch.ones(4, 4)}, TypeError, "negative_mask must be a bool tensor"),
        ({"positive": torch.tensor([0, 1, 2, 4])}, IndexError, r"positive\[3\] must be in \[0, 4"),
        ({"positive": torch.tensor([0, 1, 2, 2])}, ValueError, "positive must hold 4 different"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
        ({"backend": "triton"}, RuntimeError, "it has no Triton kernels"),
    ],
)
def test_bad_arguments_say_what_was_expected(change, error, message):
    arguments = {
        "image": torch.zeros(4, 8), "text": torch.zeros(4, 8), "tau_image": 0.1, "tau_text": 0.1,
    }  # fmt: skip
    with pytest.raises(error, match=f"dro_contrastive: .*{message}"):
        dro_contrastive(**(arguments | change))
