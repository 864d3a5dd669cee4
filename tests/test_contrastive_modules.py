"""ContrastiveTempNet and RobustContrastiveLoss."""

import copy
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from tempnet_kernels import dro_contrastive
from tempnet_kernels.nn import ContrastiveTempNet, RobustContrastiveLoss

B, D, SAMPLES = 12, 16, 40


def features(b=B, d=D):
    image = F.normalize(torch.randn(b, d), dim=1)
    text = F.normalize(image + 0.3 * torch.randn(b, d), dim=1)
    return image.requires_grad_(), text.requires_grad_()


def make(method="tempnet", samples=SAMPLES, **options):
    if method == "tempnet":
        for i, side in enumerate(("image", "text")):
            options.setdefault(f"{side}_temp_gen", ContrastiveTempNet(D, num_prototypes=8, seed=i))
    return RobustContrastiveLoss(samples, method=method, **options)


def test_tempnet_equals_its_formula():
    net = ContrastiveTempNet(D, 0.01, 0.1, num_prototypes=8).eval()
    for parameter in (net.prototypes, net.linear_1.weight, net.linear_1.bias):
        torch.nn.init.normal_(parameter)
    torch.nn.init.constant_(net.scaler, -1.0)
    image, _ = features()
    tau = net(image)
    p = {k: v.detach().double() for k, v in net.state_dict().items()}
    x = torch.sigmoid(image.detach().double() @ p["proj.weight"].T + p["proj.bias"])
    q = x @ F.normalize(p["prototypes"], dim=1).T
    w = torch.softmax(q / p["scaler"].exp(), 1)
    t = ((w - 1 / 8) * torch.sigmoid(q)) @ p["linear_1.weight"].T + p["linear_1.bias"]
    expected = 0.01 + 0.09 * torch.sigmoid(t[:, 0])
    assert tau.shape == (B,) and tau.std() > 1e-4
    torch.testing.assert_close(tau.double(), expected, rtol=1e-5, atol=0)
    (tau.sum() + image.sum() * 0).backward()
    assert (image.grad == 0).all()  # the features are detached
    assert all(parameter.grad.norm() > 0 for parameter in net.parameters())


def test_tempnet_loads_the_official_layout():
    net = ContrastiveTempNet(D)
    shapes = {name: tuple(value.shape) for name, value in net.named_parameters()}
    assert shapes == {
        "proj.weight": (D, D), "proj.bias": (D,), "scaler": (1,), "prototypes": (256, D),
        "linear_1.weight": (1, 256), "linear_1.bias": (1,),
    }  # fmt: skip
    assert (net.linear_1.weight == 1).all() and net.linear_1.bias == 0
    assert net.scaler.item() == pytest.approx(math.log(0.01)) and net.dropout == 0.5
    official = {name: torch.randn(shape) for name, shape in shapes.items()}
    official["scaler"] = torch.tensor(math.log(0.02), dtype=torch.float64)  # theirs is 0-d, float64
    loss = make(image_temp_gen=net, text_temp_gen=ContrastiveTempNet(D))
    loss.load_state_dict({f"image_temp_gen.{k}": v for k, v in official.items()}, strict=False)
    net.load_state_dict(official)
    assert net.scaler.dtype == torch.float32 and net.scaler.item() == pytest.approx(math.log(0.02))
    assert torch.equal(loss.image_temp_gen.prototypes, official["prototypes"])


def test_prototypes_come_from_a_batch():
    net = ContrastiveTempNet(D, num_prototypes=8)
    image, _ = features()
    net.init_prototypes(image)
    assert torch.equal(net.prototypes, torch.sigmoid(net.proj(image[:8])))
    with pytest.raises(ValueError, match="features must have at least 8 rows for 8 prototypes"):
        net.init_prototypes(image[:7])


def test_a_sample_s_dropout_is_the_same_on_every_rank():
    net = ContrastiveTempNet(D, num_prototypes=8)
    ranks = [copy.deepcopy(net), copy.deepcopy(net)]
    image, _ = features(300)
    ids = torch.randperm(1 << 40 >> 20)[:300] << 20
    order = torch.randperm(300)
    for _ in range(3):
        torch.manual_seed(torch.randint(1000, ()).item())  # ranks do not share torch's generator
        first = ranks[0](image, ids)
        torch.rand(7)
        second = ranks[1](image[order], ids[order])
        torch.testing.assert_close(first[order], second, rtol=1e-6, atol=0)
    assert (first - ranks[0](image, ids)).abs().max() > 1e-5  # every call draws a new mask
    other = ContrastiveTempNet(D, num_prototypes=8, seed=1)
    other.load_state_dict(ranks[1].state_dict())
    assert (other(image, ids) - ranks[1](image, ids)).abs().max() > 1e-5
    resumed = copy.deepcopy(net)
    resumed.load_state_dict(ranks[1].state_dict())
    assert torch.equal(resumed(image, ids), ranks[1](image, ids))


