"""Draw the pictures for the README and docs into this folder. Requires requirements-dev.txt.

    python images/draw.py

The photo is in the public domain (Eileen Collins, NASA, from scikit-image). After `lfw_eval.py --output DIR`, each file
in scores/ was written with `cut -f 3,5 DIR/scores.tsv > images/scores/METHOD.tsv`, and tsne.json with
`tools/tsne.py --points images/tsne.json`.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import torch
from skimage import data

from faces import plots
from faces.align import TEMPLATE, align
from faces.files import command, path, read_json, script_parser
from faces.plots import COLORS
from faces.verification.metrics import auc, best_threshold, roc
from mtcnn.detector import Detector
from sphereFace.net import psi
from tools.compare import read_scores

HERE = Path(__file__).resolve().parent


def margins(folder=HERE):
    """Draw the target logit as a function of the angle: psi, annealed psi, and cos(theta) - m."""
    theta = np.linspace(0, np.pi, 721)
    cosine = torch.tensor(np.cos(theta))
    annealed = {lam: ((lam * cosine + psi(cosine, 4)) / (1 + lam)).numpy() for lam in (1000, 20, 5, 0)}
    figure, (left, middle, right) = plots.new_figure((10, 3.7), 3)
    _curves(left, theta, r"SphereFace: $\psi(\theta)$", {f"m = {m}": psi(cosine, m).numpy() for m in (1, 2, 3, 4)})
    _curves(middle, theta, r"SphereFace during training, m = 4: $\psi_\lambda(\theta)$",
            {rf"$\lambda$ = {lam}": logit for lam, logit in annealed.items()})
    _curves(right, theta, r"CosFace: $\cos\,\theta-m$ (finer scale)",
            {f"m = {m}": np.cos(theta) - m for m in (0, 0.2, 0.35, 0.5)})
    right.plot(np.degrees(theta), annealed[5], color="black", linewidth=1, label=r"$\psi_\lambda$, $\lambda$ = 5")
    right.legend(frameon=False, fontsize=9)
    left.set_ylabel(r"target logit / $\Vert x\Vert$ or $s$")
    plots.save(figure, folder / "margins.png")


def overview(folder=HERE):
    """Draw what happens to a photo: MTCNN's landmarks, the aligned face, embeddings of ten people, similarities."""
    photo = data.astronaut()[:300, 60:400]
    faces = Detector(device="cpu").detect(photo)
    figure, (whole, aligned, embedded, compared) = plots.new_figure((12, 3.1), 4, width_ratios=(1.32, 1, 1.3, 1.5))
    outline = {"path_effects": [plots.withStroke(linewidth=3.5, foreground="black")]}    # orange is hard to see on skin
    whole.imshow(photo)
    for (x1, y1, x2, y2), score in zip(faces.boxes, faces.scores):
        whole.plot((x1, x2, x2, x1, x1), (y1, y1, y2, y2, y1), color=COLORS[4], linewidth=2, **outline)
        whole.annotate(f"{score:.3f}", (x1 + 2, y1 - 6), color="white", fontsize=8,
                       bbox={"facecolor": "black", "alpha": 0.7, "pad": 1.5, "linewidth": 0})
    whole.scatter(*faces.landmarks[0].T, s=16, color=COLORS[5], edgecolor="black", linewidth=0.6)
    aligned.imshow(align(photo, faces.landmarks[0]))
    aligned.scatter(*TEMPLATE.T, s=60, marker="+", color=COLORS[4], linewidth=1.8, **outline)
    drawn = read_json(HERE / "tsne.json")
    (_, points), labels = drawn["panels"][-1], np.array(drawn["labels"])    # of CosFace
    for i in range(len(drawn["names"])):
        own = np.array(points)[labels == i]
        embedded.scatter(*own.T, s=14, color=COLORS[i % 7], marker=plots.MARKERS[i], linewidths=0)
    embedded.set(xticks=[], yticks=[])
    similarity, same, _ = read_scores(HERE / "scores/cosFace.tsv")
    plots.draw_histogram(compared, similarity, same, best_threshold(similarity, same))
    compared.set_ylim(0, 1.25 * compared.get_ylim()[1])    # the legend is large in a small panel
    for axes, title in ((whole, "1. detect: box and landmarks"), (aligned, "2. align to the template"),
                        (embedded, "3. embed: ten people of LFW (t-SNE)"), (compared, "4. compare: pairs of LFW")):
        axes.set_title(title, fontsize=10)
    for axes in (whole, aligned):
        axes.set_axis_off()
    plots.save(figure, folder / "overview.png")


def verification(folder=HERE):
    """Draw the ROC curves and the similarity histograms of all models in scores/."""
    scores = {file.stem[0].upper() + file.stem[1:]: read_scores(file) for file in sorted(HERE.glob("scores/*.tsv"))}
    curves = {name: roc(similarity, same) for name, (similarity, same, _) in scores.items()}
    rows = 1 + len(scores) // 2
    figure, grid = plots.new_figure((8.6, 3.5 * rows), 2, rows)
    roc_axes, *histogram_axes = np.ravel(grid)
    plots.draw_roc(roc_axes, {f"{name}, AUC {auc(*curve):.3f}": curve for name, curve in curves.items()})
    roc_axes.set_title("LFW, view 2", fontsize=10)
    for axes, (name, (similarity, same, _)) in zip(histogram_axes, scores.items()):
        plots.draw_histogram(axes, similarity, same, best_threshold(similarity, same))
        axes.set_title(name, fontsize=10)
    for axes in histogram_axes[len(scores):]:
        axes.set_axis_off()
    plots.save(figure, folder / "verification.png")


def tsne(folder=HERE):
    """Draw t-SNE plots of ten people in LFW, for models trained on the same images with and without a margin."""
    drawn = read_json(HERE / "tsne.json")
    panels = [(title[0].upper() + title[1:], np.array(points)) for title, points in drawn["panels"]]
    plots.tsne_panels(folder / "tsne.png", panels, np.array(drawn["labels"]), drawn["names"])


def _curves(axes, theta, title, curves):
    for (name, values), color, style in zip(curves.items(), COLORS, ("-", "--", "-.", ":")):
        axes.plot(np.degrees(theta), values, style, color=color, label=name, linewidth=2)
    axes.set(title=title, xlabel=r"angle $\theta$ to the target center (degrees)", xticks=range(0, 181, 45))
    axes.title.set_fontsize(10)
    axes.legend(frameon=False, fontsize=9)


@command
def main(argv=None):
    parser = script_parser(__doc__)
    parser.add_argument("--output", type=path, default=HERE, metavar="DIR", help="folder for the pictures")
    args = parser.parse_args(argv)
    for draw in (margins, overview, verification, tsne):
        draw(args.output)


if __name__ == "__main__":
    main()
