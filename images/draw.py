"""Draw the pictures of the README that need no data into this folder; tsne.png is by tools/tsne.py.

    python draw.py

They depend on the project's own code and on a public-domain photo that scikit-image carries (Eileen Collins, NASA),
and come out the same each time. Needs requirements-dev.txt.
"""
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from skimage import data

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from faces.align import TEMPLATE, align
from faces.figures import COLOURS
from mtcnn.detector import Detector
from sphereFace.net import psi

HERE = Path(__file__).resolve().parent
STYLES = ("-", "--", "-.", ":")


def margins():
    """The target's logit over its angle: SphereFace's psi for m = 1..4, its blends by lambda, CosFace's cos t - m."""
    t = np.linspace(0, np.pi, 721)
    cosine = torch.tensor(np.cos(t))
    figure, (left, middle, right) = _figure((10, 3.6), 3)
    _curves(left, t, r"SphereFace: $\psi(\theta)=(-1)^k\cos m\theta-2k$",
            {f"m = {m}": psi(cosine, m).numpy() for m in (1, 2, 3, 4)})
    _curves(middle, t, r"Annealed, m = 4: $(\lambda\cos\theta+\psi(\theta))/(1+\lambda)$",
            {rf"$\lambda$ = {lam}": ((lam * cosine + psi(cosine, 4)) / (1 + lam)).numpy() for lam in (1000, 20, 5, 0)})
    _curves(right, t, r"CosFace: $\cos\theta-m$", {f"m = {m}": np.cos(t) - m for m in (0, 0.2, 0.35, 0.5)})
    left.set_ylabel("target logit, over |x| or s")
    _save(figure, "margins.png")


def detection():
    """MTCNN on a photo, and the face before and after alignment with the template's points."""
    photo = data.astronaut()[:300, 60:400]
    faces = Detector(device="cpu").detect(photo)
    face = align(photo, faces.landmarks[0])
    figure, (whole, aligned) = _figure((7, 3.4), 2, width_ratios=(1.9, 1))
    whole.imshow(photo)
    for (x1, y1, x2, y2), score in zip(faces.boxes, faces.scores):
        whole.plot((x1, x2, x2, x1, x1), (y1, y1, y2, y2, y1), color=COLOURS[4], linewidth=2)
        whole.annotate(f"{score:.3f}", (x1 + 2, y1 - 6), color="white", fontsize=9,
                       bbox={"facecolor": "black", "alpha": 0.7, "pad": 1.5, "linewidth": 0})
    whole.scatter(*faces.landmarks[0].T, s=22, color=COLOURS[5], edgecolor="black", linewidth=0.6)
    whole.set_title("found: box, score, five landmarks", fontsize=10)
    aligned.imshow(face)
    aligned.scatter(*TEMPLATE.T, s=60, marker="+", color=COLOURS[4], linewidth=1.8)
    aligned.set_title("aligned to 96 x 112; template", fontsize=10)
    for axes in (whole, aligned):
        axes.set_axis_off()
    _save(figure, "detection.png")


def _curves(axes, t, title, curves):
    for (name, values), colour, style in zip(curves.items(), COLOURS, STYLES):
        axes.plot(np.degrees(t), values, style, color=colour, label=name, linewidth=2)
    axes.set(title=title, xlabel=r"angle $\theta$ to the own class centre, degrees", xticks=range(0, 181, 45))
    axes.title.set_fontsize(10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9)


def _figure(size, columns, **grid):
    figure = Figure(size, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, gridspec_kw=grid)


def _save(figure, name):
    figure.savefig(HERE / name, dpi=150, metadata={"Software": None})  # the version would change the file


if __name__ == "__main__":
    margins()
    detection()
