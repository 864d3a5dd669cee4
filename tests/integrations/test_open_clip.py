"""TempNetClipLoss against open_clip's own files: its ClipLoss, its CLIP built tiny, and its
training loop and main with the patches of docs/integrations/open_clip.md. open_clip_by_hand.py says
why open_clip is not simply imported."""

import copy
import inspect
import logging
import math
import random
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from open_clip_by_hand import (
    SAMPLES,
    Data,
    features,
    module_of,
    networks,
    patched,
    tiny_clip,
    train,
)

from tempnet_kernels.integrations.open_clip import TempNetClipLoss
from tempnet_kernels.nn import RobustContrastiveLoss


@pytest.fixture(autouse=True)
def generators_and_logging():
    """main sets the seeds of all generators, and logs to a file."""
    states = random.getstate(), np.random.get_state()
    root = logging.getLogger()
    handlers = list(root.handlers)
    named = (logging.getLogger(name) for name in list(root.manager.loggerDict))
    levels = {logger: logger.level for logger in (root, *named)}
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    for handler in set(root.handlers) - set(handlers):
        root.removeHandler(handler)
        handler.close()
    for logger, level in levels.items():
        logger.setLevel(level)


# The same class to call.


def test_constructor_and_call_are_those_of_open_clip(open_clip):
    for own, theirs in (
        (TempNetClipLoss.__init__, open_clip.ClipLoss.__init__),
        (TempNetClipLoss.forward, open_clip.ClipLoss.forward),
    ):
        own, theirs = (list(inspect.signature(f).parameters.values()) for f in (own, theirs))
        n = len(theirs)
        assert [(p.name, p.default, p.kind) for p in own[:n]] == [
            (p.name, p.default, p.kind) for p in theirs
        ]
        assert all(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in own[n:])


def test_open_clip_is_not_imported():
    code = "import sys, tempnet_kernels.integrations.open_clip; print('open_clip' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "False\n"


# The numbers.


@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-d", "nonscalar_logit_scale"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clip_is_open_clips_loss(open_clip, dtype, shape):
    results = []
    for loss_fn in (open_clip.ClipLoss(), TempNetClipLoss(method="clip")):
        image, text = features(33, dtype)
        log_scale = torch.full(shape, math.log(1 / 0.07), dtype=dtype, requires_grad=True)
        out = loss_fn(image, text, log_scale.exp(), output_dict=True)
        assert list(out) == ["contrastive_loss"]
        out["contrastive_loss"].backward()
        results.append((out["contrastive_loss"], image.grad, text.grad, log_scale.grad))
    for theirs, own in zip(*results, strict=True):
        assert theirs.abs().max() > 1e-3
        assert (own - theirs).abs().max() <= (1e-6 if dtype == torch.float32 else 1e-14)


