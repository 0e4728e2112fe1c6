"""A contact sheet of the hardest pairs in an evaluation, as the network sees them.

It shows at a glance whether an error is due to a wrong label (the two faces are obviously different people), to a wrong
alignment (the crop is tilted or shows no face), or to the network.
"""
import functools

import numpy as np
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from faces.align import HEIGHT
from faces.plots import COLORS, save

PAIRS_PER_ROW = 5
GAP = 6                                   # pixels between the two faces of a pair
CELL_WIDTH, CELL_HEIGHT = 2.15, 1.75      # size of a pair with its text, in inches
TITLE_HEIGHT = 0.45                       # in inches
# Fonts for names in scripts that matplotlib's own font lacks; those that are installed are used.
FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC",
         "WenQuanYi Micro Hei", "Droid Sans Fallback", "Microsoft YaHei", "Malgun Gothic", "Yu Gothic", "PingFang SC",
         "Hiragino Sans", "Apple SD Gothic Neo", "Arial Unicode MS", "Nirmala UI", "Noto Sans Thai")


def error_sheet(path, faces, pairs, similarities, correct, count=10):
    """Draw the genuine pairs with the lowest similarity and the impostor pairs with the highest, hardest first.

    Args:
        path: PNG file to write.
        faces: uint8 (N, HEIGHT, WIDTH, 3), RGB, aligned.
        pairs: faces.verification.pairs.Pairs, of P pairs.
        similarities: float (P,).
        correct: bool (P,), which pairs were classified correctly.
        count: maximum number of pairs of each kind.
    """
    kinds = [(genuine, hardest(similarities, pairs.same, genuine, count)) for genuine in (True, False)]
    heights = [-(-len(indices) // PAIRS_PER_ROW) * CELL_HEIGHT for _, indices in kinds]    # -(-a // b) rounds up
    height = 2 * TITLE_HEIGHT + sum(heights)
    figure = Figure((PAIRS_PER_ROW * CELL_WIDTH, height), facecolor="white")
    FigureCanvasAgg(figure)
    top = height
    for (genuine, indices), height_of_kind in zip(kinds, heights):
        wrong, total = int((~correct & (pairs.same == genuine)).sum()), int((pairs.same == genuine).sum())
        title = (f"Hardest genuine pairs: lowest similarity ({wrong:,} of {total:,} rejected)" if genuine else
                 f"Hardest impostor pairs: highest similarity ({wrong:,} of {total:,} accepted)")
        figure.text(0.012, (top - 0.28) / height, title, fontsize=13, weight="bold")
        top -= TITLE_HEIGHT
        for position, i in enumerate(indices):
            row, column = divmod(position, PAIRS_PER_ROW)
            _draw_pair(figure, column * CELL_WIDTH, top - (row + 1) * CELL_HEIGHT, faces, pairs, i, similarities[i],
                       correct[i])
        top -= height_of_kind
    save(figure, path)


def hardest(similarities, same, genuine, count=10):
    """Return the indices of the hardest pairs of one kind, hardest first: int, at most `count` of them.

    Args:
        similarities: float (P,).
        same: bool (P,), true for a genuine pair.
        genuine: whether to return genuine pairs, the lowest similarity first, or impostor pairs, the highest first.
        count: maximum number of pairs.
    """
    indices = np.flatnonzero(same == genuine)
    order = np.argsort(similarities[indices] if genuine else -similarities[indices], kind="stable")
    return indices[order[:count]]


def _draw_pair(figure, left, bottom, faces, pairs, i, similarity, correct):
    """Draw the faces of pair i, its similarity and decision above, and both names below; positions are in inches."""
    width, height = figure.get_size_inches()
    a, b = pairs.pairs[i]
    axes = figure.add_axes(((left + 0.1) / width, (bottom + 0.38) / height, (CELL_WIDTH - 0.2) / width, 1.1 / height))
    gap = np.full((HEIGHT, GAP, 3), 255, np.uint8)
    axes.imshow(np.concatenate((faces[a], gap, faces[b]), 1), interpolation="lanczos", aspect="equal")
    axes.set_axis_off()
    decision = "accepted" if correct == pairs.same[i] else "rejected"
    axes.set_title(f"{similarity:.3f}  {decision}", fontsize=10, pad=3, weight="normal" if correct else "bold",
                   color=COLORS[0] if correct else COLORS[1])
    for image, offset in ((a, 0), (b, 0.14)):
        figure.text((left + CELL_WIDTH / 2) / width, (bottom + 0.24 - offset) / height, _caption(pairs.paths[image]),
                    fontsize=7.5, ha="center", parse_math=False, family=list(_fonts()))


def _caption(path, length=34):
    """Return the file name without its extension, or a name such as `lfw.bin#12`; a long one is cut in the middle.

    A character that no font has becomes its code, such as \\u738b.
    """
    name = path.rpartition("/")[2]
    stem = name if "#" in name else name.rpartition(".")[0]
    stem = stem if len(stem) <= length else f"{stem[:length - 13]}…{stem[-12:]}"
    return "".join(character if any(ord(character) in font.get_charmap() for font in _fonts().values())
                   else character.encode("ascii", "backslashreplace").decode() for character in stem)


@functools.cache
def _fonts():
    """Return the fonts of FONTS that are installed, as a dict from name to font."""
    installed = {entry.name for entry in font_manager.fontManager.ttflist}
    return {name: font_manager.get_font(font_manager.findfont(name)) for name in FONTS if name in installed}
