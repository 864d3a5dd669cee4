"""The pictures of train_lm.py."""

import json

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from train_lm import RHO, Loss, Trainer, batch_of

from tempnet_kernels import dro_cross_entropy, optimal_temperature

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
    return save(figure, out / "loss_curves.png")


def temperature_against_entropy(out, trainer):
    tau, entropy = [], []
    with torch.no_grad():
        for i in range(8):
            ids, target = batch_of(trainer.held_out_ids, trainer.config, 10**9 + i)
            logits = trainer.model(ids)
            _, stats = dro_cross_entropy(logits, target, return_stats=True)
            tau.append(trainer.tempnet(logits).flatten())
            entropy.append(stats.entropy.flatten())
    figure, axis = plt.subplots(figsize=(6, 4))
    points = axis.hexbin(
        torch.cat(entropy).cpu(), torch.cat(tau).cpu(), gridsize=50, bins="log", mincnt=1
    )
    figure.colorbar(points, label="held-out tokens")
    axis.set(xlabel="entropy of the prediction (nats)", ylabel="predicted temperature")
    axis.ticklabel_format(useOffset=False)
    return save(figure, out / "temperature_against_entropy.png")


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
    return save(figure, out / "predicted_against_optimal.png")


def ranks(x):
    """Equal numbers get the mean of their ranks: many are clipped to the same bound."""
    _, inverse, counts = x.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[inverse]


def coloured_text(out, trainer, width=80):
    """The held-out window of the most varied temperatures; a token's background is the one that
    predicted it."""
    windows = []
    with torch.no_grad():
        for i in range(4):
            ids, target = batch_of(trainer.held_out_ids, trainer.config, 10**9 + i)
            windows += zip(trainer.tempnet(trainer.model(ids)).cpu(), target, strict=True)
    tau, target = max(windows, key=lambda window: window[0].std())
    low, high = tau.min().item(), tau.max().item()
    colours = plt.get_cmap("coolwarm")
    cells, row, column = [], 0, 0
    for token, value in zip(target.tolist(), tau.tolist(), strict=True):
        for character in trainer.tokenizer.decode([token]).replace("\t", "    "):
            if character == "\n" or column >= width:
                row, column = row + 1, 0
            if character != "\n":
                cells.append((row, column, character, (value - low) / max(high - low, 1e-9)))
                column += 1
    figure, axis = plt.subplots(figsize=(12, 0.24 * (row + 1) + 1))
    for r, c, character, shade in cells:
        axis.add_patch(plt.Rectangle((c, -r - 0.5), 1, 1, color=colours(shade), alpha=0.6, lw=0))
        axis.text(c + 0.5, -r, character, family="monospace", fontsize=9, ha="center", va="center")
    axis.set(xlim=(0, width), ylim=(-row - 0.6, 0.6))
    axis.axis("off")
    scale = plt.cm.ScalarMappable(plt.Normalize(low, high), colours)
    bar = figure.colorbar(scale, ax=axis, orientation="horizontal", shrink=0.4, pad=0.05)
    bar.set_label("predicted temperature")
    bar.formatter.set_useOffset(False)
    return save(figure, out / "coloured_text.png")


def save(figure, path):
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
    return path
