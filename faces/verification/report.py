"""Report the results of lfw_eval.py: the summary line, tables of models and sets, and the files in --output."""
import csv
import re
import warnings
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np

from faces import plots  # before matplotlib: see MPLBACKEND there
from faces.files import atomic_write, count_of, shorten, write_json
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
    people: np.ndarray     # str (P, 2), names of the people on both images of each pair
    draws: np.ndarray      # float64 (R,), bootstrap accuracies


def table(figures: dict) -> str:
    """Return the figures of one model, see Measured, as a table in text. With the protocol "folds", a line of mean
    accuracy, its standard deviation over the folds (ddof=0), and mean threshold comes first."""
    settings, counts, found, lines = figures["settings"], figures["counts"], figures["identification"], []
    rows = [("model", f"{settings['model']} ({figures['method']}, {settings['net']})"), ("set", settings["lfw"])]
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
    rows += [("pairs", f"{pairs:,} ({genuine:,} genuine, {pairs - genuine:,} impostor) of {settings['lists']}"),
             ("images", f"{counts['images']:,}, flipped image: {settings['flip']}"),
             ("landmarks", settings["landmarks"]), ("seconds", f"{figures['seconds']:.1f}")]
    return "\n".join([*lines, *(f"{name:<20}{value}" for name, value in rows)])


def line(*cells) -> str:
    """Return a line of the table with a row per set and model."""
    return "".join(f"{cell:<{width - 2}}  " for cell, width in zip(cells, (16, 16, 9, 22, 18, 3))).rstrip()


def set_line(figures: dict) -> str:
    """Return the line of a model on a set; see Measured for its figures."""
    counts, tar = figures["counts"], f"{figures['tar_at_far_1e-3']:.4f}"
    return line(figures["set"], figures["title"], f"{counts['pairs']:,}",
                "{accuracy:.4f} (std {std:.4f})".format(**figures), "{:.4f} to {:.4f}".format(*figures["interval_95"]),
                tar if counts["pairs"] - counts["genuine"] >= 1000 else "too few pairs")


def mean_line(row: dict) -> str:
    """Return the lines of a model's mean over the sets; `row` are the figures of mean()."""
    text = line("mean", row["title"], "", f"{row['accuracy']:.4f}", "{:.4f} to {:.4f}".format(*row["interval_95"]))
    if "std_ddof_1" in row:
        ratio = "n/a" if row["error_ratio"] is None else f"{row['error_ratio']:.2f}"
        text += f"\n  groups: standard deviation {row['std_ddof_1']:.4f} (ddof=1), largest / smallest error {ratio}"
    if row.get("overlapping"):
        pairs = shorten([" and ".join(pair) for pair in row["overlapping"]], count=6)
        text += f"\n  warning: the intervals of {pairs} overlap, so their order may be due to chance"
    return text


def mean(sets: list[Measured], draws: np.ndarray, group: bool = False) -> Measured:
    """Return a model's mean over several sets, like one more set, without a result: its accuracy with a 95 % interval
    from `draws`, float64 (R,). If the sets are groups of people, its figures are also the standard deviation over the
    groups (ddof=1), the ratio of the largest to the smallest error (None if that is 0), and which intervals overlap."""
    first, accuracies = sets[0].figures, [measured.figures["accuracy"] for measured in sets]
    figures = {"title": first["title"], "model": first["settings"]["model"], "set": "mean",
               "accuracy": float(np.mean(accuracies)), "interval_95": interval(draws)}
    if group:
        intervals = [(measured.figures["set"], *measured.figures["interval_95"]) for measured in sets]
        figures |= {"std_ddof_1": float(np.std(accuracies, ddof=1)),
                    "error_ratio": (1 - min(accuracies)) / (1 - max(accuracies)) if max(accuracies) < 1 else None,
                    "overlapping": [(a[0], b[0]) for i, a in enumerate(intervals) for b in intervals[:i]
                                    if a[1] <= b[2] and b[1] <= a[2]]}
    return Measured(figures, None, None, draws)


def matrix(results: list[list[Measured]]) -> list[list[str]]:
    """Return the rows of a table of models by sets, with accuracies in %; see compare() for `results`."""
    rows = [["model", "network", *(models[0].figures["set"] for models in results)]]
    return rows + [[sets[0].figures["title"], sets[0].figures["settings"]["net"],
                    *(f"{100 * measured.figures['accuracy']:.2f}" for measured in sets)] for sets in zip(*results)]


