"""Values and gradients of the token loss against its definition in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from backends import BACKENDS, DTYPES, native_levels
from compare import (
    assert_entropy_accurate,
    assert_within_twice_plain,
    definition,
    statistics,
)
from token_loss import CUDA_SHAPES, RHO, check, expected, make, run

from tempnet_kernels import dro_cross_entropy

SHAPES = [
    (1, 1),  # one column
    (3, 7),
    (7, 33),  # ragged tile
    (5, 1000),
    (2, 4097),  # one column past a block
    (3, 9001),  # several blocks, ragged
]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_value_and_gradients_match_the_definition(backend, shape, dtype, reduction, device):
    logits, target, tau = make(shape, dtype, device)
    if shape[1] > 1:
        p = torch.softmax(logits.double() / tau.double()[:, None], 1)
        assert ((p > 0.01) & (p < 0.99)).any(), "a trivial softmax would prove nothing"
    check(backend, logits, target, tau, reduction=reduction)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("n, v, first", CUDA_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_plan_of_a_gpu_matches_the_definition(dtype, n, v, first):
    """More rows than multiprocessors: other launches than those of the small shapes above."""
    logits, target, tau = make((n, v), dtype, "cuda")
    wide = torch.full((n, -(-(v + first) // 8) * 8), math.nan, dtype=dtype, device="cuda")
    wide[:, first : first + v] = logits
    exact = expected(logits, target, tau, torch.float64)
    plain = expected(logits, target, tau, torch.float32)
    leaf = wide[:, first : first + v].detach().requires_grad_()
    t = tau.clone().requires_grad_()
    loss, stats = dro_cross_entropy(leaf, target, t, RHO, return_stats=True, backend="native")
    with_argmax = loss.detach(), *torch.autograd.grad(loss, (leaf, t))
    assert torch.equal(stats.argmax, torch.where(target == -100, -1, logits.argmax(1)))
    names = ("loss", "grad_logits", "grad_tau")
    for got in (run("native", logits, target, tau), with_argmax):
        for name, g, e, p in zip(names, got, exact, plain, strict=True):
            assert_within_twice_plain(g, e, p, name)


@pytest.mark.parametrize("label_smoothing, z_loss", [(0.1, 0.0), (0.0, 1e-2), (0.2, 1e-3)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_label_smoothing_and_z_loss(backend, dtype, label_smoothing, z_loss, device):
    logits, target, tau = make((6, 4999), dtype, device)
    for reduction in ("mean", "none"):
        check(
            backend,
            logits,
            target,
            tau,
            reduction=reduction,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
        )


@pytest.mark.parametrize("simd_level", native_levels(), indirect=True)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_every_simd_level_is_as_accurate(simd_level, dtype):
    logits, target, tau = make((5, 9001), dtype)
    tau = tau.to(torch.float64 if dtype == torch.float64 else torch.float32)
    for reduction in ("mean", "none"):
        check("native", logits, target, tau, reduction=reduction, label_smoothing=0.1, z_loss=1e-3)


@pytest.fixture
def two_passes(monkeypatch):
    """Rows that fit in registers go through the kernel for those that do not."""
    from tempnet_kernels.triton import dro_cross_entropy as kernels

    monkeypatch.setattr(kernels, "ONE_PASS_COLUMNS", 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 20000)], ids=str)
def test_two_pass_kernel_matches_the_definition(two_passes, shape, dtype, device):
    logits, target, tau = make(shape, dtype, device)
    check("triton", logits, target, tau)
    check("triton", logits, target, tau, label_smoothing=0.1, z_loss=1e-2)


@pytest.mark.parametrize("tau", [1.0, 0.005])
def test_two_pass_kernel_on_odd_rows(two_passes, tau, device):
    logits = torch.randn(6, 20000, device=device) * 3 * tau + 1e4
    logits[0, :17000] = -math.inf
    logits[1, 19000] = math.nan
    logits[2, 5] = math.inf
    logits[3] = -math.inf
    logits[4, [9000, 19999]] = 2e4
    target = torch.arange(6, device=device) + 19000
    tau = torch.full((6,), tau, device=device)
    results = []
    for backend in ("triton", "reference"):
        z = logits.clone().requires_grad_()
        wide = z * 1.0
        loss, stats = dro_cross_entropy(
            wide, target, tau, RHO, reduction="sum", return_stats=True, overwrite_logits=True,
            backend=backend,
        )  # fmt: skip
        loss.backward()
        results.append((*stats, z.grad))
    assert results[0][4].tolist() == [*results[1][4].tolist()[:4], 9000, results[1][4][5].item()]
    assert results[0][4][1:4].tolist() == [-1, -1, -1]
    for got, other in zip(results[0], results[1], strict=True):
        if got.dtype == torch.int64:
            continue
        rows = [0, 4, 5]
        torch.testing.assert_close(got[rows], other[rows], rtol=1e-5, atol=2e-5)
    assert results[0][-1][1:4].isnan().any(1).all()


@pytest.mark.parametrize("simd_level", native_levels(), indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_value_is_read_and_rounded_as_torch_does(simd_level, dtype):
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)[None]
    for factor in (2.0, 0.37, 1e-3, 3e4):
        got = values.clone()
        torch.ops.tempnet.scale_rows_.native(got, torch.tensor([factor]))
        expected = (values.float() * factor).to(dtype)
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_cross_entropy_at_tau_one_and_rho_log_v(backend, device):
    logits, target, _ = make((9, 500), device=device)
    z = logits.clone().requires_grad_()
    loss = dro_cross_entropy(z, target, 1.0, math.log(500), backend=backend)
    loss.backward()
    w = logits.clone().requires_grad_()
    plain = F.cross_entropy(w, target)
    plain.backward()
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(z.grad, w.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("offset", [0.0, 200.0, 1e4])
@pytest.mark.parametrize("tau", [1.0, 0.1, 0.01, 0.005])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_entropy_and_tau_gradient_survive_small_tau_and_large_offsets(
    backend, dtype, tau, offset, device
):
    v = 4096 if backend == "triton" else 32000
    logits = (torch.randn(4, v, device=device) * 3 * tau + offset).to(dtype)
    target = torch.randint(0, v, (4,), device=device)
    tau = torch.full((4,), tau, device=device)
    t = tau.clone().requires_grad_()
    loss, stats = dro_cross_entropy(
        logits, target, t, RHO, reduction="none", return_stats=True, backend=backend
    )
    (grad_tau,) = torch.autograd.grad(loss.sum(), t)
    lse, entropy, kl = statistics(logits, tau)
    if dtype == torch.float32 and offset < 1e4:
        assert entropy.mean() > 0.5, "a trivial entropy would prove nothing"
    assert_entropy_accurate(stats.entropy, entropy, v, "entropy")
    assert_entropy_accurate(stats.kl, kl, v, "kl")
    assert_entropy_accurate(grad_tau, RHO - kl, v, "grad_tau")
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(stats.lse.double(), lse, rtol=2 * eps, atol=2 * eps * math.log(v))
    exact = definition(logits.double(), target, tau.double(), RHO)
    # The loss is a difference of logits: its error must not grow with their offset.
    scale = (logits.double().amax(1) - logits.double().gather(1, target[:, None])[:, 0]).abs()
    bound = 4 * eps * (scale.max() + tau[0].double() * (math.log(v) + RHO))
    assert (loss.double() - exact).abs().max() <= bound
    log_prob = torch.log_softmax(logits.double() / tau.double()[:, None], 1)
    log_prob = log_prob.gather(1, target[:, None])[:, 0]
    assert (stats.log_prob.double() - log_prob).abs().max() <= 4 * eps * log_prob.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_come_with_the_loss(backend, device):
    logits, target, tau = make((6, 5000), device=device)
    target = target.view(2, 3)
    loss, stats = dro_cross_entropy(
        logits.view(2, 3, -1), target, tau.view(2, 3), return_stats=True, backend=backend
    )
    assert loss.shape == () and all(s.shape == (2, 3) for s in stats)
    assert not any(s.requires_grad for s in stats)
    lse, entropy, kl = statistics(logits, tau)
    live = (target != -100).flatten()
    for got, exact in ((stats.lse, lse), (stats.entropy, entropy), (stats.kl, kl)):
        torch.testing.assert_close(got.flatten()[live].double(), exact[live], rtol=1e-6, atol=2e-5)
        assert got.flatten()[~live].isnan().all()
    assert (stats.argmax.flatten() == torch.where(live, logits.argmax(1), -1)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_argmax_is_the_first_of_equal_logits(backend, device):
    logits = torch.zeros(3, 4500, device=device)
    logits[1, [17, 4200]] = 2.0
    logits[2, 4300:] = 1.0
    _, stats = dro_cross_entropy(
        logits, torch.zeros(3, dtype=torch.int64, device=device), return_stats=True, backend=backend
    )
    assert stats.argmax.tolist() == [0, 17, 4300]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_upstream_gradient_scales_every_gradient(backend, dtype, device):
    logits, target, tau = make((5, 700), dtype, device)
    one = run(backend, logits, target, tau)
    three = run(backend, logits, target, tau, upstream=torch.tensor(3.0, device=device))
    info = torch.finfo(dtype)
    torch.testing.assert_close(
        three[1].float(),
        3 * one[1].float(),
        rtol=info.eps,
        atol=4 * info.smallest_normal * info.eps,
    )
    torch.testing.assert_close(three[2], 3 * one[2], rtol=1e-6, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_row_weights_scale_rows_and_get_a_gradient(backend, reduction, device):
    logits, target, tau = make((6, 321), device=device)
    weight = torch.rand(6, device=device) + 0.2
    weight[3] = 0.0
    check(backend, logits, target, tau, reduction=reduction, row_weight=weight)
    w = weight.double().requires_grad_()
    rows = definition(logits.double(), target, tau.double(), RHO)
    live = (target != -100).double()
    exact = (rows * w).sum() / ((w * live).sum() if reduction == "mean" else 1)
    exact.backward()
    got = weight.clone().requires_grad_()
    loss = dro_cross_entropy(
        logits, target, tau, RHO, row_weight=got, reduction=reduction, backend=backend
    )
    loss.sum().backward()
    torch.testing.assert_close(got.grad.double(), w.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_normalizer_replaces_the_count(backend, as_tensor, device):
    logits, target, tau = make((6, 100), device=device)
    weight = torch.tensor([1.0, 2.0, -0.5, 1.0, -3.0, 1.0], device=device)  # signed: advantages
    normalizer = torch.tensor(40.0, device=device) if as_tensor else 40
    w = weight.clone().requires_grad_()
    loss = dro_cross_entropy(
        logits, target, tau, RHO, row_weight=w, normalizer=normalizer, backend=backend
    )
    loss.backward()
    rows = definition(logits.double(), target, tau.double(), RHO)
    torch.testing.assert_close(loss.double(), (rows * weight).sum() / 40, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(w.grad.double(), rows / 40, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["number", "0-d", "per row", "bfloat16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_tau_as_number_scalar_or_rows(backend, kind, device):
    logits, target, _ = make((5, 64), device=device)
    tau = {
        "number": 0.75,
        "0-d": torch.tensor(0.75, device=device, requires_grad=True),
        "per row": torch.full((5,), 0.75, device=device, requires_grad=True),
        "bfloat16": torch.full((5,), 0.75, device=device, dtype=torch.bfloat16, requires_grad=True),
    }[kind]
    loss = dro_cross_entropy(logits, target, tau, RHO, backend=backend)
    _, _, kl = statistics(logits, torch.full((5,), 0.75, device=device))
    live = target != -100
    rows = definition(logits.double(), target, torch.full((5,), 0.75, device=device).double(), RHO)
    torch.testing.assert_close(loss.double(), rows.sum() / live.sum(), rtol=1e-6, atol=1e-6)
    if kind == "number":
        return
    loss.backward()
    exact = torch.where(live, RHO - kl, 0) / live.sum()
    assert tau.grad.dtype == tau.dtype
    exact = exact.sum() if kind == "0-d" else exact
    eps = torch.finfo(tau.dtype).eps
    torch.testing.assert_close(tau.grad.double(), exact, rtol=eps, atol=4e-6)


@pytest.mark.parametrize("target_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_target_dtypes_and_strides(backend, target_dtype, device):
    logits, target, tau = make((6, 77), device=device)
    strided = target.to(target_dtype)[:, None].expand(6, 2).contiguous()[:, 0]
    assert strided.stride(0) == 2
    got = run(backend, logits, strided, tau)
    for g, e in zip(got, run(backend, logits, target, tau), strict=True):
        assert torch.equal(g, e)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_padded_vocabulary_is_a_view_and_pads_get_no_gradient(backend, overwrite, device):
    padded = torch.randn(2, 3, 1040, device=device) * 3
    target = torch.randint(0, 1000, (2, 3), device=device)
    tau = torch.rand(2, 3, device=device) + 0.5
    leaf = padded.clone().requires_grad_()
    wide = leaf * 1.0
    loss = dro_cross_entropy(
        wide[..., :1000], target, tau, RHO, overwrite_logits=overwrite, backend=backend
    )
    (2 * loss).backward()
    exact = padded[..., :1000].double().requires_grad_()
    (2 * definition(exact, target, tau.double(), RHO).mean()).backward()
    assert (leaf.grad[..., 1000:] == 0).all()
    torch.testing.assert_close(leaf.grad[..., :1000].double(), exact.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_overwrite_logits_gives_the_same_gradient_in_the_same_storage(backend, dtype, device):
    logits, target, tau = make((6, 2048), dtype, device)
    expected_loss, expected_grad, _ = run(backend, logits, target, tau)
    leaf = logits.clone().requires_grad_()
    wide = leaf * 1.0
    address = wide.data_ptr()
    loss = dro_cross_entropy(wide, target, tau, RHO, overwrite_logits=True, backend=backend)
    loss.backward()
    assert torch.equal(loss.detach(), expected_loss)
    assert torch.equal(leaf.grad, expected_grad)
    assert leaf.grad.data_ptr() == address or torch.equal(wide.detach(), expected_grad)


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("reduction", ["none"])
def test_gradcheck_in_float64(backend, reduction):
    logits = torch.randn(4, 11, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([3, -100, 0, 10])
    tau = (torch.rand(4, dtype=torch.float64) + 0.4).requires_grad_()
    weight = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def rows(z, t, w):
        return dro_cross_entropy(
            z, target, t, RHO, row_weight=w, label_smoothing=0.1, z_loss=0.05,
            reduction=reduction, backend=backend,
        )  # fmt: skip

    assert torch.autograd.gradcheck(rows, (logits, tau, weight))


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_float64_is_computed_in_float64(backend):
    logits = torch.randn(3, 5000, dtype=torch.float64) * 3
    target, tau = torch.tensor([1, 4999, 7]), torch.rand(3, dtype=torch.float64) + 0.5
    got = run(backend, logits, target, tau)
    exact = expected(logits, target, tau, torch.float64)
    for g, e in zip(got, exact, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_do_not_change_between_runs(backend, device):
    logits, target, tau = make((8, 6000), torch.bfloat16, device)
    first = run(backend, logits, target, tau)
    for _ in range(2):
        for g, e in zip(run(backend, logits, target, tau), first, strict=True):
            assert torch.equal(g, e)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_a_row_that_threads_share_has_the_bits_of_one_thread(dtype):
    """Slices of a row are apart where rows are fewer than threads."""
    v = 40000  # of 16384 columns a slice, the last one ragged
    logits = torch.randn(3, v).to(dtype) * 3
    logits[0, 39000] = logits[0].max() + 1  # the largest is in the last slice
    target = torch.tensor([39999, -100, 20000])
    tau = torch.tensor([0.7, 1.0, math.nan], dtype=torch.promote_types(dtype, torch.float32))

    def step(rows):
        z = logits[rows].requires_grad_()
        options = {"label_smoothing": 0.1, "z_loss": 0.01, "return_stats": True}
        loss, stats = dro_cross_entropy(
            z, target[rows], tau[rows], RHO, reduction="sum", backend="native", **options
        )
        return loss.detach(), *torch.autograd.grad(loss, z), *stats

    threads = torch.get_num_threads()
    try:
        for i in range(3):
            row = slice(i, i + 1)
            torch.set_num_threads(1)
            alone = step(row)
            torch.set_num_threads(4)
            for got, expected_bits in zip(step(row), alone, strict=True):
                assert torch.equal(got.nan_to_num(7), expected_bits.nan_to_num(7))
            assert alone[-2].item() == (39000 if i == 0 else -1)
    finally:
        torch.set_num_threads(threads)
