"""TempNets in Lightning: moved, trained, logged and saved; what would be silent raises."""

import copy
import math

import compare
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from tempnet_kernels.integrations.lightning import TempNetCallback, tempnet_param_groups
from tempnet_kernels.nn import (
    ContrastiveTempNet,
    RobustContrastiveLoss,
    TempNet,
    TempNetCausalLMLoss,
)

V, D, T, B, RHO = 33, 8, 7, 4, 1.5
NAMES = [f"loss/tau_{name}" for name in ("mean", "min", "max", "at_min", "at_max")]


class LM(LightningModule):
    """A bigram model; its TempNet has no dropout, so that runs can be compared."""

    lr = 0.1

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.head = nn.Linear(D, V, bias=False)
        self.loss = TempNetCausalLMLoss(TempNet(V, 0.5, 5.0, hidden_size=16, dropout=0.0), RHO)

    def training_step(self, batch, batch_idx):
        loss = self.loss(self.head(self.embedding(batch)), batch)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(tempnet_param_groups(self, self.lr, tempnet_lr=2 * self.lr))


class Pairs(LightningModule):
    """Two towers with moving averages."""

    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Linear(D, D), nn.Linear(D, D)
        self.loss = RobustContrastiveLoss(
            2 * B, rho=0.5, image_temp_gen=ContrastiveTempNet(D, num_prototypes=8, seed=0),
            text_temp_gen=ContrastiveTempNet(D, num_prototypes=8, seed=1),
        )  # fmt: skip

    def training_step(self, batch, batch_idx):
        image, text, ids = batch
        features = [F.normalize(f(x), dim=1) for f, x in ((self.image, image), (self.text, text))]
        return self.loss(*features, ids)

    def configure_optimizers(self):
        return torch.optim.AdamW(tempnet_param_groups(self, 1e-2, tempnet_lr=1e-2))


def tokens(batches=4):
    return torch.randint(V, (batches * B, T), generator=torch.Generator().manual_seed(0))


def loader(data, size=B):
    return torch.utils.data.DataLoader(data, batch_size=size)


def pairs():
    x = torch.randn(2, 2 * B, D, generator=torch.Generator().manual_seed(0))
    return loader(torch.utils.data.TensorDataset(*x, torch.arange(2 * B)))


def trainer(folder, callbacks=(), **options):
    options = {"max_epochs": 1, "log_every_n_steps": 1, "logger": False} | options
    return Trainer(
        accelerator="cpu", default_root_dir=folder, callbacks=list(callbacks),
        enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=any(isinstance(x, ModelCheckpoint) for x in callbacks), **options,
    )  # fmt: skip


def by_hand(model, batch):
    """The mean over next tokens of tau (logsumexp(z / tau) + rho - log V) - z_y."""
    logits = model.head(model.embedding(batch))[:, :-1].flatten(0, 1)
    tau = model.loss.tempnet(logits)
    lse = torch.logsumexp(logits / tau[:, None], 1)
    z_y = logits.gather(1, batch[:, 1:].reshape(-1, 1))[:, 0]
    return (tau * (lse + RHO - math.log(V)) - z_y).mean(), tau


def test_loss_is_the_plain_formula_and_temperatures_are_logged(tmp_path):
    model, data = LM(), tokens(1)
    model.lr = 0.0
    plain, tau = by_hand(model, data)
    exact, _ = by_hand(copy.deepcopy(model).double(), data)
    fit = trainer(tmp_path, [TempNetCallback()])
    fit.fit(model, loader(data))
    logged = fit.logged_metrics
    compare.assert_within_twice_plain(logged["loss"], exact.detach(), plain.detach())
    assert {*NAMES, "loss"} == set(logged)
    torch.testing.assert_close(logged["loss/tau_mean"], tau.mean().detach())
    assert 0.5 < logged["loss/tau_min"] < logged["loss/tau_max"] < 5.0
    assert not any(m._forward_hooks for m in model.modules())  # undone


def test_statistics_are_computed_on_the_interval_only(tmp_path, monkeypatch):
    steps, stats = [], TempNetCausalLMLoss.temperature_stats
    monkeypatch.setattr(
        TempNetCausalLMLoss, "temperature_stats", lambda self: steps.append(1) or stats(self)
    )
    logger = CSVLogger(tmp_path)
    fit = trainer(tmp_path, [TempNetCallback()], log_every_n_steps=2, logger=logger)
    fit.fit(LM(), loader(tokens(4)))
    assert len(steps) == 2
    (file,) = tmp_path.rglob("metrics.csv")
    lines = file.read_text().splitlines()
    assert "loss/tau_mean" in lines[0] and len(lines) == 3


def test_every_loss_or_the_given_one_is_logged(tmp_path):
    model = LM()
    model.second = TempNetCausalLMLoss(TempNet(V, hidden_size=4), RHO)
    model.training_step = lambda batch, batch_idx: sum(
        loss(model.head(model.embedding(batch)), batch) for loss in (model.loss, model.second)
    )
    fit = trainer(tmp_path, [TempNetCallback()])
    fit.fit(model, loader(tokens(1)))
    assert {"loss/tau_mean", "second/tau_mean"} < set(fit.logged_metrics)
    fit = trainer(tmp_path, [TempNetCallback(model.second)])
    fit.fit(model, loader(tokens(1)))
    assert {x.split("/")[0] for x in fit.logged_metrics} == {"second"}


