"""Report the results of lfw_eval.py: the summary line, a table per model, and the files in --output."""
import re
import warnings
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np

from faces import plots  # before matplotlib: see MPLBACKEND there
from faces.files import atomic_write, count_of, write_json
from faces.verification.bootstrap import interval
from faces.verification.lfw import Lfw
from faces.verification.metrics import Verification

MAX_CMC_RANK = 100     # last rank in results.json and cmc.png
PAIRS_PER_ROW = 5      # of errors.png
# Fonts for names in scripts that matplotlib's own font lacks: of Linux, Windows and macOS.
FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "WenQuanYi Micro Hei", "Microsoft YaHei", "PingFang SC", "Arial Unicode MS")


class Measured(NamedTuple):
    """A model and its measurements on a set."""
    figures: dict          # what results.json holds
    result: Verification
    draws: np.ndarray      # float64 (R,), bootstrap accuracies


def table(figures: dict) -> str:
    """Return the figures of one model, see Measured, as a table in text.

    If "folds" is among the protocols, the summary line comes first: mean accuracy, its standard deviation over the
    folds (ddof=0), and mean threshold.
    """
    settings, counts, found, lines = figures["settings"], figures["counts"], figures["identification"], []
    rows = [("model", f"{settings['model']} ({figures['method']}, {settings['net']})")]
    if "folds" in settings["protocol"]:
        lines = ["LFWACC={accuracy:.4f} std={std:.4f} thd={threshold:.4f}".format(**figures)]
        folds = len(figures["folds"])
        rows += [("accuracy", f"{figures['accuracy']:.4f}"),
                 ("standard deviation", f"{figures['std']:.4f} over {folds} folds (ddof=0)" if folds > 1
                  else "n/a (one test set)"),
                 ("95 % interval", "{:.4f} to {:.4f}".format(*figures["interval_95"])
                  + f" ({count_of(settings['resamples'], 'bootstrap draw~')} of identities)"),
                 ("AUC", f"{figures['auc']:.4f}"), ("EER", f"{figures['eer']:.4f}")]
    for point in figures["tar"]:
        few = f"; too few to resolve this rate, which needs {np.ceil(1 / point['far'] - 1e-9):,.0f}"
        rows.append((f"TAR@FAR={np.format_float_scientific(point['far'], trim='-', exp_digits=1)}",
                     f"{point['tar']:.4f} at threshold {point['threshold']:.4f}, {point['accepted']} of "
                     f"{count_of(point['impostors'], 'impostor pair~')}{'' if point['resolved'] else few}"))
    if found:
        rows += [(f"rank {rank}", f"{found['cmc'][rank - 1]:.4f}") for rank in (1, 5, 10) if rank <= found["gallery"]]
        rows.append(("gallery", f"{found['gallery']:,} people, one image each; {count_of(found['probes'], 'probe~')}"))
    pairs, genuine = counts["pairs"], counts["genuine"]
    rows += [("pairs", f"{pairs:,} ({genuine:,} genuine, {pairs - genuine:,} impostor)"),
             ("images", f"{counts['images']:,}, flipped image: {settings['flip']}"),
             ("landmarks", settings["landmarks"]), ("seconds", f"{figures['seconds']:.1f}")]
    return "\n".join([*lines, *(f"{name:<20}{value}" for name, value in rows)])


def compare(models: list[Measured]) -> list[dict]:
    """Return the difference in accuracy between each further model and the first, with its paired 95 % interval."""
    first = models[0]
    return [{"model": other.figures["settings"]["model"], "against": first.figures["settings"]["model"],
             "difference": other.result.accuracy - first.result.accuracy,
             "interval_95": interval(other.draws - first.draws)} for other in models[1:]]


def comparison_line(row: dict) -> str:
    """Return a dict of compare() as text."""
    low, high = row["interval_95"]
    return (f"{row['model']} minus {row['against']}: accuracy {row['difference']:+.4f}, 95 % interval {low:+.4f} to "
            f"{high:+.4f} (paired, over identities), which {'contains' if low <= 0 <= high else 'excludes'} 0")


def write(folder: Path, models: list[Measured], lfw: Lfw):
    """Write results.json, scores.tsv and the pictures into a folder.

    Several models get a subfolder each, named by its title, and the folder gets a results.json with all models and
    their comparison, and pictures with the curves of all models.
    """
    pairs, names = lfw.pairs.judged(), folder_names([model.figures["title"] for model in models])
    for name, model in zip(names if len(models) > 1 else [""], models):
        inner, result = folder / name, model.result
        write_json(inner / "results.json", model.figures)
        with atomic_write(inner / "scores.tsv", "w") as file:
            file.write("left\tright\tsame\tfold\tsimilarity\n")
            for (a, b), same, fold, similarity in zip(pairs.pairs, pairs.same, pairs.folds, result.similarities):
                file.write(f"{pairs.paths[a]}\t{pairs.paths[b]}\t{int(same)}\t{fold}\t{similarity:.6f}\n")
        _draw_curves(inner, [model])
        plots.histogram_picture(inner / "histogram.png", result.similarities, pairs.same, result.threshold)
        error_sheet(inner / "errors.png", lfw.faces, pairs, result.similarities, result.correct)
    if len(models) > 1:
        write_json(folder / "results.json", {"models": [m.figures for m in models], "comparison": compare(models)})
        _draw_curves(folder, models)


