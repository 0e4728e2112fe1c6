"""Evaluate networks on verification sets: the command behind both lfw_eval.py, and the function that training uses."""
import time
from argparse import BooleanOptionalAction

import numpy as np
import torch
from torch import nn

from faces.device import pick_device, pick_dtype, tune_cpu
from faces.files import InputError, at_least, check_writable, command, count_of, path, script_parser
from faces.verification import report
from faces.verification.bootstrap import bootstrap, interval
from faces.verification.embed import FLIP, default_batch_size, embed
from faces.verification.lfw import Lfw, find_sets, load_sets, set_name
from faces.verification.metrics import Verification, identify, operating_point, verify
from faces.verification.threshold import Threshold, choose_threshold, save_threshold, threshold_path
from faces.verification.weights import add_model_options, announce, load_net, model_titles

DESCRIPTION = """Evaluate a model on LFW and similar sets with the standard 10-fold protocol.

Each face and its flipped image are embedded, pairs are compared by cosine similarity, and each fold is classified with
the threshold that is best on the other nine. The options select other sets and protocols; see docs/evaluation.md."""


def evaluate_epoch(net: nn.Module, sets: list[Lfw], device, dtype: torch.dtype, step: int,
                   threshold: dict | None = None) -> tuple[dict, dict | None]:
    """Evaluate a network that is being trained: return figures for a log, the accuracy and its standard deviation over
    the folds, of each set and the mean of several; and for a checkpoint, the threshold with the highest accuracy on the
    first set. Without a set, there are no figures, and `threshold` is an earlier evaluation's."""
    if not sets:
        return {}, threshold
    results, figures = [_verify(embed(net, lfw.faces, device, dtype=dtype), lfw.pairs) for lfw in sets], {}
    names = report.folder_names([set_name(lfw.source) for lfw in sets]) if len(sets) > 1 else ["lfw"]
    for name, result in zip(names, results):
        figures |= {name: result.accuracy, f"{name}_std": result.std}
    if len(sets) > 1:
        figures["mean_accuracy"] = sum(result.accuracy for result in results) / len(sets)
    return figures, {**_threshold(results[0], sets[0])._asdict(), "step": step}


@command
def main(nets: dict, method: str, find_landmarks=None, argv: list[str] | None = None):
    """Run lfw_eval.py with `nets`, a dict from a network's name to its constructor. `method` is "CosFace" or
    "SphereFace", for files that do not name theirs; find_landmarks: see load_lfw()."""
    args = _parse(nets, argv)
    sets, device = find_sets(args.lfw), pick_device(args.device)
    if args.save_threshold and len(sets) > 1:
        raise InputError("--save-threshold takes a single set; pass one with --lfw.")
    if args.group and len(sets) == 1:
        raise InputError("--group compares two sets or more; pass them with --lfw.")
    tune_cpu(device)
    args.batch_size = args.batch_size or default_batch_size(device)
    models = [load_net(file, nets, args.net, args.channels) for file in args.model]
    for file, (_, loaded) in zip(args.model, models):
        if args.save_threshold:
            check_writable(threshold_path(file).parent, "--model, or leave out --save-threshold")
        announce(file, loaded)
        loaded["method"] = loaded["method"] or method
    titles = args.title or model_titles(args.model)
    args.title = [title if titles.count(title) == 1 else f"{i}: {title}" for i, title in enumerate(titles, 1)]
    loading = load_sets(sets, args.pairs, args.landmarks, aligned=args.aligned, view=args.view, device=device,
                        find_landmarks=find_landmarks, identification="identification" in args.protocol)
    names, results, several = report.folder_names(list(map(set_name, sets))), [], len(sets) > 1
    if several or len(models) > 1:
        for title, file, (_, loaded) in zip(args.title, args.model, models):
            print(f"{title}: {file} ({loaded['method']}, {loaded['net']}), flipped image: {args.flip}")
        print()
    if several:
        print(report.line("set", "model", "pairs", "accuracy", "95 % interval", "TAR@FAR=1e-3"))
    for name, lfw in zip(names, loading):
        results.append(_evaluate_set(args, device, models, lfw, name, several))
        if args.output:
            report.write_set(args.output / name if several else args.output, results[-1], lfw)
    means = _means(args, results) if several else []
    for measured in means:
        print(report.mean_line(measured.figures))
    with_means = results + [means] if several else results
    for row in (comparison := report.compare(with_means)):
        print(report.comparison_line(row))
    if args.output:
        if several or len(models) > 1:
            report.write_all(args.output, results, means, comparison)
        print(f"results: {args.output}")