@pytest.mark.parametrize("p", [0.5, 0.1])
def test_dropout_of_ids_is_fair_and_independent(p):
    net = ContrastiveTempNet(64, dropout=p)
    ids = torch.arange(4000)
    masks = [net._drop(torch.ones(4000, 64), ids) for _ in range(2)]
    kept = torch.stack(masks) != 0
    assert torch.equal(masks[0].unique(), torch.tensor([0, 1 / (1 - p)]))
    sigma = math.sqrt(p * (1 - p))
    assert (kept.float().mean() - (1 - p)).abs() < 5 * sigma / math.sqrt(kept.numel())
    assert (kept.float().mean((0, 1)) - (1 - p)).abs().max() < 5 * sigma / math.sqrt(8000)
    # Columns, neighbouring ids and consecutive calls are uncorrelated.
    x = (kept.float() - (1 - p)) / sigma
    assert (x[0].T @ x[0] / 4000).fill_diagonal_(0).abs().max() < 5 / math.sqrt(4000)
    assert (x[0, 1:] * x[0, :-1]).mean().abs() < 5 / math.sqrt(4000 * 64)
    assert (x[0] * x[1]).mean().abs() < 5 / math.sqrt(4000 * 64)


def test_dropout_mask_cannot_be_drawn_again_in_a_backward():
    net = ContrastiveTempNet(D, num_prototypes=8)
    image, _ = features()
    tau = checkpoint(net, image, torch.arange(B), use_reentrant=False)
    with pytest.raises(RuntimeError, match="ContrastiveTempNet: forward runs again within a back"):
        tau.sum().backward()


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
        got = loss_fn.state[name].double()
        torch.testing.assert_close(got, expected[side], rtol=1e-5, atol=1e-5, equal_nan=True)


def test_of_equal_ids_the_last_state_is_kept_and_they_are_no_negatives():
    ids = torch.tensor([3, 7, 3, 5, 7, 7, 1, 2, 4, 6, 8, 9])
    image, text = features()
    loss_fn = make("sogclr", tau=0.1)
    value, stats = loss_fn(image, text, ids, return_stats=True)
    same, expected = dro_contrastive(
        image, text, 0.1, 0.1, gamma=0.8, image_ids=ids, text_ids=ids, return_stats=True
    )
    assert torch.equal(value, same)
    for name, log_s in (("log_s_image", expected.log_s_image), ("log_s_text", expected.log_s_text)):
        for sample, last in ((3, 2), (7, 5), (5, 3)):
            assert loss_fn.state[name][sample] == log_s[last]
    assert not torch.equal(stats.log_s_image[0], stats.log_s_image[2])


def test_captions_of_one_image_are_no_negatives():
    image, text = features()
    image_ids = torch.arange(B) // 2
    loss_fn = make("sogclr", tau=0.1)
    value = loss_fn(image, text, torch.arange(B), image_ids=image_ids, text_ids=torch.arange(B))
    assert torch.equal(value, dro_contrastive(image, text, 0.1, 0.1, image_ids=image_ids))


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


def test_state_is_saved_loaded_and_stays_float32():
    loss_fn = make("tempnet")
    image, text = features()
    ids = torch.arange(B)
    loss_fn(image, text, ids)
    saved = copy.deepcopy(loss_fn.state_dict())
    assert saved["state.log_s_image"].shape == (SAMPLES,)
    assert saved["state.log_s_image"][:B].isfinite().all()
    assert saved["state.log_s_text"][B:].isnan().all()
    resumed = make("tempnet")
    resumed.load_state_dict(saved)
    assert torch.equal(resumed(image, text, ids), loss_fn(image, text, ids))
    narrow = copy.deepcopy(resumed).half()
    assert narrow.image_temp_gen.proj.weight.dtype == torch.float16
    assert narrow.state["log_s_image"].dtype == torch.float32
    assert torch.equal(narrow.state["log_s_image"][:B], resumed.state["log_s_image"][:B])
    with pytest.raises(RuntimeError, match=r"state.log_s_image is of \(40,\) samples, the loss of"):
        make("tempnet", samples=41).load_state_dict(saved)
    with pytest.raises(RuntimeError, match=r"Missing key.*state.tau_image"):
        make("isogclr").load_state_dict({"state.log_s_image": saved["state.log_s_image"]})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*state.tau_image"):
        make("sogclr").load_state_dict({**make("isogclr").state_dict()})