def folder_names(titles: list[str]) -> list[str]:
    """Return a file name for each of several models' titles; equal ones get a number."""
    names = []
    for i, title in enumerate(titles, 1):
        name = re.sub(r"[^\w.-]+", "-", title).strip("-.") or f"model-{i}"
        names.append(f"{name}-{i}" if name.lower() in map(str.lower, names) else name)
    return names


def _draw_curves(folder, models):
    titles = [model.figures["title"] for model in models]
    names = [title if titles.count(title) == 1 else f"{i}: {title}" for i, title in enumerate(titles, 1)]
    plots.roc_picture(folder / "roc.png", {f"{name}, AUC {m.result.auc:.4f}": (m.result.far, m.result.tar)
                                           for name, m in zip(names, models)})
    if models[0].figures["identification"]:
        curves = [model.figures["identification"]["cmc"] for model in models]
        plots.cmc_picture(folder / "cmc.png", MAX_CMC_RANK, {f"{name}, rank 1 {cmc[0]:.4f}": cmc
                                                             for name, cmc in zip(names, curves)})


def error_sheet(file, faces: np.ndarray, pairs, similarities: np.ndarray, correct: np.ndarray, count: int = 10):
    """Draw the hardest pairs as the network sees them: a wrong label, a wrong alignment or the network's error?

    Up to `count` Pairs of each kind are drawn, with their aligned faces, uint8 (N, HEIGHT, WIDTH, 3), RGB, and their
    similarities, float (P,). `correct`, bool (P,), says which pairs were classified correctly.
    """
    shown = [hardest(similarities, pairs.same, genuine, count) for genuine in (True, False)]
    rows = [-(-len(indices) // PAIRS_PER_ROW) for indices in shown]    # rounded up
    figure = plots.Figure((PAIRS_PER_ROW * 2.15, 0.5 + 1.9 * sum(rows)), layout="constrained")
    fonts = [font for font in FONTS if font in plots.matplotlib.font_manager.get_font_names()]
    gap = np.full((faces.shape[1], 6, 3), 255, np.uint8)
    for genuine, indices, height, part in zip((True, False), shown, rows, figure.subfigures(2, height_ratios=rows)):
        wrong, total = int((~correct & (pairs.same == genuine)).sum()), int((pairs.same == genuine).sum())
        title = "genuine pairs: lowest similarity" if genuine else "impostor pairs: highest similarity"
        title = f"Hardest {title} ({wrong:,} of {total:,} {'rejected' if genuine else 'accepted'})"
        part.suptitle(title, x=0.01, ha="left", fontsize=13, weight="bold")
        for i, panel in zip_longest(indices, part.subplots(height, PAIRS_PER_ROW, squeeze=False).flat):
            panel.set_axis_off()
            if i is None:
                continue
            left, right = pairs.pairs[i]
            panel.imshow(np.concatenate((faces[left], gap, faces[right]), 1))
            decision = "accepted" if correct[i] == pairs.same[i] else "rejected"
            panel.set_title(f"{similarities[i]:.3f}  {decision}", pad=3, fontsize=10,
                            color=plots.COLORS[int(not correct[i])], weight="normal" if correct[i] else "bold")
            names = "\n".join(plots.plain(_caption(pairs.paths[image])) for image in (left, right))
            panel.text(0.5, -0.04, names, fontsize=7.5, ha="center", va="top", transform=panel.transAxes, family=fonts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")    # about characters that no font has
        plots.save(figure, file)


def hardest(similarities: np.ndarray, same: np.ndarray, genuine: bool, count: int = 10) -> np.ndarray:
    """Return the indices of the hardest pairs of one kind, at most `count`, int: genuine pairs with the lowest, or
    impostor pairs with the highest of the similarities, float (P,), first."""
    indices = np.flatnonzero(same == genuine)
    order = np.argsort(similarities[indices] if genuine else -similarities[indices], kind="stable")
    return indices[order[:count]]


def _caption(name, length=34):
    """Return the file name without its extension, or a name such as `lfw.bin#12`; a long one is cut in the middle."""
    name = name.rpartition("/")[2]
    stem = name if "#" in name else name.rpartition(".")[0]
    return stem if len(stem) <= length else f"{stem[:length - 13]}…{stem[-12:]}"