def _evaluate_set(args, device, models, lfw, name, several):
    """Print the figures of all models on a set, one of `several` or not; return the report.Measured."""
    if "identification" in args.protocol and not lfw.pairs.identifiable():
        raise InputError(f"{lfw.source} does not name the people on its images, or has fewer than two people with two "
                         "images or more, which --protocol identification needs; leave that out.")
    measured = []
    for title, file, (net, loaded) in zip(args.title, args.model, models):
        measured.append(_measure(args, device, lfw, name, title, file, net, loaded))
        figures = measured[-1].figures
        if not several or args.protocol != ["folds"]:
            print(report.table(figures), end="\n\n" if several or len(models) > 1 else "\n")
        if several:
            print(report.set_line(figures))
        if args.save_threshold:
            best = _threshold(measured[-1].result, lfw)
            save_threshold(file, loaded["fingerprint"], best)
            print(f"threshold with the highest accuracy, {best.value:.4f}: {threshold_path(file)}")
    return measured


def _means(args, results):
    """Return the report.Measured of each model's mean over several sets; see report.compare() for `results`."""
    draws = bootstrap([(np.stack([model.result.correct for model in models]), models[0].people) for models in results],
                      args.resamples, args.seed)
    return [report.mean(own, row, args.group) for own, row in zip(zip(*results), draws)]


def _measure(args, device, lfw, name, title, file, net, loaded):
    """Return the report.Measured of a model on a set."""
    started, pairs = time.monotonic(), lfw.pairs.judged()
    embeddings = embed(net, lfw.faces, device, args.batch_size, args.flip, pick_dtype(args.precision, device))
    result = _verify(embeddings, lfw.pairs, args.subtract_mean)
    people = pairs.people(name)
    draws, = bootstrap([(result.correct[None], people)], args.resamples, args.seed)
    points = [operating_point(result.similarities, pairs.same, far) for far in (1e-3, *args.far)]
    found = identify(embeddings, pairs.identities, args.seed) if "identification" in args.protocol else None
    return report.Measured({
        "title": title, "method": loaded["method"], "set": name,
        "accuracy": result.accuracy, "std": result.std, "threshold": result.threshold, "auc": result.auc,
        "eer": result.eer, "tar_at_far_1e-3": points[0].tar, "std_ddof": 0, "interval_95": interval(draws),
        "folds": [{"accuracy": float(a), "threshold": float(t)} for a, t in zip(result.accuracies, result.thresholds)],
        "tar": [point._asdict() for point in points[1:]],
        "identification": found and {**found._asdict(), "rank_1": float(found.cmc[0]),
                                     "cmc": found.cmc[:report.MAX_CMC_RANK].round(6).tolist()},
        "counts": {"pairs": len(pairs.same), "genuine": int(pairs.same.sum()), "images": len(pairs.paths)},
        "settings": {**vars(args), "device": str(device), "model": str(file), "net": loaded["net"], "weights": loaded,
                     "lfw": lfw.source, "lists": pairs.lists, "landmarks": lfw.landmarks},
        "seconds": round(time.monotonic() - started, 2), "torch": str(torch.__version__)}, result, people, draws)


def _verify(embeddings, pairs, subtract_mean=False):
    try:
        return verify(embeddings, pairs.pairs, pairs.same, pairs.folds, subtract_mean)
    except ValueError as error:
        raise InputError(f"the model's embeddings can't be compared: {error}; its training must have failed.") from None


