"""Pictures: ROC and CMC curves, histograms of similarity, training curves, t-SNE panels.

They are drawn without pyplot's global state, on white, in the color-blind safe palette of Okabe and Ito. The extension
of the file determines the format (.png, .svg, .pdf).
"""
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import EngFormatter

from faces.files import atomic_write

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = "osD^vP*X<>"
DPI = 150


def roc_picture(path, curves):
    """Draw ROC curves.

    Args:
        path: the picture.
        curves: see draw_roc().
    """
    figure, axes = new_figure((6, 4.5))
    draw_roc(axes, curves)
    save(figure, path)


def draw_roc(axes, curves):
    """Draw ROC curves as steps over a logarithmic false acceptance rate.

    Args:
        axes: matplotlib axes.
        curves: dict from a curve's name to (far, tar), float (V + 1,) each; far rises from 0 to 1.
    """
    left = min(0.1, *(10 ** np.floor(np.log10(far[far > 0].min())) for far, _ in curves.values()))
    lowest = 1.0
    for i, (name, (far, tar)) in enumerate(curves.items()):
        start = np.searchsorted(far, left, side="right") - 1  # the last point at or left of the y axis
        axes.step(np.maximum(far[start:], left), tar[start:], where="post", label=name, **_line(i))
        lowest = min(lowest, tar[start])
    axes.set(xscale="log", xlim=(left, 1), ylim=_rates_from(lowest - 0.05 * len(curves)),       # room for the legend
             xlabel="false acceptance rate", ylabel="true acceptance rate")
    axes.legend(loc="lower right", frameon=False)


def cmc_picture(path, ranks, curves):
    """Draw cumulative match characteristics: the fraction of probes identified within the first ranks.

    Args:
        path: the picture.
        ranks: last rank to show; fewer if the gallery is smaller.
        curves: dict from a curve's name to faces.verification.metrics.Identification.cmc, float (G,).
    """
    figure, axes = new_figure((6, 4))
    ranks = min(ranks, *(len(cmc) for cmc in curves.values()))
    for i, (name, cmc) in enumerate(curves.items()):
        axes.plot(range(1, ranks + 1), cmc[:ranks], label=name, **_line(i))
    axes.set(xscale="log", xlim=(1, ranks), ylim=_rates_from(min(cmc[0] for cmc in curves.values())), xlabel="rank",
             ylabel="probes identified")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.legend(loc="lower right", frameon=False)
    save(figure, path)


def _line(i):
    """Return color and line style of the i-th curve."""
    return {"color": COLORS[i % len(COLORS)], "linestyle": ("-", "--", ":", "-.")[i % 4]}


def _rates_from(lowest):
    """Return the limits of an axis of rates: from a multiple of 0.1 below the lowest to a little over 1."""
    return max(0, np.floor(lowest * 10 - 0.2) / 10), 1.01


def histogram_picture(path, similarities, same, threshold):
    """Draw histograms of the similarities of genuine and impostor pairs, and the threshold.

    Args:
        path: the picture.
        similarities, same, threshold: see draw_histogram().
    """
    figure, axes = new_figure((6, 4))
    draw_histogram(axes, similarities, same, threshold)
    save(figure, path)


def draw_histogram(axes, similarities, same, threshold):
    """Draw histogram_picture() into given axes.

    Args:
        similarities: float (P,).
        same: bool (P,).
        threshold: float.
    """
    bins = np.histogram_bin_edges(similarities, int(np.clip(len(similarities) ** 0.5, 10, 60)))
    for kind, name, color in ((~same, "impostor", COLORS[1]), (same, "genuine", COLORS[0])):
        axes.hist(similarities[kind], bins, color=color, alpha=0.3)
        axes.hist(similarities[kind], bins, color=color, histtype="step", label=f"{name} ({kind.sum()})")
    axes.axvline(threshold, color=COLORS[-1], linestyle="--", linewidth=1, label=f"threshold {threshold:.3f}")
    axes.set(xlabel="cosine similarity", ylabel="pairs", ylim=(0, 1.35 * axes.get_ylim()[1]))  # room for the legend
    axes.legend(loc="upper left", framealpha=1, edgecolor="none")  # drawn over the line of the threshold


def training_picture(path, images, loss, lfw):
    """Draw the training loss and the LFW accuracy.

    Args:
        path: the picture.
        images: float (E,), number of images seen by the end of each epoch.
        loss: float (E,), mean over each epoch.
        lfw: float (E,), accuracy; NaN if it was not measured.
    """
    figure, axes = new_figure((6, 4))
    axes.plot(images, loss, color=COLORS[0], marker="o", markersize=4)
    axes.set(xlim=(0, None), ylim=(0, None), xlabel="images seen")
    axes.set_ylabel("loss", color=COLORS[0])
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    measured = np.isfinite(lfw)
    if measured.any():
        right = axes.twinx()
        right.spines["top"].set_visible(False)
        right.plot(images[measured], 100 * lfw[measured], color=COLORS[1], marker="s", markersize=4, linestyle="--")
        right.set_ylabel("LFW accuracy (%)", color=COLORS[1])
    save(figure, path)


def tsne_panels(path, panels, labels, names):
    """Draw t-SNE layouts of embeddings, one panel each, with a color and marker per identity (at most 70).

    The number of each identity in the legend is also shown at the median of its embeddings.

    Args:
        path: the picture.
        panels: list of (title, float (N, 2) points).
        labels: int (N,), 0 .. len(names) - 1.
        names: the identities' names.
    """
    side = 5.4 if len(panels) == 1 else 3.3   # inches; several panels have to fit side by side on a page
    figure, axes = new_figure((side * len(panels) + 1.6, side + 0.2), len(panels))
    for panel, (title, points) in zip(np.ravel(axes), panels):
        for i, name in enumerate(names):
            style = {"color": COLORS[i % 7], "marker": MARKERS[i % 10], "linewidths": 0, "alpha": 0.85}
            panel.scatter(*points[labels == i].T, s=28, label=f"{i + 1}  {name}", **style)
            panel.annotate(str(i + 1), np.median(points[labels == i], 0), ha="center", va="center", fontsize=9,
                           fontweight="bold", path_effects=[withStroke(linewidth=2, foreground="white")])
        panel.set_title(title, fontsize=10, parse_math=False)
        panel.set_axis_off()
    columns = 1 + (len(names) - 1) // round(4.6 * side)       # one column per as many names as fit the height
    panel.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8, ncols=columns)
    save(figure, path)


def comparison_picture(path, crops, names, title):
    """Draw two aligned faces side by side.

    Args:
        path: the picture.
        crops: uint8 (2, H, W, 3), RGB.
        names: captions below the faces.
        title: text above both.
    """
    figure, axes = new_figure((4.4, 3.1), 2)
    for panel, crop, name in zip(axes, crops, names):
        panel.imshow(crop)
        panel.set_axis_off()
        panel.set_title(_shortened(name), fontsize=9, y=-0.12, parse_math=False)
    figure.suptitle(title, fontsize=10)
    save(figure, path)


def _shortened(name, length=30):
    return name if len(name) <= length else name[:length - 11] + "..." + name[-8:]


def new_figure(size, columns=1, rows=1):
    """Return a figure of `size` inches and its axes, in `rows` and `columns`."""
    figure = Figure(size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns)
    for panel in np.ravel(axes):
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)
    return figure, axes


def save(figure, path):
    """Write a picture atomically, in the format given by the extension of its name."""
    with atomic_write(path) as file:
        figure.savefig(file, format=Path(path).suffix[1:] or "png", dpi=DPI, facecolor="white")
