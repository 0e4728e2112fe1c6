"""Report the results of lfw_eval.py: the summary line, a table per model, and the files in --output."""
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from faces import plots  # before matplotlib: see MPLBACKEND there
from faces.files import atomic_write, count_of, write_json
from faces.verification.bootstrap import interval
from faces.verification.lfw import Lfw
from faces.verification.metrics import Identification, Verification, operating_point

font_manager = plots.matplotlib.font_manager

FAR = 1e-3             # allows three false accepts among the 3,000 impostor pairs of LFW
MAX_CMC_RANK = 100     # last rank in results.json and cmc.png
PAIRS_PER_ROW = 5      # of errors.png
# Fonts for names in scripts that matplotlib's own font lacks; those that are installed are used.
FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "WenQuanYi Micro Hei",
         "Microsoft YaHei", "PingFang SC", "Hiragino Sans", "Malgun Gothic", "Arial Unicode MS", "Nirmala UI")


class Measured(NamedTuple):
    """A model and its measurements on a set."""
    title: str                 # short name for pictures and folders
    model: str                 # path of the file
    net: str
    method: str
    loaded: dict               # description of the file that faces.verification.weights.load_net() returned
    result: Verification
    draws: np.ndarray          # float64 (R,), bootstrap accuracies
    operating_points: list     # an OperatingPoint per --far; empty if that protocol was not requested
    identification: Identification | None
    seconds: float


def table(measured: Measured, lfw: Lfw, protocols: list[str], flip: str) -> str:
    """Return the table of one model as text.

    If "folds" is among the protocols, the summary line comes first: mean accuracy, its standard deviation over the
    folds (ddof=0), and mean threshold.
    """
    pairs, result, found = lfw.pairs.judged(), measured.result, measured.identification
    rows = [("model", f"{measured.model} ({measured.method}, {measured.net})")]
    points = measured.operating_points
    if "folds" in protocols:
        (low, high), folds = interval(measured.draws), len(result.accuracies)
        std = f"{result.std:.4f} over {folds} folds (ddof=0)" if folds > 1 else "n/a (one test set)"
        rows += [("accuracy", f"{result.accuracy:.4f}"), ("standard deviation", std),
                 ("95 % interval", f"{low:.4f} to {high:.4f} ({count_of(len(measured.draws), 'bootstrap draw~')} "
                                   "of identities)"),
                 ("AUC", f"{result.auc:.4f}"), ("EER", f"{result.eer:.4f}")]
        points = points or [operating_point(result.similarities, pairs.same, FAR)]
    for point in points:
        few = f"; too few to resolve this rate, which needs {np.ceil(1 / point.far - 1e-9):,.0f}"
        rows.append((f"TAR@FAR={np.format_float_scientific(point.far, trim='-', exp_digits=1)}",
                     f"{point.tar:.4f} at threshold {point.threshold:.4f}, {point.accepted} of "
                     f"{count_of(point.impostors, 'impostor pair~')}{'' if point.resolved else few}"))
    if found:
        rows += [(f"rank {rank}", f"{found.cmc[rank - 1]:.4f}") for rank in (1, 5, 10) if rank <= found.gallery]
        rows.append(("gallery", f"{found.gallery:,} people, one image each; {count_of(found.probes, 'probe~')}"))
    genuine = int(pairs.same.sum())
    rows += [("pairs", f"{len(pairs.same):,} ({genuine:,} genuine, {len(pairs.same) - genuine:,} impostor)"),
             ("images", f"{len(lfw.faces):,}, flipped image: {flip}"), ("landmarks", lfw.landmarks),
             ("seconds", f"{measured.seconds:.1f}")]
    lines = [f"{name:<20}{value}" for name, value in rows]
    if "folds" in protocols:
        lines.insert(0, f"LFWACC={result.accuracy:.4f} std={result.std:.4f} thd={result.threshold:.4f}")
    return "\n".join(lines)


def compare(models: list[Measured]) -> list[dict]:
    """Return the difference in accuracy between each further model and the first, with its paired 95 % interval: dicts
    with the keys "model", "against", "difference" and "interval_95"."""
    first = models[0]
    return [{"model": other.model, "against": first.model, "difference": other.result.accuracy - first.result.accuracy,
             "interval_95": interval(other.draws - first.draws)} for other in models[1:]]


def comparison_lines(comparisons: list[dict]) -> str:
    """Return the result of compare() as text, one line per further model."""
    return "\n".join(
        f"{row['model']} minus {row['against']}: accuracy {row['difference']:+.4f}, 95 % interval "
        f"{row['interval_95'][0]:+.4f} to {row['interval_95'][1]:+.4f} (paired, over identities), which "
        f"{'contains 0' if row['interval_95'][0] <= 0 <= row['interval_95'][1] else 'excludes 0'}"
        for row in comparisons)


