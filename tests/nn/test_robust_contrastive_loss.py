"""RobustContrastiveLoss: methods, state, and wrong arguments."""

import copy
import math

import contrastive
import pytest
import torch
import torch.nn.functional as F
from robust_contrastive import SAMPLES, B, D, features, make
from torch.utils.checkpoint import checkpoint

from tempnet_kernels import dro_contrastive
from tempnet_kernels.nn import RobustContrastiveLoss


@pytest.mark.parametrize("method", ["sogclr", "isogclr", "tempnet"])
def test_state_follows_the_recurrence(method):
    gamma = 0.8
    loss_fn = make(method, gamma=gamma)
    expected = torch.full((2, SAMPLES), math.nan, dtype=torch.float64)
    for _ in range(4):
        image, text = features()
        ids = torch.randperm(SAMPLES)[:B]
        loss_fn(image, text, ids).backward()
        similarity = (image @ text.T).detach().double()
        for side, s, tau in zip((0, 1), (similarity, similarity.T), loss_fn._taus, strict=True):
            x = (s - s.diagonal()[:, None]) / tau.double().expand(B)[:, None]
            log_g = torch.logsumexp(x.fill_diagonal_(-math.inf), 1)
            old = expected[side, ids]
            new = torch.log((1 - gamma) * old.exp() + gamma * log_g.exp())
            expected[side, ids] = torch.where(old.isnan(), log_g, new)
    assert 0 < expected.isnan().sum() < expected.numel()
    for side, name in enumerate(("log_s_image", "log_s_text")):
        got = loss_fn.state.state_dict()[name].double()
        torch.testing.assert_close(got, expected[side], rtol=1e-5, atol=1e-5, equal_nan=True)


def test_of_equal_ids_the_last_state_is_kept_and_they_are_no_negatives():
    ids = torch.tensor([3, 7, 3, 5, 7, 7, 1, 2, 4, 6, 8, 9])
    image, text = features()
    loss_fn = make("sogclr", tau=0.1)
    value, stats = loss_fn(image, text, ids, return_stats=True)
    same, expected = dro_contrastive(
        image, text, 0.1, 0.1, 1.0, gamma=0.8, image_ids=ids, text_ids=ids, return_stats=True
    )
    assert torch.equal(value, same)
    for name, log_s in (("log_s_image", expected.log_s_image), ("log_s_text", expected.log_s_text)):
        for sample, last in ((3, 2), (7, 5), (5, 3)):
            assert loss_fn.state.state_dict()[name][sample] == log_s[last]
    assert not torch.equal(stats.log_s_image[0], stats.log_s_image[2])


def test_captions_of_one_image_are_no_negatives():
    image, text = features()
    image_ids = torch.arange(B) // 2
    loss_fn = make("sogclr", tau=0.1)
    value = loss_fn(image, text, torch.arange(B), image_ids=image_ids, text_ids=torch.arange(B))
    assert torch.equal(value, dro_contrastive(image, text, 0.1, 0.1, 1.0, image_ids=image_ids))


@pytest.mark.parametrize("change", ["update_state=False", "eval", "clip"])
def test_state_is_left_alone(change):
    loss_fn = make("clip" if change == "clip" else "isogclr")
    image, text = features()
    ids = torch.arange(B)
    first = loss_fn(image, text, ids)
    saved = copy.deepcopy(loss_fn.state_dict())
    if change == "eval":
        loss_fn.eval()
    again = loss_fn(image, text, ids, update_state=change != "update_state=False")
    for name, value in loss_fn.state_dict().items():
        torch.testing.assert_close(value, saved[name], rtol=0, atol=0, equal_nan=True)
    if change == "clip":
        assert torch.equal(first, again)


