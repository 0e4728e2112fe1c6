"""The report of lfw_eval.py on a model: the summary line, a table, and the files of --output."""
from typing import NamedTuple

import numpy as np
import torch

from faces import figures
from faces.files import atomic_write, write_json
from faces.verification.bootstrap import interval
from faces.verification.contact_sheet import error_sheet
from faces.verification.metrics import Identification, Verification, tar_at_far

FAR = 1e-3       # the lowest rate that 3,000 impostor pairs can resolve: three false accepts
RANKS = (1, 5, 10)
CMC = 100        # ranks in results.json and cmc.png


class Measured(NamedTuple):
    """A model and its measurements.

    model, net, method: the path of the file, the name of the network, and the name of the method.
    weights: the description that faces.verification.weights.load_weights() returned.
    result: faces.verification.metrics.Verification.
    draws: float64 (R,), bootstrap accuracies; see faces.verification.bootstrap.
    operating: list of faces.verification.metrics.OperatingPoint, one per --far; empty if that protocol was not
        requested.
    identification: faces.verification.metrics.Identification, or None if it was not requested.
    seconds: time that it took.
    """
    model: str
    net: str
    method: str
    weights: dict
    result: Verification
    draws: np.ndarray
    operating: list
    identification: Identification | None
    seconds: float


def summary_line(result):
    """Return the summary line: mean accuracy, standard deviation over the folds (ddof=0), mean threshold."""
    return f"LFWACC={result.accuracy:.4f} std={result.std:.4f} thd={result.threshold:.4f}"


def table(measured, lfw, protocols, mirror):
    """Return the table of one model.

    Args:
        measured: Measured.
        lfw: faces.verification.lfw.Lfw.
        protocols: which of "folds", "tar" and "identification" to report.
        mirror: how the mirror image was used.
    """
    pairs = lfw.pairs.judged()
    genuine = int(pairs.same.sum())
    rows = [("model", f"{measured.model} ({measured.method}, {measured.net})")]
    if "folds" in protocols:
        rows += _fold_rows(measured, len(pairs.same) - genuine, "tar" not in protocols)
    rows += [_tar_row(point) for point in measured.operating]
    if measured.identification:
        rows += _identification_rows(measured.identification)
    rows += [("pairs", f"{len(pairs.same)} ({genuine} genuine, {len(pairs.same) - genuine} impostor)"),
             ("images", f"{len(lfw.faces)}, mirror image: {mirror}"),
             ("landmarks", lfw.landmarks),
             ("seconds", f"{measured.seconds:.1f}")]
    lines = [f"{name:<20}{value}" for name, value in rows]
    return "\n".join([summary_line(measured.result), *lines] if "folds" in protocols else lines)


def compare(models):
    """Return the differences in accuracy of all further models to the first, with their intervals: a list of dicts."""
    first = models[0]
    return [{"model": other.model, "against": first.model,
             "difference": other.result.accuracy - first.result.accuracy,
             "interval_95": interval(other.draws - first.draws)} for other in models[1:]]


def comparison_lines(comparisons):
    """Return the text that describes the result of compare()."""
    return "\n".join(
        f"{row['model']} minus {row['against']}: accuracy {row['difference']:+.4f}, 95 % interval "
        f"{row['interval_95'][0]:+.4f} to {row['interval_95'][1]:+.4f} (paired, over identities), which "
        f"{'contains 0' if row['interval_95'][0] <= 0 <= row['interval_95'][1] else 'excludes 0'}"
        for row in comparisons)


def write(folder, models, lfw, settings):
    """Write results.json, scores and pictures: for one model into the folder, for several into model-1, model-2, ...

    Args:
        folder: pathlib.Path.
        models: list of Measured. With several, the folder itself gets a results.json with all of them and the
            comparison, and a picture with all ROC curves.
        lfw: faces.verification.lfw.Lfw.
        settings: dict of the command line's options.
    """
    lfw = lfw._replace(pairs=lfw.pairs.judged())
    places = [folder] if len(models) == 1 else [folder / f"model-{i}" for i in range(1, len(models) + 1)]
    results = []
    for place, measured in zip(places, models):
        results.append(_results(measured, lfw, {**settings, "model": measured.model, "net": measured.net}))
        write_json(place / "results.json", results[-1])
        _write_scores(place / "scores.tsv", lfw.pairs, measured.result)
        _draw(place, measured, lfw)
    if len(models) > 1:
        write_json(folder / "results.json", {"models": results, "comparison": compare(models)})
        _draw_curves(folder, models)


