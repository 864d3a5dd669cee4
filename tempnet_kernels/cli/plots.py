"""Pictures of the temperatures of tokens."""

import matplotlib.pyplot as plt


def coloured_text(path, pieces, tau, width=80, title=None):
    """Write ``pieces``, the text token by token, each on the colour of its temperature. ``tau [n]``
    on the CPU. Returns ``path``."""
    low, high = tau.min().item(), tau.max().item()
    colours = plt.get_cmap("coolwarm")
    cells, row, column = [], 0, 0
    for piece, value in zip(pieces, tau.tolist(), strict=True):
        for character in piece.replace("\t", "    "):
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
    axis.set_title(title, parse_math=False)
    axis.axis("off")
    scale = plt.cm.ScalarMappable(plt.Normalize(low, high), colours)
    bar = figure.colorbar(scale, ax=axis, orientation="horizontal", shrink=0.4, pad=0.05)
    bar.set_label("predicted temperature")
    bar.formatter.set_useOffset(False)
    return save(figure, path)


def temperature_against_entropy(path, entropy, tau, label="tokens"):
    """Write how many tokens have which entropy and temperature, ``[n]`` each, on the CPU. Returns
    ``path``."""
    figure, axis = plt.subplots(figsize=(6, 4))
    points = axis.hexbin(entropy, tau, gridsize=50, bins="log", mincnt=1)
    figure.colorbar(points, label=label)
    axis.set(xlabel="entropy of the prediction (nats)", ylabel="predicted temperature")
    axis.ticklabel_format(useOffset=False)
    return save(figure, path)


def histogram(path, tau, low, high):
    """Write how many tokens have which temperature, between the bounds ``low`` and ``high``.
    Returns ``path``."""
    figure, axis = plt.subplots(figsize=(6, 4))
    axis.hist(tau, bins=50)
    # Drawn, the bounds would leave a sliver of temperatures that are close together.
    axis.set(xlabel=f"predicted temperature, of [{low}, {high}]", ylabel="tokens")
    axis.ticklabel_format(axis="x", useOffset=False)
    return save(figure, path)


def save(figure, path):
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
    return path