def test_both_sides_of_a_contrastive_loss_are_logged_and_its_state_is_saved(tmp_path):
    model = Pairs()
    fit = trainer(tmp_path, [TempNetCallback()])
    fit.fit(model, pairs())
    assert {f"loss/{side}_tau_mean" for side in ("image", "text")} < set(fit.logged_metrics)
    fit.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    state = model.loss.state.log_s_image
    assert state.isfinite().all() and torch.equal(saved["loss.state.log_s_image"], state)


@pytest.mark.parametrize("make, data", [(LM, lambda: loader(tokens(2))), (Pairs, pairs)])
def test_resumed_training_equals_uninterrupted(tmp_path, make, data):
    seed_everything(0)
    start, ends = make().state_dict(), []
    for epochs, path in ((2, None), (1, None), (2, tmp_path / "last.ckpt")):
        model = make()
        model.load_state_dict(start)
        save = ModelCheckpoint(tmp_path, filename="last", enable_version_counter=False)
        callbacks = [TempNetCallback()] + ([] if path else [save])
        trainer(tmp_path, callbacks, max_epochs=epochs).fit(model, data(), ckpt_path=path)
        ends.append(model.state_dict())
    whole, half, resumed = ends
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0, equal_nan=True)
    moved = [name for name in whole if not torch.equal(whole[name], half[name])]
    assert any("temp" in name for name in moved) and len(moved) > 4


def test_bf16_true_casts_the_networks_and_not_the_state(tmp_path):
    model = Pairs()
    trainer(tmp_path, [TempNetCallback()], precision="bf16-true").fit(model, pairs())
    assert model.loss.image_temp_gen.proj.weight.dtype == torch.bfloat16
    assert model.loss.state.log_s_image.dtype == torch.float32
    assert model.loss.state.log_s_image.isfinite().all()


def test_clipping_counts_the_networks_gradients(tmp_path):
    model, data = LM(), tokens(1)
    by_hand(model, data)[0].backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    network = torch.cat([p.grad.flatten() for p in model.loss.parameters()]).norm()
    assert network > 1e-3 * norm
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.zero_grad()
    trainer(tmp_path, gradient_clip_val=float(norm) / 2).fit(model, loader(data))
    weight = model.loss.tempnet.last.weight
    moved = start["loss.tempnet.last.weight"] - weight
    torch.testing.assert_close(moved, 2 * model.lr * weight.grad, rtol=1e-3, atol=1e-7)
    clipped = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    torch.testing.assert_close(clipped, norm / 2, rtol=1e-4, atol=0)


def test_ddp_averages_the_networks_gradients(tmp_path):
    """Two processes with half of the batch each end where one with all of it does."""
    model, data = LM(), tokens(2)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    alone = LM()
    alone.load_state_dict(model.state_dict())
    trainer(tmp_path).fit(alone, loader(data, 2 * B))
    ddp = trainer(tmp_path, [TempNetCallback()], strategy="ddp_spawn", devices=2)
    ddp.fit(model, loader(data))
    assert {*NAMES, "loss"} == set(ddp.callback_metrics)
    expected = dict(alone.named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, expected[name], rtol=1e-5, atol=1e-7)
        assert not torch.equal(p, start[name]) or name == "loss.tempnet.proj.0.bias", name


def test_a_module_without_a_loss_raises(tmp_path):
    model = LM()
    held = {"loss": model.loss}
    model.loss = None
    with pytest.raises(MisconfigurationException, match=r"LM has none such\. Make it an attribute"):
        trainer(tmp_path, [TempNetCallback()]).fit(model, loader(tokens(1)))
    with pytest.raises(MisconfigurationException, match="got TempNetCausalLMLoss"):
        trainer(tmp_path, [TempNetCallback(held["loss"])]).fit(model, loader(tokens(1)))


def test_an_optimizer_without_the_network_raises(tmp_path):
    model = LM()
    model.configure_optimizers = lambda: torch.optim.SGD(model.head.parameters(), 0.1)
    fit = trainer(tmp_path, [TempNetCallback()])
    with pytest.raises(MisconfigurationException, match=r"of loss, but tempnet\.scaler and 6 oth"):
        fit.fit(model, loader(tokens(1)))
    model.loss.requires_grad_(False)  # frozen on purpose
    fit = trainer(tmp_path, [TempNetCallback()])
    fit.fit(model, loader(tokens(1)))


def test_an_epoch_without_a_call_raises(tmp_path):
    model = LM()
    model.training_step = lambda batch, batch_idx: F.cross_entropy(
        model.head(model.embedding(batch)).flatten(0, 1), batch.flatten()
    )
    with pytest.raises(MisconfigurationException, match=r"loss must be called in training_step"):
        trainer(tmp_path, [TempNetCallback()]).fit(model, loader(tokens(1)))
