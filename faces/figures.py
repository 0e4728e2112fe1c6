"""Pictures of a verification: ROC curves, the two histograms of similarity, a map of embeddings.

Drawn off screen without pyplot's global state, on white, in the colours of Okabe and Ito, which colour-blind eyes tell
apart. The file's extension decides the format (.png, .svg, .pdf).
"""
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from faces.files import atomic_write

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = "osD^vP*X<>"
DPI = 150


def roc_picture(path, curves):
    """Draw ROC curves over a logarithmic false acceptance rate, as steps: the best rate that some threshold reaches.

    Args:
        path: the picture.
        curves: dict from a curve's name to (far, tar), float (V + 1,) each, far rising from 0 to 1.
    """
    figure, axes = _figure((6, 4.5))
    left = min(0.1, *(10 ** np.floor(np.log10(far[far > 0].min())) for far, _ in curves.values()))
    lowest = 1.0
    for i, (name, (far, tar)) in enumerate(curves.items()):
        start = np.searchsorted(far, left, side="right") - 1  # the last point at or left of the axis
        axes.step(np.maximum(far[start:], left), tar[start:], where="post", color=COLOURS[i % len(COLOURS)],
                  linestyle=("-", "--", ":", "-.")[i % 4], label=name)
        lowest = min(lowest, tar[start])
    axes.set(xscale="log", xlim=(left, 1), ylim=(max(0, np.floor(lowest * 10 - 0.2) / 10), 1.01),
             xlabel="false acceptance rate", ylabel="true acceptance rate")
    axes.legend(loc="lower right", frameon=False)
    _save(figure, path)


def histogram_picture(path, similarities, same, threshold):
    """Draw how the similarities of genuine and of impostor pairs spread, and the threshold between them.

    Args:
        path: the picture.
        similarities: float (P,).
        same: bool (P,).
        threshold: float.
    """
    figure, axes = _figure((6, 4))
    bins = np.histogram_bin_edges(similarities, int(np.clip(len(similarities) ** 0.5, 10, 60)))
    for kind, name, colour in ((~same, "impostor", COLOURS[1]), (same, "genuine", COLOURS[0])):
        axes.hist(similarities[kind], bins, color=colour, alpha=0.3)
        axes.hist(similarities[kind], bins, color=colour, histtype="step", label=f"{name} ({kind.sum()})")
    axes.axvline(threshold, color=COLOURS[-1], linestyle="--", linewidth=1, label=f"threshold {threshold:.3f}")
    axes.set(xlabel="cosine similarity", ylabel="pairs")
    axes.legend(frameon=False)
    _save(figure, path)


def tsne_picture(path, points, labels, names):
    """Draw embeddings that were laid out in the plane, one colour and marker per identity (70 can be told apart).

    Args:
        path: the picture.
        points: float (N, 2).
        labels: int (N,), 0 .. len(names) - 1.
        names: the identities' names.
    """
    figure, axes = _figure((7, 5.5))
    for i, name in enumerate(names):
        x, y = points[labels == i].T
        axes.scatter(x, y, s=28, color=COLOURS[i % 7], marker=MARKERS[i % 10], linewidths=0, alpha=0.85, label=name)
    axes.set_axis_off()
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8, ncols=1 + (len(names) - 1) // 25)
    _save(figure, path)


def _figure(size):
    figure = Figure(size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _save(figure, path):
    with atomic_write(path) as file:
        figure.savefig(file, format=Path(path).suffix[1:] or "png", dpi=DPI, facecolor="white")
