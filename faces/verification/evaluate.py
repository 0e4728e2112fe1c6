"""Evaluate networks on a verification set: the command behind both lfw_eval.py, and the function that training uses."""
import time
from argparse import BooleanOptionalAction
from pathlib import Path

import torch
from torch import nn

from faces.device import pick_device, pick_dtype, tune_cpu
from faces.files import InputError, at_least, check_writable, command, count_of, path, script_parser
from faces.verification import report
from faces.verification.bootstrap import bootstrap, interval
from faces.verification.embed import FLIP, default_batch_size, embed
from faces.verification.lfw import Lfw, load_lfw
from faces.verification.metrics import Verification, identify, operating_point, verify
from faces.verification.threshold import Threshold, choose_threshold, save_threshold, threshold_path
from faces.verification.weights import MODEL_HELP, add_options, announce, load_net, model_file

DESCRIPTION = """Evaluate a model on LFW with the standard 10-fold protocol.

Each face and its flipped image are embedded, pairs are compared by cosine similarity, and each fold is classified with
the threshold that is best on the other nine. The options select other sets and protocols; see docs/evaluation.md."""


def evaluate(net: nn.Module, lfw: Lfw, device, flip: str = "concatenate", subtract_mean: bool = False,
             batch_size: int | None = None, dtype: torch.dtype = torch.float32, progress: bool = True) -> Verification:
    """Run the k-fold protocol on a network.

    The arguments are those of faces.verification.embed.embed and faces.verification.metrics.verify; `lfw` can be used
    as often as needed. Raises InputError if the network's embeddings are not finite, or are zero.
    """
    return _verify(embed(net, lfw.faces, device, batch_size, flip, dtype, progress), lfw.pairs, subtract_mean)


def evaluate_epoch(net: nn.Module, lfw: Lfw | None, device, dtype: torch.dtype, step: int,
                   threshold: dict | None = None) -> tuple[dict, dict | None]:
    """Evaluate a network that is being trained.

    Returns:
        The accuracy and its standard deviation over the folds, for a log; and for a checkpoint, the threshold with the
        highest accuracy. Without a set, no figures and the `threshold` of an earlier evaluation.
    """
    if lfw is None:
        return {}, threshold
    result = evaluate(net, lfw, device, dtype=dtype)
    return {"lfw": result.accuracy, "lfw_std": result.std}, {**_threshold(result, lfw)._asdict(), "step": step}


@command
def main(nets: dict, method: str, find_landmarks=None, argv: list[str] | None = None):
    """Run lfw_eval.py with `nets`, a dict from a network's name to its constructor.

    `method` is "CosFace" or "SphereFace", for files that do not name theirs; find_landmarks: see load_lfw().
    """
    args, started = _parse(nets, argv), time.monotonic()
    device = pick_device(args.device)
    tune_cpu(device)
    args.batch_size = args.batch_size or default_batch_size(device)
    models = [load_net(file, nets, name, args.channels) for file, name in zip(args.model, args.net)]
    for file, (_, loaded) in zip(args.model, models):
        if args.save_threshold:
            check_writable(threshold_path(file).parent, "--model")
        announce(file, loaded)
        loaded["method"] = loaded["method"] or method
    lfw = load_lfw(args.lfw, args.pairs, args.landmarks, args.aligned, args.view, find_landmarks, device,
                   "identification" in args.protocol)
    if "identification" in args.protocol and not (lfw.pairs.named and lfw.pairs.people_with_several() > 1):
        raise InputError(f"{args.lfw} does not name the people on its images, or has fewer than two people with two "
                         "images or more, which --protocol identification needs; leave that out.")
    measured = []
    for title, file, (net, loaded) in zip(args.title or _titles(args.model, models), args.model, models):
        measured.append(_measure(args, device, lfw, title, file, net, loaded, started))
        print(report.table(measured[-1].figures))
        if args.save_threshold:
            best = _threshold(measured[-1].result, lfw)
            save_threshold(file, loaded["fingerprint"], best)
            print(f"threshold with the highest accuracy, {best.value:.4f}: {threshold_path(file)}")
        if len(models) > 1:
            print()
        started = time.monotonic()
    for row in report.compare(measured):
        print(report.comparison_line(row))
    if args.output:
        report.write(args.output, measured, lfw)
        print(f"results: {args.output}")


