"""Draw ROC and CMC curves, similarity histograms, training curves, t-SNE layouts and face comparisons.

Pictures are drawn without pyplot, on white, in the color-blind safe palette of Okabe and Ito. Line styles, markers,
hatching or text repeat what colors say. The file's extension determines the format (.png, .svg, .pdf).
"""
import contextlib
import os
import sys
from pathlib import Path

import numpy as np

from faces.files import atomic_write

# MPLBACKEND, inherited from a notebook, may name a backend that is not installed here; importing matplotlib would fail.
backend = None if "matplotlib" in sys.modules else os.environ.pop("MPLBACKEND", None)
import matplotlib

if backend is not None:
    os.environ["MPLBACKEND"] = backend
    with contextlib.suppress(ValueError):
        matplotlib.rcParams["backend"] = backend
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import EngFormatter

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
LINES = "-", "--", ":", "-.", (0, (1, 4)), (0, (8, 2)), (0, (6, 1, 1, 1, 1, 1))     # dots and dashes in points
MARKERS = "osD^vP*X<>"
DPI = 150


def picture(path, size: tuple, draw, *args):
    """Save a picture of `size` (width, height) inches, which draw(axes, *args) draws, one of the functions below."""
    figure, axes = new_figure(size)
    draw(axes, *args)
    save(figure, path)


def draw_roc(axes, curves: dict):
    """Draw ROC curves into matplotlib axes: for each name, (far, tar), float (V + 1,), where far rises from 0 to 1."""
    min_far = min(0.1, *(10 ** np.floor(np.log10(far[far > 0].min())) for far, _ in curves.values()))
    lowest = 1.0
    for i, (name, (far, tar)) in enumerate(curves.items()):
        start = np.searchsorted(far, min_far, side="right") - 1  # the last point that is not right of the y axis
        axes.step(np.maximum(far[start:], min_far), tar[start:], where="post", label=plain(name), **_line(i))
        lowest = min(lowest, tar[start])
    ylim = _rate_limits(lowest - 0.05 * len(curves))    # room for the legend
    axes.set(xscale="log", xlim=(min_far, 1), ylim=ylim, xlabel="false acceptance rate", ylabel="true acceptance rate")
    if min_far == 0.1:
        axes.set_xticks((0.1, 0.2, 0.5, 1), ("0.1", "0.2", "0.5", "1"))    # one decade has only two powers of 10
    axes.xaxis.set_minor_formatter("")
    axes.legend(loc="lower right", frameon=False)


def draw_cmc(axes, ranks: int, curves: dict):
    """Draw CMC curves up to the rank `ranks`: for each name, the cmc of faces.verification.metrics.Identification."""
    ranks = min(ranks, *(len(cmc) for cmc in curves.values()))
    for i, (name, cmc) in enumerate(curves.items()):  # ranks are whole numbers, so the rate does not change in between
        axes.step(range(1, ranks + 2), [*cmc[:ranks], cmc[ranks - 1]], where="post", label=plain(name), **_line(i))
    axes.set(xscale="log", xlim=(1, ranks + 1), ylim=_rate_limits(min(cmc[0] for cmc in curves.values())),
             xlabel="rank", ylabel="probes identified")
    axes.set_xticks([rank for rank in (1, 2, 3, 5, 10, 20, 50, 100) if rank <= ranks])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.legend(loc="lower right", frameon=False)


def _line(i):
    return {"color": COLORS[i % 7], "linestyle": LINES[i % 7]}


def _rate_limits(lowest):
    """Return the limits of an axis of rates, from a multiple of 0.1 below the lowest rate to slightly above 1."""
    return max(0, np.floor(lowest * 10 - 0.2) / 10), 1.01


def draw_histogram(axes, similarities: np.ndarray, same: np.ndarray, threshold: float):
    """Draw histograms of the similarities (P,) of genuine pairs, where `same` (P,) is true, and of impostor pairs."""
    bins = np.histogram_bin_edges(similarities, int(np.clip(len(similarities) ** 0.5, 10, 60)))
    for mask, name, color, hatch in ((~same, "impostor", COLORS[1], "////"), (same, "genuine", COLORS[0], None)):
        axes.hist(similarities[mask], bins, color=color, alpha=0.3)
        axes.hist(similarities[mask], bins, color=color, histtype="step", hatch=hatch, label=f"{name} ({mask.sum():,})")
    axes.axvline(threshold, color=COLORS[-1], linestyle="--", linewidth=1, label=f"threshold {threshold:.3f}")
    axes.set(xlabel="cosine similarity", ylabel="pairs", ylim=(0, 1.35 * axes.get_ylim()[1]))  # room for the legend
    axes.yaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.legend(loc="upper left", framealpha=1, edgecolor="none")  # opaque, because it may cover the threshold line