def test_state_moves_with_the_module_and_out_of_meta():
    loss_fn = make("isogclr").to("meta")
    assert loss_fn.state["log_s_image"].is_meta
    loss_fn.to_empty(device="cpu")
    assert loss_fn.state["log_s_image"].isnan().all() and (loss_fn.state["tau_text"] == 0.01).all()


DDP = """
import sys, torch, torch.distributed as dist, torch.multiprocessing as mp
from tempnet_kernels.nn import RobustContrastiveLoss
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.Linear(4, 4)
        self.encoder.register_buffer("count", torch.zeros(1))
        self.loss = RobustContrastiveLoss(8, method="sogclr")
    def forward(self, x, ids):
        y = torch.nn.functional.normalize(self.encoder(x), dim=1)
        return self.loss(y, y.roll(1, 1), ids)
def main(rank, path):
    dist.init_process_group("gloo", init_method="file://" + path, rank=rank, world_size=2)
    torch.manual_seed(rank)
    model = torch.nn.parallel.DistributedDataParallel(Model())
    model.module.loss.state["log_s_image"].fill_(rank + 1.0)
    model.module.encoder.count.fill_(rank + 1.0)
    model(torch.randn(3, 4), torch.tensor([1, 2, 3])).backward()
    assert model.module.encoder.count == 1, "DDP broadcasts buffers"
    state = model.module.loss.state["log_s_image"]
    assert (state[[0, 4, 5, 6, 7]] == rank + 1).all() and (state[1:4] != rank + 1).all()
    dist.destroy_process_group()
if __name__ == "__main__":
    mp.spawn(main, (sys.argv[1],), nprocs=2)
"""


