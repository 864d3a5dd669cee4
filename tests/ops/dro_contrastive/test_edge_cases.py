"""The contrastive loss: what odd input gets, and what PyTorch must be able to do with it."""

import math

import pytest
import torch
from contrastive import RHO, check, definition, leaves, make, states

from tempnet_kernels import dro_contrastive


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


@pytest.mark.parametrize(
    "strided",
    [
        lambda image, text: torch.stack([image, text], 1).unbind(1),
        lambda image, text: torch.cat([image, text], 1).chunk(2, 1),
        lambda image, text: (image.T.contiguous().T, text.T.contiguous().T),
        lambda image, text: (image, text[:1].expand(text.shape)),
    ],
    ids=["unbind", "chunk", "transposed", "expanded"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_features_of_any_stride(backend, strided, dtype):
    """In every operator, that of the positives' share too."""
    image, text, *taus = make(40, 24)
    image, text = strided(image.to(dtype), text.to(dtype))
    assert not (image.is_contiguous() and text.is_contiguous())
    found, dense = [], []
    for x, results in (((image, text), found), ((image.clone(), text.clone()), dense)):
        if results is dense:
            x = [t.contiguous() for t in x]
        x = [t.detach().requires_grad_() for t in x]
        loss = dro_contrastive(*x, *taus, RHO, backend=backend)
        results += [loss, *torch.autograd.grad(loss, x)]
    bound = 2e-6 if dtype == torch.float32 else 1e-2
    for got, expected in zip(found, dense, strict=True):
        assert (got - expected).abs().max() <= bound * expected.abs().max()


def test_statistics_may_be_written_into(backend):
    got = leaves(make(9))
    loss, stats = dro_contrastive(*got, RHO, return_stats=True, backend=backend)
    expected = torch.autograd.grad(dro_contrastive(*got, RHO, backend=backend), got)
    for x in stats:
        x.fill_(7.0)
    for g, e in zip(torch.autograd.grad(loss, got), expected, strict=True):
        assert torch.equal(g, e)


def test_0d_and_number_temperatures(backend):
    image, text, *_ = make(12)
    tau = torch.tensor(0.2, requires_grad=True)
    loss = dro_contrastive(image, text, tau, 0.3, RHO, backend=backend)
    (grad,) = torch.autograd.grad(loss, tau)
    rows = torch.full((12,), 0.2, requires_grad=True)
    same = dro_contrastive(image, text, rows, 0.3, RHO, backend=backend)
    assert torch.equal(loss, same)
    torch.testing.assert_close(grad, torch.autograd.grad(same, rows)[0].sum())


@pytest.mark.parametrize("bad", [math.nan, 0.0, -1.0, math.inf])
def test_bad_temperature_gives_nan(backend, bad):
    tensors = leaves(make(6))
    tau = tensors[2].detach().clone()
    tau[2] = bad
    old = torch.zeros(6)
    loss, stats = dro_contrastive(
        tensors[0], tensors[1], tau, tensors[3], RHO, log_s_image=old, gamma=0.5, return_stats=True,
        backend=backend,
    )  # fmt: skip
    assert loss.isnan()
    assert stats.log_s_image.isfinite().all()  # a bad batch does not reach the state
    assert torch.autograd.grad(loss, tensors[0])[0][2].isnan().all()


def test_nan_feature_gives_nan_and_leaves_the_state(backend):
    image, text, *taus = make(6)
    text[3, 1] = math.nan
    old = torch.arange(6.0)
    loss, stats = dro_contrastive(
        image, text, *taus, log_s_text=old, gamma=0.5, return_stats=True, backend=backend
    )
    assert loss.isnan()
    assert stats.log_s_text[3] == old[3]


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
    loss = dro_contrastive(image, text, *taus, RHO, backend=backend)
    with pytest.raises(RuntimeError, match="dro_contrastive: there is no second derivative"):
        torch.autograd.grad(loss, image, create_graph=True)


def test_no_pairs(backend):
    image = torch.zeros(0, 4, requires_grad=True)
    loss = dro_contrastive(image, torch.zeros(0, 4), 0.1, 0.1, backend=backend)
    assert loss.isnan()
    assert torch.autograd.grad(loss, image)[0].shape == (0, 4)
    text = torch.zeros(5, 4, requires_grad=True)  # a rank without anchors
    loss = dro_contrastive(image, text, 0.1, 0.1, backend=backend)
    assert loss.isnan()
    assert (torch.autograd.grad(loss, text)[0] == 0).all()


def test_positive_out_of_range_is_nan_where_it_cannot_be_read():
    """Compiled, and on a GPU: no read out of bounds."""
    torch.compiler.reset()
    image, text, *_ = make(6)
    compiled = torch.compile(
        lambda positive: dro_contrastive(image, text, 0.1, 0.1, positive=positive),
        fullgraph=True, backend="aot_eager",
    )  # fmt: skip
    assert compiled(torch.arange(6)).isfinite()
    assert compiled(torch.tensor([0, 1, 2, 3, 4, 6])).isnan()


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
        ({"rho": math.inf}, ValueError, "rho must be a finite number >= 0, got inf"),
        ({"rho": -1}, ValueError, "rho must be a finite number >= 0, got -1"),
        (
            {"tau_text": torch.ones(4, requires_grad=True)},
            ValueError,
            "rho must be given where a temperature learns",
        ),
        ({"log_s_text": torch.ones(3)}, ValueError, r"log_s_text must have shape \(4,\)"),
        ({"log_s_image": 1.0}, TypeError, "log_s_image must be a tensor"),
        ({"image_ids": torch.zeros(4)}, TypeError, "image_ids must be of an integer dtype"),
        ({"text_ids": torch.zeros(3).long()}, ValueError, r"text_ids must have shape \(4,\)"),
        ({"negative_mask": torch.ones(4, 4)}, TypeError, "negative_mask must be a bool tensor"),
        ({"positive": torch.tensor([0, 1, 2, 4])}, IndexError, r"positive\[3\] must be in \[0, 4"),
        ({"positive": torch.tensor([0, 1, 2, 2])}, ValueError, "positive must hold 4 different"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_arguments_say_what_was_expected(change, error, message):
    arguments = {
        "image": torch.zeros(4, 8), "text": torch.zeros(4, 8), "tau_image": 0.1, "tau_text": 0.1,
    }  # fmt: skip
    with pytest.raises(error, match=f"dro_contrastive: .*{message}"):
        dro_contrastive(**(arguments | change))


def test_float64_on_a_backend_without_it_raises(device):
    image = torch.zeros(4, 8, device=device).double()
    with pytest.raises(TypeError, match=r"image must be .* for backend 'triton' on .*float64"):
        dro_contrastive(image, image, 0.1, 0.1, backend="triton")
