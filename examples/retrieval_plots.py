"""The pictures of train_retrieval.py."""

import itertools
import statistics
import textwrap
from dataclasses import replace

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from loop import read_rows
from train_retrieval import Data, Method, Trainer, finished

LABELS = {
    Method.clip: "CLIP",
    Method.sogclr: "SogCLR",
    Method.isogclr: "iSogCLR",
    Method.tempnet: "TempNet",
}

# Two glyphs of a face are near-duplicates if their pixels correlate by more than this.
NEAR = 0.8


def draw(out, config):
    """Write the pictures of the finished runs in ``out``; returns their paths."""
    runs = finished(out, config)
    if not runs:
        return []
    folder = out / config.data
    paths = [recall_curves(runs, folder)]
    if config.data == Data.glyphs and Method.tempnet in runs:
        stored = runs[Method.tempnet][0]["config"] | {"device": config.device}
        trainer = Trainer(replace(config, **stored), out)
        trainer.load()
        tau_image, tau_text = trainer.temperatures()
        paths.append(temperature_of_duplicates(trainer.train, tau_image, tau_text, folder))
        paths.append(hottest_and_coldest(trainer.train, tau_image, folder))
    return paths


def recall_curves(runs, folder):
    """Mean over seeds, and a band of one standard deviation."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for axis, name in zip(axes, ("image_to_text", "text_to_image"), strict=True):
        for method, results in runs.items():
            curves = []
            for result in results:
                run = folder / method / str(result["config"]["seed"])
                rows = read_rows(run / "metrics.jsonl")
                curves.append([row[f"{name}@1"] for row in rows if f"{name}@1" in row])
            epochs = range(1, len(curves[0]) + 1)
            mean = [statistics.mean(x) for x in zip(*curves, strict=True)]
            spread = [statistics.pstdev(x) for x in zip(*curves, strict=True)]
            (drawn,) = axis.plot(epochs, mean, label=f"{LABELS[method]} ({len(curves)} seeds)")
            low = [m - s for m, s in zip(mean, spread, strict=True)]
            high = [m + s for m, s in zip(mean, spread, strict=True)]
            axis.fill_between(epochs, low, high, color=drawn.get_color(), alpha=0.2, lw=0)
        axis.set(xlabel="epoch", title=name.replace("_", " "))
    axes[0].set(ylabel="held-out recall@1")
    axes[0].legend()
    return save(figure, folder / "recall.png")


def near_duplicates(pairs):
    """How many other training glyphs of its face look like each glyph, [N]."""
    counts = torch.zeros(len(pairs))
    for face in pairs.faces.unique():
        rows = torch.nonzero(pairs.faces == face).squeeze(1)
        x = pairs.images[rows].flatten(1).float()
        x = F.normalize(x - x.mean(1, keepdim=True), dim=1)
        for part in torch.arange(len(rows)).split(1024):
            counts[rows[part]] = (x[part] @ x.T > NEAR).sum(1).float() - 1
    return counts


def temperature_of_duplicates(pairs, tau_image, tau_text, folder):
    counts = near_duplicates(pairs)
    edges = [0, 1, 2, 4, 8, 16, 32, 64, 128, 1e9]
    names, bins = [], []
    for low, high in itertools.pairwise(edges):
        inside = (counts >= low) & (counts < high)
        if inside.any():
            name = f"{low}" if high - low == 1 else f"{low}-{high - 1}"
            names.append(f"{name if high < 1e9 else f'{low}+'}\n({int(inside.sum())})")
            bins.append(inside)
    figure, axes = plt.subplots(1, 2, figsize=(12, 4), sharey=True)
    for axis, tau, side in zip(axes, (tau_image, tau_text), ("image", "text"), strict=True):
        r = torch.corrcoef(torch.stack([tau, torch.log1p(counts)]))[0, 1].item()
        print(f"{side} temperature and log(1 + near-duplicates): correlation {r:.3f}")
        axis.boxplot([tau[inside].numpy() for inside in bins], tick_labels=names, showfliers=False)
        axis.set(
            xlabel=f"training glyphs of the face correlated above {NEAR} (glyphs in the bin)",
            title=f"{side} side, correlation {r:.2f}",
        )
        axis.tick_params(axis="x", labelsize=7)
    axes[0].set(ylabel="predicted temperature")
    return save(figure, folder / "temperature_of_duplicates.png")


def hottest_and_coldest(pairs, tau, folder, columns=10, rows=2):
    """Glyphs with the highest and the lowest temperatures, one of each name."""
    figure, axes = plt.subplots(2 * rows, columns, figsize=(1.35 * columns, 4 * rows))
    for half, descending in ((axes[:rows], True), (axes[rows:], False)):
        seen = {}
        for i in tau.argsort(descending=descending).tolist():
            seen.setdefault(int(pairs.text_ids[i]), i)
            if len(seen) == half.size:
                break
        for axis, i in zip(half.flat, seen.values(), strict=True):
            axis.imshow(pairs.images[i].numpy(), cmap="gray_r", vmin=0, vmax=255)
            name = textwrap.fill(pairs.names[int(pairs.text_ids[i])].lower(), 18, max_lines=3)
            axis.set_xlabel(name, fontsize=6)
            axis.set_title(f"{tau[i]:.4f}", fontsize=8, color="firebrick" if descending else "navy")
            axis.set(xticks=[], yticks=[])
    figure.suptitle("hottest (red) and coldest (blue) training glyphs, image side")
    figure.tight_layout()
    return save(figure, folder / "hottest_and_coldest.png")


def save(figure, path):
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
    return path