@pytest.mark.parametrize("masked", [False, True])
def test_clip_is_open_clip_s_loss(masked):
    loss_fn = make("clip", samples=0)
    image, text = features()
    ids = torch.arange(B) % 9 if masked else None
    value = loss_fn(image, text, ids)
    got = torch.autograd.grad(value, (image, text, loss_fn.logit_scale))
    exact = [t.detach().double().requires_grad_() for t in (image, text, loss_fn.logit_scale)]
    logits = exact[2].exp() * exact[0] @ exact[1].T
    if masked:
        same = (ids[:, None] == ids) & ~torch.eye(B, dtype=torch.bool)
        logits = logits.masked_fill(same, -math.inf)
    y = torch.arange(B)
    expected = (F.cross_entropy(logits, y) + F.cross_entropy(logits.T, y)) / 2
    torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=1e-6)
    for g, e in zip(got, torch.autograd.grad(expected, exact), strict=True):
        assert (g - e).norm() <= 2e-5 * e.norm()
    assert loss_fn.temperature_stats().text.mean == pytest.approx(0.07)
    assert [name for name, _ in loss_fn.named_parameters()] == ["logit_scale"]


def isogclr_step(tau, u, k):
    u = 0.5 * u + 0.5 * k.clamp(-5, 5)
    return (tau - 0.03 * u).clamp(0.17, 0.21), u


@pytest.mark.parametrize("estimator", ["log", "official"])
def test_isogclr_moves_its_table_by_its_rule(estimator):
    loss_fn = make(
        "isogclr", tau=0.2, tau_min=0.17, tau_max=0.21, rho=1.5, estimator=estimator, gamma=1.0
    )
    tau = torch.full((SAMPLES,), 0.2, dtype=torch.float64)
    u = torch.zeros(SAMPLES, dtype=torch.float64)
    for step in range(3):
        image, text = features()
        ids = torch.randperm(SAMPLES)[:B]
        loss_fn(image, text, ids, epoch=step)
        s = (image @ text.T).detach().double()
        x = ((s - s.diagonal()[:, None]) / tau[ids, None]).fill_diagonal_(-math.inf)
        log_p = torch.log_softmax(x, 1)
        entropy = -torch.where(log_p.isfinite(), log_p.exp() * log_p, 0).sum(1)
        k = 1.5 - math.log(B - 1) + entropy  # rho - kl
        tau[ids], u[ids] = isogclr_step(tau[ids], u[ids], k)
    assert tau.unique().numel() > 10 and tau.min() == 0.17  # some are at the bound
    torch.testing.assert_close(loss_fn.state.tau_image.double(), tau, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss_fn.state.u_image.double(), u, rtol=1e-4, atol=1e-5)


def test_isogclr_leaves_the_table_where_there_is_no_negative():
    loss_fn = make("isogclr")
    image, text = features(1)
    loss_fn(image, text, torch.tensor([4]))
    assert (loss_fn.state.tau_image == torch.tensor(0.01)).all()
    assert (loss_fn.state.u_text == 0).all() and loss_fn.state.log_s_text.isnan().all()


def test_gradients_of_later_visits_match_the_definition():
    """Features and networks, with the moving average of earlier batches behind them."""
    loss_fn = make("tempnet", gamma=0.8)
    networks = [loss_fn.image_temp_gen, loss_fn.text_temp_gen]
    for network in networks:
        network.dropout = 0.0
        torch.nn.init.normal_(network.linear_1.weight)
        torch.nn.init.zeros_(network.scaler)
    for step in range(3):
        image, text = features()
        ids = torch.randperm(SAMPLES)[:B]
        log_s = [loss_fn.state.state_dict()[f"log_s_{x}"][ids].double() for x in ("image", "text")]
        loss_fn(image, text, ids).backward()
        exact = [t.detach().double().requires_grad_() for t in (image, text)]
        twins = [copy.deepcopy(network).double() for network in networks]
        taus = [twin(f) for twin, f in zip(twins, exact, strict=True)]
        contrastive.definition(*exact, *taus, 1.0, gamma=0.8, log_s=log_s)[1].backward()
        assert all((x.isfinite().any(), x.isnan().any()) == (step > 0, True) for x in log_s)
        for own, twin in zip((image, text), exact, strict=True):
            assert (own.grad - twin.grad).norm() <= 2e-5 * twin.grad.norm(), step
        for network, twin in zip(networks, twins, strict=True):
            for p, q in zip(network.parameters(), twin.parameters(), strict=True):
                assert (p.grad - q.grad).norm() <= 1e-4 * q.grad.norm(), step
                p.grad = None
    low = loss_fn.temperature_stats().image
    assert 0.005 <= low.min <= low.mean <= low.max <= 0.05


