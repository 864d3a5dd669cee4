"""The pictures of train_lm.py."""

import json

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from train_lm import RHO, Loss, Trainer, batch_of

from tempnet_kernels import dro_cross_entropy, optimal_temperature
from tempnet_kernels.cli import plots

LABELS = {
    Loss.ce: "cross entropy",
    Loss.official: "TempNet, official formula",
    Loss.tempnet: "TempNet, tempnet_kernels",
    Loss.linear: "TempNet, without the logits",
    Loss.frozen: "frozen model + TempNet",
}


def draw(out, trainer):
    """Write the pictures for the runs in ``out``; ``trainer`` gives the temperatures. Returns
    their paths."""
    trainer.load()
    trainer.tempnet.eval()
    joint = Trainer(Loss.tempnet, trainer.config, out)
    joint.load()
    joint.tempnet.eval()
    return [
        loss_curves(out),
        temperature_against_entropy(out, trainer),
        predicted_against_optimal(out, [trainer, joint]),
        coloured_text(out, trainer),
    ]


def loss_curves(out):
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    for kind in Loss:
        path = out / kind / "metrics.jsonl"
        if not path.exists():
            continue
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        style = {"label": LABELS[kind], "linestyle": "--" if kind == Loss.official else "-"}
        axes[0].plot([r["step"] for r in rows], [r["loss"] for r in rows], linewidth=1, **style)
        rows = [r for r in rows if r.get("held_out") is not None]
        tempered = [r["held_out_tempered"] or r["held_out"] for r in rows]
        axes[1].plot([r["step"] for r in rows], tempered, marker="o", markersize=3, **style)
    axes[0].set(xlabel="step", ylabel="training objective (not comparable)")
    axes[1].set(xlabel="step", ylabel="held-out cross entropy, z / tau (nats)")
    axes[1].legend()
    return plots.save(figure, out / "loss_curves.png")


def temperature_against_entropy(out, trainer):
    tau, entropy = [], []
    with torch.no_grad():
        for i in range(8):
            ids, target = batch_of(trainer.held_out_ids, trainer.config, 10**9 + i)
            logits = trainer.model(ids)
            _, stats = dro_cross_entropy(logits, target, return_stats=True)
            tau.append(trainer.tempnet(logits).flatten())
            entropy.append(stats.entropy.flatten())
    path = out / "temperature_against_entropy.png"
    return plots.temperature_against_entropy(
        path, torch.cat(entropy).cpu(), torch.cat(tau).cpu(), "held-out tokens"
    )


@torch.no_grad()
def predicted_against_optimal(out, trainers):
    """The temperatures of held-out tokens beside those that minimise their losses at the same
    rho."""
    figure, axes = plt.subplots(1, len(trainers), figsize=(5.5 * len(trainers), 4.5))
    for axis, trainer in zip(axes, trainers, strict=True):
        tempnet, rho = trainer.tempnet, RHO[trainer.kind]
        predicted, optimal = [], []
        for i in range(8):
            ids, _ = batch_of(trainer.held_out_ids, trainer.config, 10**9 + i)
            logits = trainer.model(ids)
            predicted.append(tempnet(logits).flatten())
            solved = optimal_temperature(logits, rho, tempnet.tau_min, tempnet.tau_max)
            optimal.append(solved.flatten())
        predicted, optimal = torch.cat(predicted).cpu(), torch.cat(optimal).cpu()
        r = torch.corrcoef(torch.stack([ranks(optimal), ranks(predicted)]))[0, 1].item()
        name = f"{LABELS[trainer.kind]}, rho {rho}"
        print(f"{name}: rank correlation of predicted and optimal temperature {r:.3f}")
        axis.scatter(optimal, predicted, s=4, alpha=0.15, linewidths=0)
        axis.axline((1, 1), slope=1, color="grey", linewidth=0.8, label="predicted = optimal")
        ends = (tempnet.tau_min - 0.03, tempnet.tau_max + 0.03)
        axis.set(
            xlim=ends,
            ylim=ends,
            xlabel="optimal temperature (KL = rho, clipped)",
            ylabel="predicted temperature",
            title=f"{name}\nheld-out tokens, rank correlation {r:.2f}",
        )
        axis.legend(loc="upper left")
    return plots.save(figure, out / "predicted_against_optimal.png")


def ranks(x):
    """Equal numbers get the mean of their ranks: many are clipped to the same bound."""
    _, inverse, counts = x.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[inverse]


def coloured_text(out, trainer):
    """The held-out window of the most varied temperatures; a token's background is the one that
    predicted it."""
    windows = []
    with torch.no_grad():
        for i in range(4):
            ids, target = batch_of(trainer.held_out_ids, trainer.config, 10**9 + i)
            windows += zip(trainer.tempnet(trainer.model(ids)).cpu(), target, strict=True)
    tau, target = max(windows, key=lambda window: window[0].std())
    pieces = [trainer.tokenizer.decode([token]) for token in target.tolist()]
    return plots.coloured_text(out / "coloured_text.png", pieces, tau)
