"""Evaluate networks on a verification set: the command behind both lfw_eval.py, and the function that training uses."""
import os
import time
from argparse import BooleanOptionalAction
from pathlib import Path

import torch
from torch import nn

from faces.device import pick_device, tune_cpu
from faces.files import InputError, at_least, check_writable, command, count_of, path, script_parser
from faces.verification import report
from faces.verification.bootstrap import bootstrap
from faces.verification.embed import FLIP, default_batch_size, embed
from faces.verification.lfw import Lfw, load_lfw
from faces.verification.metrics import Verification, identify, operating_point, verify
from faces.verification.threshold import choose_threshold, save_threshold, threshold_path
from faces.verification.weights import MODEL_HELP, add_options, announce, load_net, model_file

PRECISION = {"float32": torch.float32, "bf16": torch.bfloat16}
PROTOCOLS = ("folds", "tar", "identification")
DESCRIPTION = """Evaluate a model on LFW with the standard 10-fold protocol.

Each face and its flipped image are embedded, pairs are compared by cosine similarity, and each fold is classified with
the threshold that is best on the other nine. The options select other sets and protocols; see docs/evaluation.md."""


def evaluate(net: nn.Module, lfw: Lfw, device, flip: str = "concatenate", subtract_mean: bool = False,
             batch_size: int | None = None, dtype: torch.dtype = torch.float32, progress: bool = True) -> Verification:
    """Run the k-fold protocol on a network.

    Args:
        net: module, (B, 3, 112, 96) to (B, D); left unchanged.
        lfw: the set; load it once and use it as often as needed.
        device, flip, batch_size, dtype, progress: see faces.verification.embed.embed.
        subtract_mean: see faces.verification.metrics.verify.

    Raises:
        InputError: the network's embeddings are not finite, or are zero.
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
    result, pairs = evaluate(net, lfw, device, dtype=dtype), lfw.pairs.judged()
    best = choose_threshold(result.similarities, pairs.same, f"{count_of(len(pairs.same), 'pair~')} of {lfw.source}")
    return {"lfw": result.accuracy, "lfw_std": result.std}, {**best._asdict(), "step": step}


@command
def main(nets: dict, method: str, find_landmarks=None, argv: list[str] | None = None):
    """Run lfw_eval.py.

    Args:
        nets: dict from a network's name to its constructor.
        method: "CosFace" or "SphereFace", for files that do not name theirs.
        find_landmarks: see faces.verification.lfw.load_lfw.
        argv: command line arguments; None takes sys.argv.
    """
    args = _parse(nets, argv)
    started = time.monotonic()
    device = pick_device(args.device)
    tune_cpu(device)
    args.batch_size = args.batch_size or default_batch_size(device)
    models = [load_net(file, nets, name, args.channels) for file, name in zip(args.model, args.net)]
    for file, (_, loaded) in zip(args.model, models):
        announce(file, loaded)
    titles = args.title or _titles(args.model, models, method)
    lfw = load_lfw(args.lfw, args.pairs, args.landmarks, args.aligned, args.view, find_landmarks, device,
                   "identification" in args.protocol)
    if "identification" in args.protocol and not (lfw.pairs.named and lfw.pairs.people_with_several() > 1):
        raise InputError(f"{args.lfw} does not name the people on its images, or has fewer than two people with two "
                         "images or more, which --protocol identification needs; leave that out.")
    measured = []
    for title, file, (net, loaded) in zip(titles, args.model, models):
        measured.append(report.Measured(title, str(file), loaded["net"], loaded["method"] or method, loaded,
                                        *_measure(args, net, device, lfw), time.monotonic() - started))
        print(report.table(measured[-1], lfw, args.protocol, args.flip))
        if args.save_threshold:
            same = lfw.pairs.judged().same
            best = choose_threshold(measured[-1].result.similarities, same,
                                    f"{count_of(len(same), 'pair~')} of {args.lfw}")
            save_threshold(file, loaded["fingerprint"], best)
            print(f"threshold with the highest accuracy, {best.value:.4f}: {threshold_path(file)}")
        if len(models) > 1:
            print()
        started = time.monotonic()
    if len(measured) > 1:
        print(report.comparison_lines(report.compare(measured)))
    if args.output:
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        report.write(args.output, measured, lfw, {**settings, "device": str(device)})
        print(f"results: {args.output}")


def _titles(paths, models, method):
    """Return a title per model: method and network; among several, the name of the run's folder or of the file."""
    if len(models) == 1:
        (_, loaded), = models
        return [f"{loaded['method'] or method} {loaded['net']}"]
    files = [model_file(file).absolute() for file in paths]
    return [file.parent.name if file.name.startswith("checkpoint") else file.stem for file in files]


