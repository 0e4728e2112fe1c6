"""Report the results of lfw_eval.py: the summary line, a table per model, and the files in --output."""
import re
from typing import NamedTuple

import numpy as np
import torch

from faces import plots
from faces.files import atomic_write, write_json
from faces.text import count_of
from faces.verification.bootstrap import interval
from faces.verification.contact_sheet import error_sheet
from faces.verification.metrics import Identification, Verification, operating_point

FAR = 1e-3             # allows three false accepts among the 3,000 impostor pairs of LFW
TABLE_RANKS = (1, 5, 10)
MAX_CMC_RANK = 100     # last rank in results.json and cmc.png


class Measured(NamedTuple):
    """A model and its measurements.

    title: short name for pictures and folders.
    model, net, method: path of the model file, name of the network, and name of the method.
    loaded: description of the file that faces.verification.weights.load_weights() returned.
    result: faces.verification.metrics.Verification.
    draws: float64 (R,), bootstrap accuracies; see faces.verification.bootstrap.
    operating_points: list of faces.verification.metrics.OperatingPoint, one per --far; empty if that protocol was not
        requested.
    identification: faces.verification.metrics.Identification, or None if it was not requested.
    seconds: time that the evaluation took.
    """
    title: str
    model: str
    net: str
    method: str
    loaded: dict
    result: Verification
    draws: np.ndarray
    operating_points: list
    identification: Identification | None
    seconds: float


def summary_line(result):
    """Return the summary line: mean accuracy, its standard deviation over the folds (ddof=0), and mean threshold."""
    return f"LFWACC={result.accuracy:.4f} std={result.std:.4f} thd={result.threshold:.4f}"


def table(measured, lfw, protocols, mirror):
    """Return the table of one model as text; the summary line comes first if "folds" is reported.

    Args:
        measured: Measured.
        lfw: faces.verification.lfw.Lfw.
        protocols: which of "folds", "tar" and "identification" to report.
        mirror: how the embedding of the mirror image was used; see faces.verification.embed.embed.
    """
    pairs = lfw.pairs.judged()
    genuine = int(pairs.same.sum())
    rows = [("model", f"{measured.model} ({measured.method}, {measured.net})")]
    if "folds" in protocols:
        rows += _fold_rows(measured)
        if "tar" not in protocols:
            rows.append(_tar_row(operating_point(measured.result.similarities, pairs.same, FAR)))
    rows += [_tar_row(point) for point in measured.operating_points]
    if measured.identification:
        rows += _identification_rows(measured.identification)
    rows += [("pairs", f"{len(pairs.same):,} ({genuine:,} genuine, {len(pairs.same) - genuine:,} impostor)"),
             ("images", f"{len(lfw.faces):,}, mirror image: {mirror}"),
             ("landmarks", lfw.landmarks),
             ("seconds", f"{measured.seconds:.1f}")]
    lines = [f"{name:<20}{value}" for name, value in rows]
    if "folds" in protocols:
        lines.insert(0, summary_line(measured.result))
    return "\n".join(lines)


def compare(models):
    """Return the difference in accuracy between each further model and the first, with its 95 % confidence interval.

    Args:
        models: list of Measured.

    Returns:
        list of dicts with the keys "model", "against", "difference" and "interval_95".
    """
    baseline = models[0]
    return [{"model": other.model, "against": baseline.model,
             "difference": other.result.accuracy - baseline.result.accuracy,
             "interval_95": interval(other.draws - baseline.draws)} for other in models[1:]]


def comparison_lines(comparisons):
    """Return the result of compare() as text, one line per further model."""
    return "\n".join(
        f"{row['model']} minus {row['against']}: accuracy {row['difference']:+.4f}, 95 % interval "
        f"{row['interval_95'][0]:+.4f} to {row['interval_95'][1]:+.4f} (paired, over identities), which "
        f"{'contains 0' if row['interval_95'][0] <= 0 <= row['interval_95'][1] else 'excludes 0'}"
        for row in comparisons)


def write(folder, models, lfw, settings):
    """Write results.json, scores.tsv and the pictures into a folder.

    The files of a single model are written into the folder itself. Those of several models are written into
    subfolders named by their titles, and the folder gets a results.json with all models and their comparison, and
    pictures with the curves of all models.

    Args:
        folder: pathlib.Path.
        models: list of Measured.
        lfw: faces.verification.lfw.Lfw.
        settings: dict of the command-line options.
    """
    lfw = lfw._replace(pairs=lfw.pairs.judged())
    subfolders = [folder] if len(models) == 1 else [folder / name for name in folder_names(models)]
    results = []
    for subfolder, measured in zip(subfolders, models):
        results.append(_results(measured, lfw, {**settings, "model": measured.model, "net": measured.net}))
        write_json(subfolder / "results.json", results[-1])
        _write_scores(subfolder / "scores.tsv", lfw.pairs, measured.result)
        _draw_pictures(subfolder, measured, lfw)
    if len(models) > 1:
        write_json(folder / "results.json", {"models": results, "comparison": compare(models)})
        _draw_curves(folder, models)