def _threshold(result: Verification, lfw: Lfw) -> Threshold:
    same = lfw.pairs.judged().same
    return choose_threshold(result.similarities, same, f"{count_of(len(same), 'pair~')} of {lfw.source}")


def _parse(nets, argv):
    parser = script_parser(DESCRIPTION)
    _add_options(parser, nets)
    args = parser.parse_args(argv)
    args.far = args.far or ([1e-3, 1e-2] if "tar" in args.protocol else [1e-3] if "folds" in args.protocol else [])
    if args.title and len(args.title) != len(args.model):
        parser.error(f"--title was given {count_of(len(args.title), 'time~')} for "
                     f"{count_of(len(args.model), 'model~')}; give it once per model")
    if args.save_threshold and (args.flip != "concatenate" or args.subtract_mean):
        parser.error("--save-threshold is for compare.py, which appends the flipped image's embedding and subtracts no "
                     "mean; leave out --flip and --subtract-mean")
    if args.aligned and args.landmarks:
        parser.error("--aligned faces have no use for --landmarks; leave one of them out")
    if args.output:
        check_writable(args.output)    # now, so that a mistake does not surface after the work
    return args


def _add_options(parser, nets):
    add = parser.add_argument_group("data").add_argument
    add("--lfw", type=path, required=True, nargs="+", metavar="DIR|FILE",
        help="folder or zip of Name/Name_0001.jpg, a .bin set of InsightFace (lfw, agedb_30, ...) or a folder of them")
    add("--pairs", type=path, nargs="+", default=[], metavar="FILE",
        help="pairs in LFW's format or as `path path 0|1` (default: pairs.txt in --lfw or beside it)")
    add("--view", type=int, choices=(1, 2), help="of LFW: 2 for reporting, 1 for development (default: by file names)")
    add("--landmarks", type=path, nargs="+", default=[], metavar="FILE",
        help="landmark list (default: the one of mtcnn/lfw_landmark.py; without one, MTCNN runs now)")
    add("--aligned", action=BooleanOptionalAction, default=False, help="the images are faces, 112x96 or 112x112")
    group = parser.add_argument_group("model (repeat --model to compare further ones with the first)")
    add_model_options(group, nets, action="append")
    group.add_argument("--title", action="append", metavar="TEXT", help="name in tables and pictures; once per model")
    add = parser.add_argument_group("protocol").add_argument
    add("--group", action=BooleanOptionalAction, default=False,
        help="the sets are groups of people, such as RFW's: print how much their errors differ")
    add("--protocol", choices=("folds", "tar", "identification"), nargs="+", default=["folds"],
        help="folds: accuracy, AUC and EER; tar: TAR at each --far; identification: rank 1, 5 and 10 with one image of "
             "each person in the gallery (default: folds)")
    add("--far", type=at_least(1e-12, float, 1), nargs="+", metavar="RATE",
        help="false acceptance rates (default: 1e-3 for folds, 1e-3 1e-2 for tar)")
    add("--flip", choices=FLIP, default="concatenate", help="what to do with the flipped image's embedding")
    add("--subtract-mean", action=BooleanOptionalAction, default=False,
        help="subtract the mean embedding of the training folds (not for identification)")
    add("--resamples", type=at_least(1), default=1000, metavar="R", help="bootstrap draws for the 95 %% interval")
    add("--seed", type=at_least(1), default=1, metavar="N", help="seed of the bootstrap and the gallery")
    add = parser.add_argument_group("machine and output").add_argument
    add("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu")
    add("--batch-size", type=at_least(1), metavar="N", help="faces at a time (default: 256, or 32 on a CPU)")
    add("--precision", choices=("float32", "bf16"), default="float32", help="bf16 is faster on GPUs, but less exact")
    add("--output", type=path, metavar="DIR", help="folder for results.json, scores.tsv and pictures")
    add("--save-threshold", action="store_true", help="save the best threshold beside the model, for tools/compare.py")