def _measure(args, net, device, lfw):
    """Return (Verification, bootstrap draws, list of OperatingPoint, Identification or None) of a network."""
    try:
        embeddings = embed(net, lfw.faces, device, args.batch_size, args.flip, PRECISION[args.precision])
    except torch.OutOfMemoryError:
        raise InputError(f"{device} has too little memory for --batch-size {args.batch_size}; try a smaller "
                         "one.") from None
    pairs = lfw.pairs.judged()
    result = _verify(embeddings, lfw.pairs, args.subtract_mean)
    draws, = bootstrap(result.correct[None], pairs.identities[pairs.pairs], args.resamples, args.seed)
    points = [operating_point(result.similarities, pairs.same, far) for far in args.far if "tar" in args.protocol]
    return result, draws, points, (
        identify(embeddings, pairs.identities, args.seed) if "identification" in args.protocol else None)


def _verify(embeddings, pairs, subtract_mean):
    try:
        return verify(embeddings, pairs.pairs, pairs.same, pairs.folds, subtract_mean)
    except ValueError as error:
        raise InputError(f"the model's embeddings can't be compared: {error}; its training must have failed.") from None


def _parse(nets, argv):
    parser = script_parser(DESCRIPTION)
    _add_options(parser, nets)
    args = parser.parse_args(argv)
    if args.far and "tar" not in args.protocol:
        parser.error("--far belongs to the protocol tar; pass --protocol folds tar")
    args.far, args.net = args.far or [1e-3, 1e-2], args.net or [None]
    if not all(0 < far < 1 for far in args.far):
        parser.error("--far takes rates above 0 and below 1")
    if len(args.net) == 1:
        args.net *= len(args.model)
    for name, given in (("--net", args.net), ("--title", args.title or args.model)):
        if len(given) != len(args.model):
            parser.error(f"{name} was given {count_of(len(given), 'time~')} for {count_of(len(args.model), 'model~')}; "
                         "give it once per model")
    if args.save_threshold and (args.flip != "concatenate" or args.subtract_mean):
        parser.error("--save-threshold is for compare.py, which appends the flipped image's embedding and subtracts no "
                     "mean; leave out --flip and --subtract-mean")
    for file in args.model if args.save_threshold else []:
        if not os.access(threshold_path(file).parent, os.W_OK):
            raise InputError(f"--save-threshold can't write {threshold_path(file)}; copy the model to a folder of your "
                             "own.")
    if args.output:
        check_writable(args.output)    # now, so that a mistake does not surface after the work
    return args


def _add_options(parser, nets):
    group = parser.add_argument_group("data")
    group.add_argument("--lfw", type=path, required=True, metavar="DIR|FILE",
                       help="folder or zip of Name/Name_0001.jpg, or a .bin set of InsightFace (lfw, agedb_30, ...)")
    group.add_argument("--pairs", type=path, metavar="FILE",
                       help="pairs in LFW's format or as `path path 0|1` (default: pairs.txt in --lfw or beside it)")
    group.add_argument("--view", type=int, choices=(1, 2),
                       help="of LFW: 2 for reporting, 1 for development (default: by the files' names)")
    group.add_argument("--landmarks", type=path, metavar="FILE",
                       help="landmark list (default: the one of mtcnn/lfw_landmark.py; without one, MTCNN runs now)")
    group.add_argument("--aligned", action=BooleanOptionalAction, default=False,
                       help="the images are already aligned to 112x96 or 112x112")
    group = parser.add_argument_group("model")
    group.add_argument("--model", type=path, required=True, action="append", metavar="FILE|DIR",
                       help=f"{MODEL_HELP}; repeat it to compare further models with the first")
    add_options(group, nets, action="append")
    group.add_argument("--title", action="append", metavar="TEXT",
                       help="name of a model in pictures and of its folder in --output, once per --model")
    group = parser.add_argument_group("protocol")
    group.add_argument("--protocol", choices=PROTOCOLS, nargs="+", default=["folds"],
                       help="folds: accuracy, AUC and EER; tar: TAR at each --far; identification: rank 1, 5 and 10 "
                            "with one image of each person in the gallery (default: folds)")
    group.add_argument("--far", type=float, nargs="+", metavar="RATE",
                       help="false acceptance rates for the protocol tar (default: 1e-3 1e-2)")
    group.add_argument("--flip", choices=FLIP, default="concatenate",
                       help="how to use the flipped image's embedding: append it, add it, or do not compute it")
    group.add_argument("--subtract-mean", action=BooleanOptionalAction, default=False,
                       help="subtract the mean embedding of the training folds (not for identification)")
    group.add_argument("--resamples", type=at_least(1), default=1000, metavar="R",
                       help="bootstrap draws for the 95 %% confidence interval")
    group.add_argument("--seed", type=at_least(1), default=1, metavar="N", help="seed of the bootstrap and the gallery")
    group = parser.add_argument_group("machine and output")
    group.add_argument("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu")
    group.add_argument("--batch-size", type=at_least(1), metavar="N",
                       help="faces at a time; affects only the speed (default: 256, or 32 on a CPU)")
    group.add_argument("--precision", choices=tuple(PRECISION), default="float32",
                       help="bf16 is faster where the device supports it, but less exact")
    group.add_argument("--output", type=path, metavar="DIR",
                       help="folder for results.json, scores.tsv and pictures; several models get a folder each in it")
    group.add_argument("--save-threshold", action="store_true",
                       help="save the best threshold beside each model, where tools/compare.py finds it")