def folder_names(models):
    """Return a file name for each of several Measured, made from its title; equal ones get a number."""
    names = []
    for i, model in enumerate(models, 1):
        name = re.sub(r"[^\w.-]+", "-", model.title).strip("-.") or f"model-{i}"
        names.append(f"{name}-{i}" if name.lower() in map(str.lower, names) else name)
    return names


def _fold_rows(measured):
    result = measured.result
    (low, high), folds = interval(measured.draws), len(result.accuracies)
    std = f"{result.std:.4f} over {folds} folds (ddof=0)" if folds > 1 else "n/a (one test set)"
    return [("accuracy", f"{result.accuracy:.4f}"),
            ("standard deviation", std),
            ("95 % interval", f"{low:.4f} to {high:.4f} ({count_of(len(measured.draws), 'bootstrap draw~')} "
             "of identities)"),
            ("AUC", f"{result.auc:.4f}"),
            ("EER", f"{result.eer:.4f}")]


def _tar_row(point):
    text = f"{point.tar:.4f} at threshold {point.threshold:.4f}, {point.accepted} of "
    text += count_of(point.impostors, "impostor pair~")
    if not point.resolved:
        text += f"; too few to resolve this rate, which needs {np.ceil(1 / point.far - 1e-9):,.0f}"
    return f"TAR@FAR={_format_rate(point.far)}", text


def _identification_rows(identification):
    ranks = [rank for rank in TABLE_RANKS if rank <= identification.gallery]
    return [(f"rank {rank}", f"{identification.cmc[rank - 1]:.4f}") for rank in ranks] + [
        ("gallery", f"{identification.gallery:,} people, one image each; {count_of(identification.probes, 'probe~')}")]


def _format_rate(rate):
    return np.format_float_scientific(rate, trim="-", exp_digits=1)


def _results(measured, lfw, settings):
    result, pairs = measured.result, lfw.pairs
    return {
        "title": measured.title, "method": measured.method,
        "accuracy": result.accuracy, "std": result.std, "threshold": result.threshold, "auc": result.auc,
        "eer": result.eer, "tar_at_far_1e-3": operating_point(result.similarities, pairs.same, FAR).tar, "std_ddof": 0,
        "interval_95": interval(measured.draws),
        "folds": [{"accuracy": float(a), "threshold": float(t)} for a, t in zip(result.accuracies, result.thresholds)],
        "tar": [{**point._asdict(), "resolved": point.resolved} for point in measured.operating_points],
        "identification": measured.identification and {
            **measured.identification._asdict(), "rank_1": float(measured.identification.cmc[0]),
            "cmc": measured.identification.cmc[:MAX_CMC_RANK].round(6).tolist()},
        "counts": {"pairs": len(pairs.same), "genuine": int(pairs.same.sum()), "images": len(pairs.paths)},
        "settings": {**settings, "weights": measured.loaded, "landmarks": lfw.landmarks},
        "seconds": round(measured.seconds, 2), "torch": str(torch.__version__)}


def _write_scores(path, pairs, result):
    with atomic_write(path, "w", encoding="utf-8") as file:
        file.write("left\tright\tsame\tfold\tsimilarity\n")
        for (a, b), same, fold, similarity in zip(pairs.pairs, pairs.same, pairs.folds, result.similarities):
            file.write(f"{pairs.paths[a]}\t{pairs.paths[b]}\t{int(same)}\t{fold}\t{similarity:.6f}\n")


def _draw_pictures(folder, measured, lfw):
    result = measured.result
    _draw_curves(folder, [measured])
    plots.histogram_picture(folder / "histogram.png", result.similarities, lfw.pairs.same, result.threshold)
    error_sheet(folder / "errors.png", lfw.faces, lfw.pairs, result.similarities, result.correct)


def _draw_curves(folder, models):
    names = [m.title if sum(m.title == other.title for other in models) == 1 else f"{i}: {m.title}"
             for i, m in enumerate(models, 1)]
    plots.roc_picture(folder / "roc.png", {f"{name}, AUC {m.result.auc:.4f}": (m.result.far, m.result.tar)
                                             for name, m in zip(names, models)})
    if models[0].identification:
        cmcs = zip(names, (m.identification.cmc for m in models))
        plots.cmc_picture(folder / "cmc.png", MAX_CMC_RANK,
                            {f"{name}, rank 1 {cmc[0]:.4f}": cmc for name, cmc in cmcs})
