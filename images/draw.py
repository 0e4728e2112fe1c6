"""Draw the pictures of the README and docs into this folder; needs requirements-dev.txt.

    python images/draw.py

The pictures are made with the project's own code from a public-domain photo in scikit-image (Eileen Collins, NASA) and
from the results of trained models. The files in scores/ contain the similarities of LFW's pairs, from

    cut -f 3,5 DIR/scores.tsv > images/scores/METHOD.tsv

where DIR is the output of `lfw_eval.py --output DIR`; tsne.tsv was written by `tools/tsne.py --points images/tsne.tsv`.
The pictures are deterministic, and tests/test_pictures.py compares them with the committed ones.
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
from faces.figures import COLORS, draw_histogram, draw_roc, new_figure, save, tsne_panels
from faces.verification.metrics import auc, best_threshold, roc
from mtcnn.detector import Detector
from sphereFace.net import psi
from tools.compare import read_scores
from tools.tsne import read_points

HERE = Path(__file__).resolve().parent
STYLES = ("-", "--", "-.", ":")
# Equation 7 of the SphereFace paper with the annealing of its release (t is the step), and equation 4 of the CosFace
# paper, for a face x of class y; the loss of a batch is the mean.
SPHEREFACE = (
    r"$L=-\log\;\dfrac{e^{\Vert x\Vert\,\psi(\theta_y)}}"
    r"{e^{\Vert x\Vert\,\psi(\theta_y)}+\sum_{j\neq y}e^{\Vert x\Vert\,\cos\,\theta_j}}$",
    r"$\psi(\theta)=(-1)^k\,\cos\,m\theta-2k\quad\mathrm{for}\;\;\theta\in[\,k\pi/m,\;(k+1)\,\pi/m\,],"
    r"\;\;k=0,\,\ldots,\,m-1$",
    r"$\psi_\lambda(\theta)=\dfrac{\lambda\,\cos\,\theta+\psi(\theta)}{1+\lambda},\quad"
    r"\lambda=\max\left(5,\;\dfrac{1000}{1+0.12\,t}\right)$")
COSFACE = (
    r"$L=-\log\;\dfrac{e^{s\,(\cos\,\theta_y-m)}}{e^{s\,(\cos\,\theta_y-m)}+\sum_{j\neq y}e^{s\,\cos\,\theta_j}}$",
    r"$s=64,\quad m=0.35$",
    r"$\mathrm{both:}\;\;\cos\,\theta_j=\dfrac{W_j\cdot x}{\Vert W_j\Vert\,\Vert x\Vert}$")


def margins(folder=HERE):
    """Draw both losses, and the target logit as a function of the angle: psi, psi with lambda, and cos t - m."""
    t = np.linspace(0, np.pi, 721)
    cosine = torch.tensor(np.cos(t))
    blends = {lam: ((lam * cosine + psi(cosine, 4)) / (1 + lam)).numpy() for lam in (1000, 20, 5, 0)}
    figure, (left, middle, right) = _figure((10, 6.1), 3)
    figure.get_layout_engine().set(rect=(0, 0, 1, 0.6))                # the formulas are above the curves
    _curves(left, t, r"SphereFace: $\psi(\theta)$", {f"m = {m}": psi(cosine, m).numpy() for m in (1, 2, 3, 4)})
    _curves(middle, t, r"SphereFace during training, m = 4: $\psi_\lambda(\theta)$",
            {rf"$\lambda$ = {lam}": blend for lam, blend in blends.items()})
    _curves(right, t, r"CosFace: $\cos\,\theta-m$", {f"m = {m}": np.cos(t) - m for m in (0, 0.2, 0.35, 0.5)})
    right.plot(np.degrees(t), blends[5], color="black", linewidth=1, label=r"$\psi_\lambda$, $\lambda$ = 5")
    right.legend(frameon=False, fontsize=9)
    left.set_ylabel(r"target logit / $\Vert x\Vert$ or $s$")
    _formulas(figure, 0.01, "SphereFace (A-Softmax)", SPHEREFACE)
    _formulas(figure, 0.66, "CosFace", COSFACE)
    _save(figure, folder / "margins.png")


def detection(folder=HERE):
    """Draw a photo with the result of MTCNN, and the aligned face with the points of the template."""
    photo = data.astronaut()[:300, 60:400]
    faces = Detector(device="cpu").detect(photo)
    face = align(photo, faces.landmarks[0])
    figure, (whole, aligned) = _figure((7, 3.4), 2, width_ratios=(1.9, 1))
    whole.imshow(photo)
    for (x1, y1, x2, y2), score in zip(faces.boxes, faces.scores):
        whole.plot((x1, x2, x2, x1, x1), (y1, y1, y2, y2, y1), color=COLORS[4], linewidth=2)
        whole.annotate(f"{score:.3f}", (x1 + 2, y1 - 6), color="white", fontsize=9,
                       bbox={"facecolor": "black", "alpha": 0.7, "pad": 1.5, "linewidth": 0})
    whole.scatter(*faces.landmarks[0].T, s=22, color=COLORS[5], edgecolor="black", linewidth=0.6)
    whole.set_title("MTCNN: box, score and landmarks", fontsize=10)
    aligned.imshow(face)
    aligned.scatter(*TEMPLATE.T, s=60, marker="+", color=COLORS[4], linewidth=1.8)
    aligned.set_title("aligned face and template", fontsize=10)
    for axes in (whole, aligned):
        axes.set_axis_off()
    _save(figure, folder / "detection.png")


def verification(folder=HERE):
    """Draw the ROC curves and the histograms of similarity of all models in scores/."""
    scores = {file.stem[0].upper() + file.stem[1:]: read_scores(file) for file in sorted(HERE.glob("scores/*.tsv"))}
    curves = {name: roc(one.similarity, one.same) for name, one in scores.items()}
    rows = 1 + len(scores) // 2
    figure, axes = new_figure((8.6, 3.5 * rows), 2, rows)
    first, *others = np.ravel(axes)
    draw_roc(first, {f"{name}, AUC {auc(*curve):.3f}": curve for name, curve in curves.items()})
    first.set_title("LFW, view 2", fontsize=10)
    for axes, (name, one) in zip(others, scores.items()):
        draw_histogram(axes, one.similarity, one.same, best_threshold(one.similarity, one.same))
        axes.set_title(name, fontsize=10)
    for axes in others[len(scores):]:
        axes.set_axis_off()
    save(figure, folder / "verification.png")


def tsne(folder=HERE):
    """Draw a t-SNE of ten people in LFW for models that were trained on the same images, with and without a margin."""
    tsne_panels(folder / "tsne.png", *read_points(HERE / "tsne.tsv"))


def _curves(axes, t, title, curves):
    for (name, values), color, style in zip(curves.items(), COLORS, STYLES):
        axes.plot(np.degrees(t), values, style, color=color, label=name, linewidth=2)
    axes.set(title=title, xlabel=r"angle $\theta$ to the target center (degrees)", xticks=range(0, 181, 45))
    axes.title.set_fontsize(10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9)


def _formulas(figure, x, title, lines):
    figure.text(x, 0.972, title, fontsize=12, fontweight="bold", va="center")
    for y, line, size in zip((0.87, 0.755, 0.665), lines, (16, 13, 13)):
        figure.text(x, y, line, fontsize=size, math_fontfamily="stix", va="center")


def _figure(size, columns, **grid):
    figure = Figure(size, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, gridspec_kw=grid)


def _save(figure, path):
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    margins()
    detection()
    verification()
    tsne()