@pytest.mark.parametrize("method", ["clip", "sogclr", "isogclr", "tempnet"])
def test_a_batch_that_overflowed_leaves_no_trace(method):
    loss_fn = make(method)
    image, text = features()
    ids = torch.arange(B)
    loss_fn(image, text, ids)
    bad = image.detach().clone()
    bad[3, 0] = math.inf
    assert loss_fn(bad, text, ids).isnan()
    assert all(value[:B].isfinite().all() for value in loss_fn.state.state_dict().values())
    value = loss_fn(image, text, ids)
    assert value.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(value, (image, text)))


def test_clip_s_temperature_comes_back_from_its_bound():
    loss_fn = make("clip")
    torch.nn.init.constant_(loss_fn.logit_scale, math.log(100) + 0.5)  # a step too far
    image, text = (F.normalize(torch.randn(B, D), dim=1) for _ in range(2))  # unrelated
    optimizer = torch.optim.SGD(loss_fn.parameters(), lr=0.01)
    loss_fn(image, text).backward()
    assert loss_fn.temperature_stats().image.mean == torch.tensor(0.01)
    assert loss_fn.logit_scale.grad > 0
    before = loss_fn.logit_scale.item()
    optimizer.step()
    assert loss_fn.logit_scale < before
    # A gradient that leads further out is none.
    loss_fn.logit_scale.grad = None
    (-loss_fn(image, text)).backward()
    assert loss_fn.logit_scale.grad == 0
    loss_fn.load_state_dict({"logit_scale": torch.tensor(2.0)})  # open_clip's is 0-d
    assert loss_fn.logit_scale.shape == (1,)


def test_update_state_false_repeats_the_loss_bit_for_bit():
    loss_fn = make("tempnet")
    image, text = features()
    ids = torch.arange(B)
    loss_fn(image, text, ids)
    assert torch.equal(
        *(loss_fn(image, text, ids, update_state=False) for _ in range(2))
    )  # fmt: skip
    assert loss_fn.image_temp_gen.dropout_step == 1
    region = checkpoint(
        lambda a, b: loss_fn(a, b, ids, update_state=False), image, text, use_reentrant=False
    )
    region.backward()
    expected = loss_fn(image, text, ids, update_state=False)
    (grad,) = torch.autograd.grad(expected, image)
    torch.testing.assert_close(image.grad, grad)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32], ids=str)
def test_ids_of_every_integer_dtype(dtype):
    image, text = features()
    ids = torch.tensor([1, 1, *range(2, B)])
    wide, narrow = make("sogclr"), make("sogclr")
    assert torch.equal(wide(image, text, ids), narrow(image, text, ids.to(dtype)))
    assert torch.equal(wide.state.log_s_image[1:B], narrow.state.log_s_image[1:B])
    assert wide.state.log_s_image[1:B].isfinite().all() and narrow.state.log_s_image[0].isnan()


def test_held_out_pairs_need_no_ids():
    loss_fn = make("sogclr", tau=0.1)
    image, text = features()
    loss_fn(image, text, torch.arange(B))
    value = loss_fn.eval()(image, text)
    assert torch.equal(value, dro_contrastive(image, text, 0.1, 0.1, 1.0, gamma=0.8))
    with pytest.raises(ValueError, match="ids must be given for method 'isogclr'"):
        make("isogclr").eval()(image, text)


