"""A contact sheet of the hardest pairs of an evaluation, as the network sees them.

It shows at a glance whether an error is due to a wrong label (obviously two people), a wrong alignment (a crop that is
tilted or not a face), or the network.
"""
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from faces.align import HEIGHT
from faces.figures import COLORS, DPI
from faces.files import atomic_write

COLUMNS, GAP = 5, 6         # pairs per row; pixels between the two faces of a pair
CELL = (2.15, 1.75)         # width and height of a pair with its text, in inches
TITLE = 0.45                # height of a heading, in inches


def error_sheet(path, faces, pairs, similarities, correct, count=10):
    """Draw the genuine pairs with the lowest and the impostor pairs with the highest similarity, worst first.

    Args:
        path: the picture, .png.
        faces: uint8 (N, HEIGHT, WIDTH, 3), RGB, aligned.
        pairs: faces.verification.pairs.Pairs, of P pairs.
        similarities: float (P,).
        correct: bool (P,), which pairs were classified correctly.
        count: maximum number of pairs of each kind.
    """
    kinds = [hardest(similarities, pairs.same, genuine, count) for genuine in (True, False)]
    rows = [-(-len(rows) // COLUMNS) for rows in kinds]
    figure = Figure((COLUMNS * CELL[0], 2 * TITLE + sum(rows) * CELL[1]), facecolor="white")
    FigureCanvasAgg(figure)
    top = figure.get_figheight()
    for chosen, genuine in zip(kinds, (True, False)):
        wrong, total = int((~correct & (pairs.same == genuine)).sum()), int((pairs.same == genuine).sum())
        title = (f"Hardest genuine pairs: lowest similarity ({wrong:,} of {total:,} rejected)" if genuine else
                 f"Hardest impostor pairs: highest similarity ({wrong:,} of {total:,} accepted)")
        figure.text(0.012, (top - 0.28) / figure.get_figheight(), title, fontsize=13, weight="bold")
        top -= TITLE
        for place, row in enumerate(chosen):
            x, y = place % COLUMNS, place // COLUMNS
            _pair(figure, x * CELL[0], top - (y + 1) * CELL[1], faces, pairs, row, similarities[row], correct[row])
        top -= -(-len(chosen) // COLUMNS) * CELL[1]
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=DPI)


def hardest(similarities, same, genuine, count=10):
    """Return the rows of the hardest pairs of one kind, worst first, int (at most count,)."""
    rows = np.flatnonzero(same == genuine)
    order = np.argsort(similarities[rows] if genuine else -similarities[rows], kind="stable")
    return rows[order[:count]]


def _pair(figure, left, bottom, faces, pairs, row, similarity, right):
    """Draw one pair: its similarity and decision, both faces and both names; left and bottom are in inches."""
    width, height = figure.get_size_inches()
    a, b = pairs.pairs[row]
    axes = figure.add_axes(((left + 0.1) / width, (bottom + 0.38) / height, (CELL[0] - 0.2) / width, 1.1 / height))
    gap = np.full((HEIGHT, GAP, 3), 255, np.uint8)
    axes.imshow(np.concatenate((faces[a], gap, faces[b]), 1), interpolation="lanczos", aspect="equal")
    axes.set_axis_off()
    decision = "accepted" if right == pairs.same[row] else "rejected"
    axes.set_title(f"{similarity:.3f}  {decision}", fontsize=10, pad=3, weight="normal" if right else "bold",
                   color=COLORS[0] if right else COLORS[1])
    for image, drop in ((a, 0), (b, 0.14)):
        figure.text((left + CELL[0] / 2) / width, (bottom + 0.24 - drop) / height, _short(pairs.paths[image]),
                    fontsize=7.5, ha="center", parse_math=False)


def _short(path, length=34):
    name = path.rpartition("/")[2]
    stem = name if "#" in name else name.rpartition(".")[0]
    return stem if len(stem) <= length else f"{stem[:length - 13]}…{stem[-12:]}"