def test_ddp_does_not_broadcast_the_state(tmp_path):
    script = tmp_path / "ddp.py"
    script.write_text(DDP)
    result = subprocess.run(
        [sys.executable, script, tmp_path / "store"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputing_in_a_checkpoint_raises(use_reentrant):
    loss_fn = make("sogclr")
    image, text = features()
    ids = torch.arange(B)

    def run(update):
        return checkpoint(
            lambda a, b: loss_fn(a, b, ids, update_state=update), image, text,
            use_reentrant=use_reentrant,
        )  # fmt: skip

    with pytest.raises(RuntimeError, match="would update the state twice: leave the loss out of"):
        run(True).backward()
    image.grad = text.grad = None
    run(False).backward()
    (expected,) = torch.autograd.grad(loss_fn(image, text, ids, update_state=False), image)
    torch.testing.assert_close(image.grad, expected)


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
    torch.testing.assert_close(loss_fn.state["tau_image"].double(), tau, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss_fn.state["u_image"].double(), u, rtol=1e-4, atol=1e-5)


def test_isogclr_leaves_the_table_where_there_is_no_negative():
    loss_fn = make("isogclr")
    image, text = features(1)
    loss_fn(image, text, torch.tensor([4]))
    assert (loss_fn.state["tau_image"] == torch.tensor(0.01)).all()
    assert (loss_fn.state["u_text"] == 0).all() and loss_fn.state["log_s_text"].isnan().all()


def official_gradients(image, text, taus, state, ids, epoch, gamma, rho):
    """The official estimate as its formulas read, in float64, anchor by anchor; updates ``state``
    (s and b per side). The floor of s is the official one."""
    image, text = (t.detach().double().requires_grad_() for t in (image, text))
    s = image @ text.T
    total, k_all = 0.0, []
    for side, scores, tau in (("image", s, taus[0]), ("text", s.T, taus[1])):
        ks = []
        for i, sample in enumerate(ids.tolist()):
            h = scores[i] - scores[i, i]
            x = (h / tau[i].double()).detach()
            old_s, old_b = state[side].get(sample, (0.0, 0.0))
            b = max(old_b, x.max().item())
            e = torch.exp(x - b)
            e[i] = 0
            new = e.sum().item()
            if epoch > 0:
                new = (1 - gamma) * old_s * math.exp(old_b - b) + gamma * new
            state[side][sample] = (new, b)
            w = e / max(new, 1e-14)
            total = total + (w * h).sum() / len(ids)
            ks.append(math.log(max(new, 1e-14) / (len(ids) - 1)) + b + rho - (w * x).sum().item())
        k_all.append(torch.tensor(ks, dtype=torch.float64))
    return (*torch.autograd.grad(total, (image, text)), *k_all)


@pytest.mark.parametrize("method", ["sogclr", "isogclr", "tempnet"])
def test_official_estimator_is_the_official_formula_over_20_steps(method):
    loss_fn = make(method, estimator="official", rho=6.0, gamma=0.8)
    networks = [loss_fn.image_temp_gen, loss_fn.text_temp_gen] if method == "tempnet" else []
    for network in networks:
        network.dropout = 0.0
    state = {"image": {}, "text": {}}
    for step in range(20):
        image, text = features()
        ids = torch.randperm(SAMPLES)[:B]  # some are first seen after epoch 0
        epoch = int(step >= 5)
        value = loss_fn(image, text, ids, epoch=epoch)
        parameters = list(loss_fn.parameters())
        grads = torch.autograd.grad(value, (image, text, *parameters))
        taus = [tau.expand(B) for tau in loss_fn._taus]
        rho = 0.0 if method == "sogclr" else 6.0
        expected = official_gradients(image, text, taus, state, ids, epoch, 0.8, rho)
        for g, e in zip(grads[:2], expected[:2], strict=True):
            assert (g - e).norm() <= 1e-5 * e.norm(), step
        if networks:  # they learn from k / B
            predicted = [n(f.detach()) for n, f in zip(networks, (image, text), strict=True)]
            weights = [k.float() / B for k in expected[2:]]
            wanted = torch.autograd.grad(predicted, parameters, weights)
            for g, e in zip(grads[2:], wanted, strict=True):
                assert (g - e).norm() <= 1e-4 * e.norm(), step
    for side, x in (("image", "I"), ("text", "T")):
        for sample, (s, b) in state[side].items():
            assert loss_fn.state[f"b_{x}"][sample] == pytest.approx(b, rel=1e-4, abs=1e-4)
            assert loss_fn.state[f"s_{x}"][sample] == pytest.approx(s, rel=1e-3)


def test_tempnet_learns_from_k():
    loss_fn = make("tempnet", gamma=0.8)
    image, text = features()
    ids = torch.arange(B)
    value, stats = loss_fn(image, text, ids, return_stats=True)
    value.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in loss_fn.parameters())
    tau, other = (t.clone().requires_grad_() for t in loss_fn._taus)
    a, b = (t.detach().clone().requires_grad_() for t in (image, text))
    same = dro_contrastive(a, b, tau, other, 7.0, gamma=0.8)
    same.backward()
    assert torch.equal(value, same) and torch.equal(image.grad, a.grad)
    torch.testing.assert_close(tau.grad, stats.k_image / B)
    torch.testing.assert_close(other.grad, stats.k_text / B)
    low = loss_fn.temperature_stats().image
    assert 0.005 <= low.min <= low.mean <= low.max <= 0.05


def test_module_compiles_without_a_graph_break():
    torch.compiler.reset()
    loss_fn, eager = make("sogclr"), make("sogclr")
    compiled = torch.compile(loss_fn, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        image, text = features()
        ids = torch.randperm(SAMPLES)[:B]
        torch.testing.assert_close(compiled(image, text, ids), eager(image, text, ids))
    for name, value in eager.state.values.items():
        torch.testing.assert_close(loss_fn.state[name], value, equal_nan=True)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "siglip"}, "method must be one of"),
        ({"method": "sogclr", "gamma": 0}, r"gamma must be in \(0, 1\], got 0"),
        ({"method": "sogclr", "num_samples": 0}, "num_samples must be >= 1, got 0"),
        ({"method": "sogclr", "tau": -1}, "tau must be a finite number > 0, got -1"),
        ({"method": "isogclr", "tau_min": 0.1}, "tau_min and tau_max must satisfy"),
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
        ({"estimator": "official"}, {}, ValueError, "epoch must be given with"),
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


@pytest.mark.parametrize(
    "options, message",
    [
        ({"feature_dim": 0}, "feature_dim must be >= 1, got 0"),
        ({"num_prototypes": 0}, "num_prototypes must be >= 1, got 0"),
        ({"dropout": 1}, r"dropout must be in \[0, 1\), got 1"),
        ({"tau_min": 0.2}, "tau_min and tau_max must satisfy 0 < tau_min < tau_max, got 0.2"),
    ],
)
def test_bad_network_options_say_what_was_expected(options, message):
    with pytest.raises(ValueError, match=f"ContrastiveTempNet: {message}"):
        ContrastiveTempNet(**({"feature_dim": 4} | options))
    with pytest.raises(ValueError, match=r"features must have shape \(B, 4\), got \(2, 5\)"):
        ContrastiveTempNet(4)(torch.zeros(2, 5))
