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


def table(info):
    """A Markdown table of one shape: medians, their spread, ratios to ours and to the copy, peak
    memory."""
    medians = {name: median(times) for name, times in info["time_ms"].items()}
    lines = [
        f"\n**{info['op']}, N = {info['n']}, V = {info['v']}, {info['dtype']}** "
        f"(logits {info['logits_mib']:.0f} MiB)\n",
        "| | median ms | min to max | ours is faster by | x copy | extra peak MiB |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, times in sorted(info["time_ms"].items(), key=lambda item: -medians[item[0]]):
        lines.append(
            f"| {name} | {medians[name]:.4g} | {min(times):.4g} to {max(times):.4g} | "
            f"{medians[name] / medians[OURS]:.2f} | {medians[name] / medians[COPY]:.2f} | "
            f"{info['peak_extra_mib'][name]:.1f} |"
        )
    for name in info["peak_extra_mib"].keys() - medians.keys():
        lines.append(f"| {name} | | | | | {info['peak_extra_mib'][name]:.1f} |")
    return "\n".join(lines)


def picture(infos, path):
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
    """Write FILE.md and FILE.png beside FILE.json, and print the tables."""
    infos = [b["extra_info"] for b in json.loads(path.read_text())["benchmarks"]]
    environment = ", ".join(f"{k} {v}" for k, v in infos[0]["environment"].items())
    text = "\n".join([environment, *map(table, infos)]) + "\n"
    path.with_suffix(".md").write_text(text)
    picture(infos, path.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    typer.run(main)