def draw_training(axes, images: np.ndarray, loss: np.ndarray, lfw: np.ndarray):
    """Draw the mean loss and the accuracy on LFW, or the mean over several sets, 0 to 1 or NaN, of E epochs, over the
    number of images seen, (E,) each."""
    axes.plot(images, loss, color=COLORS[0], marker="o", markersize=4)
    axes.set(xlim=(0, None), ylim=(0, None), xlabel="images seen")
    axes.set_ylabel("loss (solid line)", color=COLORS[0])
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    measured = np.isfinite(lfw)
    if measured.any():
        accuracy = axes.twinx()
        accuracy.spines["top"].set_visible(False)
        accuracy.plot(images[measured], 100 * lfw[measured], color=COLORS[1], marker="s", markersize=4, linestyle="--")
        accuracy.set_ylabel("accuracy in % (dashed line)", color=COLORS[1])


def tsne_panels(path, panels: list, labels: np.ndarray, names: list[str]):
    """Draw t-SNE layouts of the embeddings of up to 70 identities: for each panel (title, float (N, 2) points).
    `labels`, int (N,), are indices into `names`. The legend numbers the identities. Each number is also drawn at the
    medoid of the identity's points: the one nearest to all others, which is always in a cluster, unlike the mean."""
    side = 5.4 if len(panels) == 1 else 3.3   # inches; several panels must fit side by side on a page
    figure, axes = new_figure((side * len(panels) + 1.6, side + 0.2), len(panels))
    for panel, (title, points) in zip(np.ravel(axes), panels):
        for i, name in enumerate(names):
            style = {"color": COLORS[i % 7], "marker": MARKERS[i % 10], "linewidths": 0, "alpha": 0.85}
            own = points[labels == i]
            panel.scatter(*own.T, s=36, label=f"{i + 1}  {plain(name)}", **style)
            medoid = own[np.linalg.norm(own[:, None] - own, axis=2).sum(1).argmin()]
            panel.annotate(str(i + 1), medoid, ha="center", va="center", fontsize=9, fontweight="bold",
                           path_effects=[withStroke(linewidth=2, foreground="white")])
        panel.set_title(plain(title), fontsize=10)
        panel.set(xticks=[], yticks=[])        # only distances mean something
        panel.spines[:].set(visible=True, color="#bbbbbb")
    columns = 1 + (len(names) - 1) // round(4.6 * side)       # round(4.6 * side) names fit in the height of the figure
    panel.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8, ncols=columns)
    save(figure, path)


def comparison_picture(path, crops: np.ndarray, names: list[str], title: str):
    """Draw two aligned faces, uint8 RGB (2, H, W, 3), side by side, with a caption below each and a title above."""
    figure, axes = new_figure((4.4, 3.1), 2)
    for panel, crop, name in zip(axes, crops, names):
        panel.imshow(crop)
        panel.set_axis_off()
        short = name if len(name) <= 30 else f"{name[:19]}...{name[-8:]}"
        panel.set_title(plain(short), fontsize=9, y=-0.12)
    figure.suptitle(title, fontsize=10)
    save(figure, path)


def plain(name: str) -> str:
    """Return a name as text for a picture: dollar signs start no formula, and bytes that are not UTF-8 are escaped."""
    return name.encode(errors="backslashreplace").decode().replace("$", r"\$")


def new_figure(size: tuple, columns: int = 1, rows: int = 1, **grid) -> tuple:
    """Return a matplotlib figure of `size` (width, height) inches, and its axes, from subplots() with `grid`."""
    figure = Figure(size, layout="constrained")
    axes = figure.subplots(rows, columns, **grid)
    for panel in np.ravel(axes):
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)
    return figure, axes


def save(figure, path):
    """Write a figure to `path` atomically, in the format given by the extension (PNG if it has none)."""
    with atomic_write(path) as file:
        figure.savefig(file, format=Path(path).suffix[1:] or "png", dpi=DPI, facecolor="white")
