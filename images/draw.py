"""Draw the pictures of the README into this folder.

    python draw.py

They depend on the project's own code alone, and come out the same each time.
"""
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sphereFace.net import psi

HERE = Path(__file__).resolve().parent
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # of Okabe and Ito, told apart by colour-blind readers too
STYLES = ("-", "--", "-.", ":")


def margins(path):
    """The target's logit over its angle: SphereFace's psi for m = 1..4, its blends by lambda, CosFace's cos t - m."""
    t = np.linspace(0, np.pi, 721)
    cosine = torch.tensor(np.cos(t))
    figure = Figure(figsize=(10, 3.6), layout="constrained", facecolor="white")
    left, middle, right = figure.subplots(1, 3)
    _curves(left, t, r"SphereFace: $\psi(\theta)=(-1)^k\cos m\theta-2k$",
            {f"m = {m}": psi(cosine, m).numpy() for m in (1, 2, 3, 4)})
    _curves(middle, t, r"Annealed, m = 4: $(\lambda\cos\theta+\psi(\theta))/(1+\lambda)$",
            {rf"$\lambda$ = {lam}": ((lam * cosine + psi(cosine, 4)) / (1 + lam)).numpy() for lam in (1000, 20, 5, 0)})
    _curves(right, t, r"CosFace: $\cos\theta-m$", {f"m = {m}": np.cos(t) - m for m in (0, 0.2, 0.35, 0.5)})
    left.set_ylabel("target logit, over |x| or s")
    figure.savefig(path, dpi=150, metadata={"Software": None})


def _curves(axes, t, title, curves):
    for (name, values), colour, style in zip(curves.items(), COLOURS, STYLES):
        axes.plot(np.degrees(t), values, style, color=colour, label=name, linewidth=2)
    axes.set(title=title, xlabel=r"angle $\theta$ to the own class centre, degrees", xticks=range(0, 181, 45))
    axes.title.set_fontsize(10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9)


if __name__ == "__main__":
    margins(HERE / "margins.png")