def test_tempnets_give_the_plain_formula():
    """Written out: gamma = 1, and no state."""
    image, text = features(12)
    loss_fn = TempNetClipLoss(rho=1.5, **networks()).eval()
    loss = loss_fn(image, text, None)
    s = (image @ text.T).detach().double()
    expected = 0
    for side, x, h in (
        ("image", image, s - s.diag()[:, None]),
        ("text", text, s.T - s.diag()[:, None]),
    ):
        tau = getattr(loss_fn, f"{side}_temp_gen")(x).double()
        masked = (h / tau[:, None]).masked_fill(torch.eye(12, dtype=torch.bool), -math.inf)
        expected = expected + (tau * (masked.logsumexp(1) - math.log(11) + 1.5)).mean()
    assert abs(loss.item() - expected.item()) <= 1e-6
    loss.backward()
    for got, exact in zip(
        (p.grad for p in loss_fn.parameters()),
        torch.autograd.grad(expected, list(loss_fn.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(got, exact.to(got.dtype), rtol=1e-3, atol=1e-6)


def test_dtypes_that_autocast_leaves_different_are_widened():
    image, text = (x.detach() for x in features())
    loss_fn = TempNetClipLoss(method="clip")
    half = loss_fn(image, text.bfloat16(), 10.0)
    torch.testing.assert_close(half, loss_fn(image, text.bfloat16().float(), 10.0))
    assert half.dtype == torch.float32


def test_without_a_state_every_visit_in_training_is_a_first_one():
    stateless = RobustContrastiveLoss(0, gamma=0.3, method="sogclr", tau=0.1)
    for seed in range(2):
        stateful = RobustContrastiveLoss(8, gamma=0.3, method="sogclr", tau=0.1)
        image, text = features(seed=seed)
        own_image, own_text = features(seed=seed)
        loss = stateless(image, text)
        expected = stateful(own_image, own_text, torch.arange(8))
        assert torch.equal(loss, expected)
        (loss + expected).backward()
        assert torch.equal(image.grad, own_image.grad) and torch.equal(text.grad, own_text.grad)
        assert image.grad.abs().max() > 1e-3
    assert stateless.state.log_s_image.numel() == 0


@pytest.mark.parametrize("shape", [(), (1,)])
def test_robust_contrastive_loss_takes_the_scale_of_a_model(shape):
    image, text = features()
    own, other = (RobustContrastiveLoss(0, method="clip", tau=0.1) for _ in range(2))
    other.logit_scale = None
    scale = torch.full(shape, math.log(10.0), requires_grad=True)
    loss, expected = other(image, text, logit_scale=scale.exp()), own(image, text)
    (loss + expected).backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(scale.grad.reshape(1), own.logit_scale.grad)
    assert not list(other.parameters()) and scale.grad.abs().max() > 1e-3
    torch.testing.assert_close(other(image, text, logit_scale=10.0), expected)


# open_clip's own loop.


@pytest.mark.parametrize(
    "changes",
    [{}, {"precision": "amp_bf16"}, {"accum_freq": 3}],
    ids=["fp32", "amp_bf16", "accum_freq"],
)
@pytest.mark.parametrize("method", ["clip", "sogclr", "tempnet"])
def test_open_clips_loop_trains(open_clip, method, changes, caplog):
    caplog.set_level(logging.INFO)
    options = networks() | {"rho": 1.0} if method == "tempnet" else {}
    loss_fn = TempNetClipLoss(method=method, **options)
    before = copy.deepcopy(loss_fn.state_dict())
    clip = method == "clip"
    model = train(loss_fn, epochs=6, freeze=not clip, **changes)
    logged = [float(x) for x in re.findall(r"Contrastive_loss: (-?[\d.e-]+)", caplog.text)]
    assert len(logged) == 6 * 3 // changes.get("accum_freq", 1)
    assert logged[-1] < logged[0] - 1e-3
    scale = math.exp(model.logit_scale.item())
    assert (scale == pytest.approx(1 / 0.07, rel=1e-6)) != clip
    for name, x in loss_fn.named_parameters():
        assert not torch.equal(x, before[name]), name


def test_the_loops_clip_run_is_that_of_open_clips_loss(open_clip, caplog):
    caplog.set_level(logging.INFO)
    weights, logs = [], []
    for loss_fn in (open_clip.ClipLoss(), TempNetClipLoss(method="clip")):
        caplog.clear()
        model = train(loss_fn, epochs=2, freeze=False, optimizer=torch.optim.SGD)
        weights.append(model.state_dict())
        logs.append([float(x) for x in re.findall(r"Contrastive_loss: ([\d.]+)", caplog.text)])
    assert len(logs[0]) == 6
    assert logs[1] == pytest.approx(logs[0], rel=1e-4)  # five digits are printed
    for name, theirs in weights[0].items():
        torch.testing.assert_close(weights[1][name], theirs, rtol=1e-5, atol=1e-6, msg=name)


def test_the_pages_loop_passes_ids_and_the_averages_are_kept(open_clip):
    loop = module_of(patched("train.py"), "patched_train")
    loss_fn = TempNetClipLoss(num_samples=SAMPLES + 2, gamma=0.5, rho=1.0, **networks())
    train(loss_fn, data=Data(ids=True), loop=loop)
    state = loss_fn.state.log_s_image
    assert state[:SAMPLES].isfinite().all() and state[SAMPLES:].isnan().all()


MAIN = (
    "--dataset-type synthetic --model tiny --batch-size 8 --device cpu --workers 0 --name run "
    "--save-frequency 1 --warmup 1 --lr 1e-3 --logs"
)


def test_the_pages_main_trains_saves_and_resumes(open_clip, tmp_path):
    source = patched("main.py")
    assert source.count("rho=7.0") == 1  # for batches of thousands, here they are of 8
    main = module_of(source.replace("rho=7.0", "rho=1.0"), "patched_main").main
    arguments = [*MAIN.split(), str(tmp_path)]
    main([*arguments, "--epochs", "2"])
    first, last = (torch.load(tmp_path / f"run/checkpoints/epoch_{e}.pt") for e in (1, 2))
    for name, x in first["loss"].items():
        if x.is_floating_point() and x.numel():
            assert not torch.equal(x, last["loss"][name]), name
    assert [e["optimizer"]["param_groups"][-1]["lr"] for e in (first, last)] == [3e-5, 3e-5 * 0.9]
    assert last["optimizer"]["param_groups"][0]["lr"] not in (3e-5, 3e-5 * 0.9)
    n = len(last["optimizer"]["param_groups"][-1]["params"])
    assert n == len(list(networks()["image_temp_gen"].parameters())) * 2
    assert last["state_dict"]["logit_scale"].item() == pytest.approx(math.log(1 / 0.07))

    (tmp_path / "run/checkpoints/epoch_2.pt").unlink()
    main([*arguments, "--epochs", "2", "--resume", "latest"])
    again = torch.load(tmp_path / "run/checkpoints/epoch_2.pt")
    steps = again["optimizer"]["state"]
    assert {int(x["step"]) for x in steps.values()} == {6}  # not 3: the first epoch's counted
    counted = "image_temp_gen.prototypes"
    assert not torch.equal(again["loss"][counted], first["loss"][counted])


# One process: misuse, and the checkpoint.


@pytest.mark.parametrize(
    "options, message",
    [
        ({"use_horovod": True}, "use_horovod must be False.*torchrun"),
        ({"world_size": 2}, "rank and world_size must be those of torch.distributed, 0 and 1, got"),
        ({"estimator": "official"}, "estimator is not an option here"),
        ({"process_group": None}, "process_group is not an option here"),
        ({"tau": 0.1}, "tau is the model's for method 'clip'"),
    ],
)
def test_bad_options_say_what_to_do(options, message):
    with pytest.raises(ValueError, match=f"TempNetClipLoss: {message}"):
        TempNetClipLoss(**({"method": "clip"} | options))


@pytest.mark.parametrize(
    "options, call, error, message",
    [
        ({}, {"logit_bias": torch.tensor(-10.0)}, ValueError, "logit_bias must be None: SigLIP"),
        ({}, {"logit_scale": torch.ones((), requires_grad=True)}, ValueError, "call model.logit"),
        ({"method": "clip"}, {"logit_scale": None}, ValueError, "logit_scale must be given"),
        ({}, {"ids": torch.arange(8)}, ValueError, "ids go with a state, got num_samples=0: pass"),
        ({"num_samples": 9}, {}, ValueError, "ids must be given for method 'tempnet' with num_s"),
        ({"num_samples": 9}, {"ids": torch.arange(7)}, ValueError, r"ids must have shape \(8,\)"),
        ({"num_samples": 7}, {"ids": torch.arange(8)}, IndexError, r"ids\[7\] must be in \[0, 7\)"),
        ({}, {"image_ids": torch.arange(7)}, ValueError, r"image_ids must have shape \(8,\)"),
        ({}, {"dist_logit_scale": 1.0}, TypeError, "argument 'dist_logit_scale'"),
    ],
)  # fmt: skip
def test_bad_calls_say_what_to_do(options, call, error, message):
    options = {"method": "clip"} if "method" in options else {"rho": 1.0} | networks() | options
    image, text = features()
    with pytest.raises(error, match=message):
        TempNetClipLoss(**options)(image, text, **({"logit_scale": torch.tensor(10.0)} | call))


def test_siglips_model_and_a_trainable_scale_stop_the_loop(open_clip):
    with pytest.raises(ValueError, match="logit_bias must be None"):
        train(TempNetClipLoss(method="clip"), model=tiny_clip(init_logit_bias=-10.0), freeze=False)
    with pytest.raises(ValueError, match=r"call model.logit_scale.requires_grad_\(False\)"):
        train(TempNetClipLoss(rho=1.0, **networks()), freeze=False)


def test_equal_image_ids_are_not_negatives_without_a_state():
    loss_fn = TempNetClipLoss(method="sogclr", tau=0.1)
    image, text = features()
    same = loss_fn(image, text, 1.0, image_ids=torch.tensor([0, 0, 1, 2, 3, 4, 5, 6]))
    assert (same - loss_fn(image, text, 1.0)).abs() > 1e-3
    torch.testing.assert_close(
        loss_fn(image, text, 1.0, image_ids=torch.arange(8)), loss_fn(image, text, 1.0)
    )


def test_a_resumed_loss_goes_on_with_its_averages_and_an_unlike_one_raises():
    loss_fn = TempNetClipLoss(num_samples=9, rho=1.0, **networks())
    image, text = features()
    loss_fn(image, text, None, ids=torch.arange(8))
    resumed = TempNetClipLoss(num_samples=9, rho=1.0, **networks(1))
    resumed.load_state_dict(loss_fn.state_dict())
    image, text = features(seed=2)
    ids = torch.arange(8).flip(0)
    assert torch.equal(resumed(image, text, None, ids=ids), loss_fn(image, text, None, ids=ids))
    assert resumed.state.log_s_text[:8].isfinite().all()
    with pytest.raises(RuntimeError, match=r"is of \(9,\) samples, the loss of \(0,\)"):
        TempNetClipLoss(rho=1.0, **networks()).load_state_dict(loss_fn.state_dict())
    plain = RobustContrastiveLoss(9, rho=1.0, **networks(1))
    assert plain.load_state_dict(loss_fn.state_dict())  # the same names