def compare(results: list[list[Measured]]) -> list[dict]:
    """Return the differences in accuracy between each further model and the first, with paired 95 % intervals.
    `results` has a list per set, of which mean() may be one, with the Measured of each model."""
    return [{"title": other.figures["title"], "against": first.figures["title"], "set": first.figures["set"],
             "difference": other.figures["accuracy"] - first.figures["accuracy"],
             "interval_95": interval(other.draws - first.draws)} for first, *others in results for other in others]


def comparison_line(row: dict) -> str:
    """Return a dict of compare() as text."""
    low, high = row["interval_95"]
    return (f"{row['title']} minus {row['against']}, {row['set']}: accuracy {row['difference']:+.4f}, 95 % interval "
            f"{low:+.4f} to {high:+.4f} (paired, over identities), which "
            f"{'contains' if low <= 0 <= high else 'excludes'} 0")


def write_all(folder: Path, results: list[list[Measured]], means: list[Measured], comparison: list[dict]):
    """Write table.csv, see matrix(), and a results.json with all models, sets and means, and what compare() returned;
    see compare() for `results`. A single set has no `means`."""
    write_json(folder / "results.json", {"results": [model.figures for models in results for model in models],
                                         "means": [model.figures for model in means], "comparison": comparison})
    with atomic_write(folder / "table.csv", "w", newline="") as file:
        csv.writer(file).writerows(matrix(results + [means] if means else results))


def write_set(folder: Path, models: list[Measured], lfw: Lfw):
    """Write results.json, scores.tsv and the pictures of a set into a folder. Several models get a subfolder each,
    named by its title, and the folder gets pictures with the curves of all."""
    pairs, names = lfw.pairs.judged(), folder_names([model.figures["title"] for model in models])
    for name, model in zip(names if len(models) > 1 else [""], models):
        inner, result = folder / name, model.result
        write_json(inner / "results.json", model.figures)
        with atomic_write(inner / "scores.tsv", "w") as file:
            file.write("left\tright\tsame\tfold\tsimilarity\n")
            for (a, b), same, fold, similarity in zip(pairs.pairs, pairs.same, pairs.folds, result.similarities):
                file.write(f"{pairs.paths[a]}\t{pairs.paths[b]}\t{int(same)}\t{fold}\t{similarity:.6f}\n")
        _draw_curves(inner, [model])
        plots.picture(inner / "histogram.png", (6, 4), plots.draw_histogram, result.similarities, pairs.same,
                      result.threshold)
        error_sheet(inner / "errors.png", lfw.faces, pairs, result.similarities, result.correct)
    if len(models) > 1:
        _draw_curves(folder, models)


def folder_names(titles: list[str]) -> list[str]:
    """Return a file name for each title of a model or name of a set; equal ones get a number."""
    names = []
    for i, title in enumerate(titles, 1):
        name = re.sub(r"[^\w.-]+", "-", title).strip("-.") or f"model-{i}"
        while name.lower() in map(str.lower, names):
            name += f"-{i}"
        names.append(name)
    return names


def _draw_curves(folder, models):
    plots.picture(folder / "roc.png", (6, 4.5), plots.draw_roc, {
        f"{m.figures['title']}, AUC {m.result.auc:.4f}": (m.result.far, m.result.tar) for m in models})
    if models[0].figures["identification"]:
        curves = {model.figures["title"]: model.figures["identification"]["cmc"] for model in models}
        plots.picture(folder / "cmc.png", (6, 4), plots.draw_cmc, MAX_CMC_RANK, {
            f"{title}, rank 1 {cmc[0]:.4f}": cmc for title, cmc in curves.items()})


def error_sheet(file, faces: np.ndarray, pairs, similarities: np.ndarray, correct: np.ndarray, count: int = 10):
    """Draw the hardest Pairs, up to `count` of each kind, as the network sees them: a wrong label, a wrong alignment or
    the network's error? The aligned faces are uint8 (N, HEIGHT, WIDTH, 3), RGB, the similarities float (P,). `correct`,
    bool (P,), says which pairs were classified correctly."""
    order = np.argsort(np.where(pairs.same, similarities, -similarities), kind="stable")    # the hardest first
    shown = [order[pairs.same[order] == genuine][:count] for genuine in (True, False)]
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


def _caption(name, length=34):
    """Return the file name without its extension, or a name such as `lfw.bin#12`; a long one is cut in the middle."""
    name = name.rpartition("/")[2]
    stem = name if "#" in name else name.rpartition(".")[0]
    return stem if len(stem) <= length else f"{stem[:length - 13]}…{stem[-12:]}"