def _fold_rows(measured, impostors, with_tar):
    result = measured.result
    (low, high), folds = interval(measured.draws), len(result.accuracies)
    rows = [("accuracy", f"{result.accuracy:.4f}"),
            ("standard deviation", f"{result.std:.4f} over {folds} folds (ddof=0)" if folds > 1 else "one test set"),
            ("95 % interval", f"{low:.4f} to {high:.4f} ({len(measured.draws)} bootstrap draws of identities)"),
            ("AUC", f"{result.auc:.4f}"),
            ("EER", f"{result.eer:.4f}")]
    if with_tar:
        coarse = "" if impostors * FAR >= 1 else f" (none of {impostors} impostor pairs accepted)"
        rows.append(("TAR@FAR=1e-3", f"{tar_at_far(result.far, result.tar, FAR):.4f}{coarse}"))
    return rows


def _tar_row(point):
    words = f"{point.tar:.4f} at threshold {point.threshold:.4f}, {point.accepted} of {point.impostors} impostor pairs"
    if not point.resolved:
        words += f"; too few to resolve this rate, which needs {1 / point.far:,.0f}"
    return f"TAR@FAR={_scientific(point.far)}", words


def _identification_rows(found):
    shown = [rank for rank in RANKS if rank <= found.gallery]
    return [(f"rank {rank}", f"{found.cmc[rank - 1]:.4f}") for rank in shown] + [
        ("gallery", f"{found.gallery} people, one image each; {found.probes} probes")]


def _scientific(rate):
    return np.format_float_scientific(rate, trim="-", exp_digits=1)


def _results(measured, lfw, settings):
    result, pairs = measured.result, lfw.pairs
    return {
        "method": measured.method,
        "accuracy": result.accuracy, "std": result.std, "threshold": result.threshold, "auc": result.auc,
        "eer": result.eer, "tar_at_far_1e-3": tar_at_far(result.far, result.tar, FAR), "std_ddof": 0,
        "interval_95": interval(measured.draws),
        "folds": [{"accuracy": float(a), "threshold": float(t)} for a, t in zip(result.accuracies, result.thresholds)],
        "tar": [{**point._asdict(), "resolved": point.resolved} for point in measured.operating],
        "identification": measured.identification and {
            **measured.identification._asdict(), "rank_1": float(measured.identification.cmc[0]),
            "cmc": measured.identification.cmc[:CMC].round(6).tolist()},
        "counts": {"pairs": len(pairs.same), "genuine": int(pairs.same.sum()), "images": len(pairs.paths)},
        "settings": {**settings, "weights": measured.weights, "landmarks": lfw.landmarks},
        "seconds": round(measured.seconds, 2), "torch": str(torch.__version__)}


def _write_scores(path, pairs, result):
    with atomic_write(path, "w", encoding="utf-8") as file:
        file.write("left\tright\tsame\tfold\tsimilarity\n")
        for (a, b), same, fold, similarity in zip(pairs.pairs, pairs.same, pairs.folds, result.similarities):
            file.write(f"{pairs.paths[a]}\t{pairs.paths[b]}\t{int(same)}\t{fold}\t{similarity:.6f}\n")


def _draw(folder, measured, lfw):
    result = measured.result
    _draw_curves(folder, [measured])
    figures.histogram_picture(folder / "histogram.png", result.similarities, lfw.pairs.same, result.threshold)
    error_sheet(folder / "errors.png", lfw.faces, lfw.pairs, result.similarities, result.correct)


def _draw_curves(folder, models):
    names = [f"{m.method} {m.net}" for m in models]
    if len(models) > 1:
        names = [f"{i}: {name}" for i, name in enumerate(names, 1)]  # two models may have the same name
    figures.roc_picture(folder / "roc.png", {f"{name}, AUC {m.result.auc:.4f}": (m.result.far, m.result.tar)
                                             for name, m in zip(names, models)})
    if models[0].identification:
        cmcs = zip(names, (m.identification.cmc for m in models))
        figures.cmc_picture(folder / "cmc.png", CMC, {f"{name}, rank 1 {cmc[0]:.4f}": cmc for name, cmc in cmcs})
