"""Tables and a picture from the JSON of pytest-benchmark.

python benchmarks/report.py benchmarks/results/latest.json
"""

import json
import math
from pathlib import Path
from statistics import median
from typing import Annotated

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import typer

OURS = "tempnet_kernels"
COPY = "copy of the logits"
# What every time of an operator is compared with.
LIMITS = {
    "dro_cross_entropy": COPY,
    "dro_contrastive": "four matrix products",
    "tempered_softmax": COPY,
    "tempered_softmax, forward": COPY,
    "optimal_temperature": COPY,
    "linear_dro_cross_entropy": "three matrix products",
    "linear_dro_cross_entropy, frozen": "one matrix product",
    "TempNet of a linear layer": "its products, folded",
}


def table(info):
    """A Markdown table of one shape: medians, their spread, ratios to ours and to the limit, peak
    memory."""
    limit = LIMITS[info["op"]]
    peaks = info["peak_extra_mib"]
    shape = ", ".join(f"{letter.upper()} = {info[letter]}" for letter in "vd" if letter in info)
    size = f" (logits {info['logits_mib']:.0f} MiB)" if "logits_mib" in info else ""
    medians = {name: median(times) for name, times in info["time_ms"].items()}
    lines = [
        f"\n**{info['op']}, N = {info['n']}, {shape}, {info['dtype']}**{size}\n",
        f"| | median ms | min to max | ours is faster by | x {limit} | extra peak MiB |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, times in sorted(info["time_ms"].items(), key=lambda item: -medians[item[0]]):
        lines.append(
            f"| {name} | {medians[name]:.4g} | {min(times):.4g} to {max(times):.4g} | "
            f"{medians[name] / medians[OURS]:.2f} | {medians[name] / medians[limit]:.2f} | "
            f"{peaks.get(name, math.nan):.1f} |"
        )
    for name in peaks.keys() - medians.keys():
        lines.append(f"| {name} | | | | | {peaks[name]:.1f} |")
    return "\n".join(lines)


def overhead_table(info):
    """Launches and time of every call of one shape."""
    shape = " x ".join(map(str, info["shape"]))
    lines = [f"\n**{info['op']}, {shape}**\n", "| | launches | median us | min to max |"]
    lines.append("| --- | ---: | ---: | ---: |")
    for name, times in info["time_us"].items():
        lines.append(
            f"| {name} | {info['launches'][name]} | {median(times):.4g} | "
            f"{min(times):.4g} to {max(times):.4g} |"
        )
    return "\n".join(lines)


def contrastive_picture(infos, path):
    """Time and peak memory against the batch, at the first width and dtype."""
    infos = [x for x in infos if (x["d"], x["dtype"]) == (infos[0]["d"], infos[0]["dtype"])]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    batches = [x["n"] for x in infos]
    nothing = [math.nan]  # it ran out of memory there
    for name in infos[0]["time_ms"]:
        times = [median(x["time_ms"].get(name, nothing)) for x in infos]
        axes[0].plot(batches, times, "o-", label=name)
        peaks = [x["peak_extra_mib"].get(name, math.nan) for x in infos]
        axes[1].plot(batches, peaks, "o-", label=name)
    for axis, label in zip(axes, ("time, ms", "extra peak memory, MiB"), strict=True):
        xlabel = f"B (D = {infos[0]['d']}, {infos[0]['dtype']})"
        axis.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=label)
        axis.set_xticks(batches, batches)
        axis.minorticks_off()
    axes[0].legend(frameon=False)
    figure.suptitle(infos[0]["environment"]["device"])
    figure.savefig(path, dpi=130)


def rows_picture(infos, path):
    infos = [x for x in infos if x["n"] >= 512]
    names = [OURS, COPY, *(n for n in infos[0]["time_ms"] if n not in (OURS, COPY))]
    figure, axis = plt.subplots(figsize=(12, 4.5))
    for i, name in enumerate(names):
        nothing = [math.nan]  # it ran out of memory there
        ratios = [
            median(x["time_ms"].get(name, nothing)) / median(x["time_ms"][COPY]) for x in infos
        ]
        places = [j + (i - len(names) / 2) * 0.8 / len(names) for j in range(len(infos))]
        axis.bar(places, ratios, 0.8 / len(names), label=name, align="edge")
    labels = [f"V = {x['v']}\nN = {x['n']}\n{x['dtype']}" for x in infos]
    axis.set_xticks(range(len(infos)), labels)
    axis.set(yscale="log", ylabel="time / time of a copy of the logits")
    axis.set_title(infos[0]["environment"]["device"])
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, dpi=130, bbox_inches="tight")


def main(path: Annotated[Path, typer.Argument(help="JSON written by pytest-benchmark.")]):
    """Write FILE.md and a picture of every operator beside FILE.json, and print the tables."""
    infos = [b["extra_info"] for b in json.loads(path.read_text())["benchmarks"]]
    environment = ", ".join(f"{k} {v}" for k, v in infos[0]["environment"].items())
    tables = (overhead_table(x) if "launches" in x else table(x) for x in infos)
    text = "\n".join([environment, *tables]) + "\n"
    path.with_suffix(".md").write_text(text)
    for op, draw in (
        ("dro_cross_entropy", rows_picture),
        ("dro_contrastive", contrastive_picture),
        ("tempered_softmax", rows_picture),
    ):
        of_op = [x for x in infos if x["op"] == op]
        if of_op:
            draw(of_op, path.with_suffix(".png" if len(of_op) == len(infos) else f".{op}.png"))
    print(text)


if __name__ == "__main__":
    typer.run(main)