@pytest.mark.parametrize("method", ["clip", "sogclr", "isogclr", "tempnet"])
@pytest.mark.parametrize("b", [0, 1])
def test_no_pairs_and_one_pair(method, b):
    loss_fn = make(method)
    image, text = features(b)
    value = loss_fn(image, text, torch.arange(b))
    assert value.isnan() if b == 0 else value.abs() < 1e-6
    value.backward()
    assert (image.grad == 0).all() and image.grad.shape == (b, D)
    per_sample = method in ("isogclr", "tempnet")
    assert loss_fn.temperature_stats().image.mean.isnan() == (b == 0 and per_sample)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "siglip"}, "method must be one of"),
        ({"method": "sogclr", "gamma": 0}, r"gamma must be in \(0, 1\], got 0"),
        ({"method": "isogclr", "num_samples": 0}, "num_samples must be an integer >= 1, got 0"),
        ({"method": "sogclr", "tau": -1}, "tau must be a finite number > 0, got -1"),
        ({"method": "isogclr", "tau_min": 0.1}, "tau_min and tau_max must satisfy"),
        ({"method": "isogclr", "tau": 0.3}, r"tau must be in \[0.005, 0.05\] for method 'isogclr'"),
        (
            {"method": "clip", "tau": 0.005},
            r"tau must be in \[0.01, 1.0\] for method 'clip'",
        ),
        ({"method": "sogclr", "tau_max": 0.5}, "tau_min and tau_max go with method='isogclr'"),
        (
            {"image_temp_gen": torch.nn.Identity(), "text_temp_gen": torch.nn.Identity(), "tau": 1},
            "tau goes with the other methods than 'tempnet', got 1",
        ),
        ({"method": "sogclr", "rho": math.nan}, "rho must be a finite number >= 0, got nan"),
        ({"method": "isogclr"}, "rho must be given where method 'isogclr' learns"),
        ({"method": "sogclr", "rho": -1}, "rho must be a finite number >= 0, got -1"),
        ({"method": "sogclr", "backend": "cuda"}, "backend must be one of"),
        (
            {"method": "sogclr", "num_samples": 1e3},
            "num_samples must be an integer >= 0, got 1000.0",
        ),
        ({"method": "sogclr", "estimator": "b"}, "estimator must be 'log' or 'official', got 'b'"),
        ({"method": "clip", "estimator": "official"}, "estimator='official' is for sogclr"),
        (
            {"method": "sogclr", "estimator": "official", "backend": "native"},
            "on the reference backend, got method='sogclr' and backend='native'",
        ),
        ({"method": "tempnet"}, "image_temp_gen and text_temp_gen go with method='tempnet'"),
    ],
)
def test_bad_options_say_what_was_expected(options, message):
    with pytest.raises(ValueError, match=f"RobustContrastiveLoss: .*{message}"):
        RobustContrastiveLoss(**({"num_samples": 5} | options))


@pytest.mark.parametrize(
    "options, call, error, message",
    [
        ({}, {"ids": None}, ValueError, "ids must be given for method 'sogclr'"),
        ({}, {"ids": torch.arange(B).float()}, TypeError, "ids must be of an integer dtype"),
        ({}, {"ids": torch.arange(B - 1)}, ValueError, r"ids must have shape \(12,\)"),
        ({}, {"ids": torch.arange(B) + 30}, IndexError, r"ids\[10\] must be in \[0, 40\), got 40"),
        ({"estimator": "official"}, {}, ValueError, "estimator='official' needs ids, epoch and"),
        ({"samples": 0}, {}, ValueError, "ids go with a state, got num_samples=0: pass the"),
        ({}, {"logit_scale": 10.0}, ValueError, "logit_scale goes with method='clip', got"),
        (
            {"estimator": "official"}, {"epoch": 0, "return_stats": True}, ValueError,
            "estimator='official' has no image_ids",
        ),
    ],
)  # fmt: skip
def test_bad_calls_say_what_was_expected(options, call, error, message):
    loss_fn = make("sogclr", **options)
    image, text = features()
    with pytest.raises(error, match=f"RobustContrastiveLoss: {message}"):
        loss_fn(image, text, **({"ids": torch.arange(B)} | call))
    with pytest.raises(RuntimeError, match="temperature_stats needs a forward first"):
        make("sogclr").temperature_stats()


@pytest.mark.parametrize("method", ["isogclr", "tempnet"])
def test_a_radius_that_no_negatives_reach_raises_in_training(method):
    loss_fn = make(method, rho=math.log(B - 1))
    image, text = features()
    with pytest.raises(ValueError, match=r"rho must be below log\(11\) = 2.398, .* 11 negatives"):
        loss_fn(image, text, torch.arange(B))
    assert loss_fn.eval()(image, text, torch.arange(B)).isfinite()
    make(method, rho=math.log(B - 1) - 0.01)(image, text, torch.arange(B))