def write(folder: Path, models: list[Measured], lfw: Lfw, settings: dict):
    """Write results.json, scores.tsv and the pictures into a folder.

    Several models get a subfolder each, named by its title, and the folder gets a results.json with all models and
    their comparison, and pictures with the curves of all models.
    """
    pairs, results = lfw.pairs.judged(), []
    for name, measured in zip(folder_names(models) if len(models) > 1 else [""], models):
        inner, result = folder / name, measured.result
        results.append(_results(measured, lfw, {**settings, "model": measured.model, "net": measured.net}))
        write_json(inner / "results.json", results[-1])
        with atomic_write(inner / "scores.tsv", "w") as file:
            file.write("left\tright\tsame\tfold\tsimilarity\n")
            for (a, b), same, fold, similarity in zip(pairs.pairs, pairs.same, pairs.folds, result.similarities):
                file.write(f"{pairs.paths[a]}\t{pairs.paths[b]}\t{int(same)}\t{fold}\t{similarity:.6f}\n")
        _draw_curves(inner, [measured])
        plots.histogram_picture(inner / "histogram.png", result.similarities, pairs.same, result.threshold)
        error_sheet(inner / "errors.png", lfw.faces, pairs, result.similarities, result.correct)
    if len(models) > 1:
        write_json(folder / "results.json", {"models": results, "comparison": compare(models)})
        _draw_curves(folder, models)


def folder_names(models: list[Measured]) -> list[str]:
    """Return a file name for each of several models, made from its title; equal ones get a number."""
    names = []
    for i, model in enumerate(models, 1):
        name = re.sub(r"[^\w.-]+", "-", model.title).strip("-.") or f"model-{i}"
        names.append(f"{name}-{i}" if name.lower() in map(str.lower, names) else name)
    return names


def error_sheet(file, faces: np.ndarray, pairs, similarities: np.ndarray, correct: np.ndarray, count: int = 10):
    """Draw the hardest pairs as the network sees them: a wrong label, a wrong alignment or the network's error?

    Args:
        file: PNG file to write.
        faces: uint8 (N, HEIGHT, WIDTH, 3), RGB, aligned.
        pairs: faces.verification.pairs.Pairs, of P pairs.
        similarities: float (P,).
        correct: bool (P,), which pairs were classified correctly.
        count: maximum number of pairs of each kind, the hardest first.
    """
    shown = [hardest(similarities, pairs.same, genuine, count) for genuine in (True, False)]
    rows = [-(-len(indices) // PAIRS_PER_ROW) for indices in shown]    # rounded up
    figure, grid = plots.new_figure((PAIRS_PER_ROW * 2.15, 0.5 + 1.9 * sum(rows)), PAIRS_PER_ROW, sum(rows))
    installed = {entry.name for entry in font_manager.fontManager.ttflist}
    fonts = [font for font in FONTS if font in installed]
    gap = np.full((faces.shape[1], 6, 3), 255, np.uint8)
    for panel in grid.flat:
        panel.set_axis_off()
    for genuine, indices, panels in zip((True, False), shown, np.split(grid.reshape(-1, PAIRS_PER_ROW), rows[:1])):
        wrong, total = int((~correct & (pairs.same == genuine)).sum()), int((pairs.same == genuine).sum())
        title = "genuine pairs: lowest similarity" if genuine else "impostor pairs: highest similarity"
        title = f"Hardest {title} ({wrong:,} of {total:,} {'rejected' if genuine else 'accepted'})"
        panels[0, 0].text(0, 1.27, title, fontsize=13, weight="bold", transform=panels[0, 0].transAxes, in_layout=False)
        for i, panel in zip(indices, panels.flat):
            left, right = pairs.pairs[i]
            panel.imshow(np.concatenate((faces[left], gap, faces[right]), 1))
            decision = "accepted" if correct[i] == pairs.same[i] else "rejected"
            room = "\n\n" if panel in panels[0] else ""    # for the title
            panel.set_title(f"{room}{similarities[i]:.3f}  {decision}", pad=3, fontsize=10,
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


def _results(measured, lfw, settings):
    result, pairs, found = measured.result, lfw.pairs.judged(), measured.identification
    return {
        "title": measured.title, "method": measured.method,
        "accuracy": result.accuracy, "std": result.std, "threshold": result.threshold, "auc": result.auc,
        "eer": result.eer, "tar_at_far_1e-3": operating_point(result.similarities, pairs.same, FAR).tar, "std_ddof": 0,
        "interval_95": interval(measured.draws),
        "folds": [{"accuracy": float(a), "threshold": float(t)} for a, t in zip(result.accuracies, result.thresholds)],
        "tar": [{**point._asdict(), "resolved": point.resolved} for point in measured.operating_points],
        "identification": found and {**found._asdict(), "rank_1": float(found.cmc[0]),
                                     "cmc": found.cmc[:MAX_CMC_RANK].round(6).tolist()},
        "counts": {"pairs": len(pairs.same), "genuine": int(pairs.same.sum()), "images": len(pairs.paths)},
        "settings": {**settings, "weights": measured.loaded, "landmarks": lfw.landmarks},
        "seconds": round(measured.seconds, 2), "torch": str(torch.__version__)}


def _draw_curves(folder, models):
    titles = [m.title for m in models]
    names = [title if titles.count(title) == 1 else f"{i}: {title}" for i, title in enumerate(titles, 1)]
    plots.roc_picture(folder / "roc.png", {f"{name}, AUC {m.result.auc:.4f}": (m.result.far, m.result.tar)
                                           for name, m in zip(names, models)})
    if models[0].identification:
        plots.cmc_picture(folder / "cmc.png", MAX_CMC_RANK, {
            f"{name}, rank 1 {m.identification.cmc[0]:.4f}": m.identification.cmc for name, m in zip(names, models)})