def _titles(paths, models):
    """Return a title per model: method and network; among several, the name of the run's folder or of the file."""
    if len(models) == 1:
        return [f"{models[0][1]['method']} {models[0][1]['net']}"]
    files = [model_file(file).absolute() for file in paths]
    return [file.parent.name if file.name.startswith("checkpoint") else file.stem for file in files]


def _measure(args, device, lfw, title, file, net, loaded, started):
    """Return the report.Measured of a model."""
    pairs = lfw.pairs.judged()
    embeddings = embed(net, lfw.faces, device, args.batch_size, args.flip, pick_dtype(args.precision, device))
    result = _verify(embeddings, lfw.pairs, args.subtract_mean)
    draws, = bootstrap(result.correct[None], pairs.identities[pairs.pairs], args.resamples, args.seed)
    points = [operating_point(result.similarities, pairs.same, far) for far in (1e-3, *args.far)]
    found = identify(embeddings, pairs.identities, args.seed) if "identification" in args.protocol else None
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    return report.Measured({
        "title": title, "method": loaded["method"],
        "accuracy": result.accuracy, "std": result.std, "threshold": result.threshold, "auc": result.auc,
        "eer": result.eer, "tar_at_far_1e-3": points[0].tar, "std_ddof": 0, "interval_95": interval(draws),
        "folds": [{"accuracy": float(a), "threshold": float(t)} for a, t in zip(result.accuracies, result.thresholds)],
        "tar": [point._asdict() for point in points[1:]],
        "identification": found and {**found._asdict(), "rank_1": float(found.cmc[0]),
                                     "cmc": found.cmc[:report.MAX_CMC_RANK].round(6).tolist()},
        "counts": {"pairs": len(pairs.same), "genuine": int(pairs.same.sum()), "images": len(pairs.paths)},
        "settings": {**settings, "device": str(device), "model": str(file), "net": loaded["net"], "weights": loaded,
                     "landmarks": lfw.landmarks},
        "seconds": round(time.monotonic() - started, 2), "torch": str(torch.__version__)}, result, draws)


def _verify(embeddings, pairs, subtract_mean):
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
    args.net = args.net or [None]
    if len(args.net) == 1:
        args.net *= len(args.model)
    for name, given in (("--net", args.net), ("--title", args.title or args.model)):
        if len(given) != len(args.model):
            parser.error(f"{name} was given {count_of(len(given), 'time~')} for {count_of(len(args.model), 'model~')}; "
                         "give it once per model")
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
    add("--lfw", type=path, required=True, metavar="DIR|FILE",
        help="folder or zip of Name/Name_0001.jpg, or a .bin set of InsightFace (lfw, agedb_30, ...)")
    add("--pairs", type=path, metavar="FILE",
        help="pairs in LFW's format or as `path path 0|1` (default: pairs.txt in --lfw or beside it)")
    add("--view", type=int, choices=(1, 2), help="of LFW: 2 for reporting, 1 for development (default: by file names)")
    add("--landmarks", type=path, metavar="FILE",
        help="landmark list (default: the one of mtcnn/lfw_landmark.py; without one, MTCNN runs now)")
    add("--aligned", action=BooleanOptionalAction, default=False, help="the images are faces, 112x96 or 112x112")
    group = parser.add_argument_group("model")
    group.add_argument("--model", type=path, required=True, action="append", metavar="FILE|DIR",
                       help=f"{MODEL_HELP}; repeat it to compare further models with the first")
    add_options(group, nets, action="append")
    group.add_argument("--title", action="append", metavar="TEXT", help="name in pictures and --output; once per model")
    add = parser.add_argument_group("protocol").add_argument
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
