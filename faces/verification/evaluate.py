"""Evaluate networks on a verification set: the command behind both lfw_eval.py, and the function that training uses."""
import argparse
import os
import time
from pathlib import Path

import torch

from faces.device import keep_large_blocks, pick_device
from faces.files import InputError, check_writable, command
from faces.text import count_of
from faces.verification import report
from faces.verification.bootstrap import bootstrap
from faces.verification.embed import MIRROR, default_batch_size, embed
from faces.verification.lfw import load_lfw
from faces.verification.metrics import identify, operating_point, verify
from faces.verification.threshold import choose_threshold, save_threshold, threshold_path
from faces.verification.weights import MODEL_HELP, add_channels_option, announce, load_net, model_file

PRECISION = {"float32": torch.float32, "bf16": torch.bfloat16}
PROTOCOLS = ("folds", "tar", "identification")
MAX_RESAMPLES = 100_000


def evaluate(net, lfw, device, mirror="concatenate", subtract_mean=False, batch_size=None, dtype=torch.float32,
             progress=True):
    """Run the k-fold protocol on a network.

    Args:
        net: module, (B, 3, 112, 96) to (B, D); left unchanged.
        lfw: faces.verification.lfw.Lfw; load it once and use it as often as needed.
        mirror, batch_size, dtype, progress: see faces.verification.embed.embed.
        subtract_mean: see faces.verification.metrics.verify.

    Returns:
        faces.verification.metrics.Verification.

    Raises:
        InputError: the network's embeddings are not finite, or are zero.
    """
    return _verify(embed(net, lfw.faces, device, batch_size, mirror, dtype, progress), lfw.pairs, subtract_mean)


@command
def main(nets, method, find_landmarks=None, argv=None):
    """Run lfw_eval.py.

    Args:
        nets: dict from a network's name to its constructor.
        method: "CosFace" or "SphereFace", for messages.
        find_landmarks: see faces.verification.lfw.load_lfw.
        argv: command line arguments; None takes sys.argv.
    """
    args = _parse(nets, method, argv)
    started = time.monotonic()
    _check_outputs(args)  # now, so that a mistake does not surface after the work
    device = pick_device(args.device)
    keep_large_blocks(device)
    args.batch_size = args.batch_size or default_batch_size(device)
    models = [load_net(path, nets, name, args.channels) for path, name in zip(args.model, args.net)]
    for path, (_, loaded) in zip(args.model, models):
        announce(path, loaded)
    lfw = load_lfw(args.lfw, args.pairs, args.landmarks, args.aligned, args.view, find_landmarks, device,
                   "identification" in args.protocol)
    if "identification" in args.protocol:
        _check_names(args, lfw.pairs)
    measured = []
    for title, path, (net, loaded) in zip(_titles(args, models, method), args.model, models):
        result, draws, operating_points, identification = _measure(args, net, device, lfw)
        measured.append(report.Measured(title, str(path), loaded["net"], loaded["method"] or method, loaded, result,
                                        draws, operating_points, identification, time.monotonic() - started))
        print(report.table(measured[-1], lfw, args.protocol, args.mirror))
        if args.save_threshold:
            pairs = lfw.pairs.judged()
            source = f"{count_of(len(pairs.same), 'pair~')} of {args.lfw}"
            best = choose_threshold(result.similarities, pairs.same, source)
            save_threshold(path, loaded["fingerprint"], best)
            print(f"threshold with the highest accuracy, {best.value:.4f}: {threshold_path(path)}")
        if len(models) > 1:
            print()
        started = time.monotonic()
    if len(measured) > 1:
        print(report.comparison_lines(report.compare(measured)))
    if args.output:
        report.write(args.output, measured, lfw, {**_plain(vars(args)), "device": str(device)})
        print(f"results: {args.output}")


def _titles(args, models, method):
    """Return the title of each model: --title; else, among several, the name of the run's folder or of the file."""
    if args.title:
        return args.title
    if len(models) == 1:
        (_, loaded), = models
        return [f"{loaded['method'] or method} {loaded['net']}"]
    files = [model_file(path).absolute() for path in args.model]
    return [file.parent.name if file.name.startswith("checkpoint") else file.stem for file in files]


def _measure(args, net, device, lfw):
    """Return (Verification, bootstrap draws, list of OperatingPoint, Identification or None) of a network."""
    try:
        embeddings = embed(net, lfw.faces, device, args.batch_size, args.mirror, PRECISION[args.precision])
    except torch.OutOfMemoryError:
        raise InputError(f"{device} has too little memory for --batch-size {args.batch_size}; try a smaller "
                         "one.") from None
    pairs = lfw.pairs.judged()
    result = _verify(embeddings, lfw.pairs, args.subtract_mean)
    draws, = bootstrap(result.correct[None], pairs.identities[pairs.pairs], args.resamples, args.seed)
    fars = args.far if "tar" in args.protocol else []
    identification = identify(embeddings, pairs.identities, args.seed) if "identification" in args.protocol else None
    return result, draws, [operating_point(result.similarities, pairs.same, far) for far in fars], identification


def _verify(embeddings, pairs, subtract_mean):
    try:
        return verify(embeddings, pairs.pairs, pairs.same, pairs.folds, subtract_mean)
    except ValueError as error:
        raise InputError(f"the model's embeddings can't be compared: {error}; its training must have failed.") from None


def _check_names(args, pairs):
    if not pairs.named:
        raise InputError(f"{args.lfw} does not name the people on its images, which --protocol identification needs; "
                         "leave that out or pass a folder of people.")
    if pairs.people_with_several() < 2:
        raise InputError(f"{args.lfw} has fewer than two people with two images or more, so --protocol identification "
                         "can't be run; leave it out.")


def _parse(nets, method, argv):
    parser = argparse.ArgumentParser(
        description=f"Evaluate a {method} model on LFW with the standard 10-fold protocol: each face and its mirror "
                    "image are embedded, pairs are compared by cosine similarity, and each fold is classified with "
                    "the threshold that is best on the other nine. The options below select other sets and protocols.")
    _add_data_options(parser.add_argument_group("data"))
    _add_model_options(parser.add_argument_group("model"), tuple(nets))
    _add_protocol_options(parser.add_argument_group("protocol"))
    _add_machine_options(parser.add_argument_group("machine and output"))
    args = parser.parse_args(argv)
    if args.far and "tar" not in args.protocol:
        parser.error("--far belongs to the protocol tar; pass --protocol folds tar")
    args.far, args.net = args.far or [1e-3, 1e-2], args.net or [None]
    if len(args.net) == 1:
        args.net *= len(args.model)
    if len(args.net) != len(args.model):
        parser.error(f"--net was given {count_of(len(args.net), 'time~')} for "
                     f"{count_of(len(args.model), 'model~')}; give it once, or once per "
                     "model")
    if args.title and len(args.title) != len(args.model):
        parser.error(f"--title was given {count_of(len(args.title), 'time~')} for "
                     f"{count_of(len(args.model), 'model~')}; give it once per model")
    return args


def _add_data_options(group):
    group.add_argument("--lfw", type=Path, required=True, metavar="DIR|FILE",
                       help="folder of Name/Name_0001.jpg; or a .bin set of InsightFace (lfw, agedb_30, cfp_fp, calfw, "
                            "cplfw)")
    group.add_argument("--pairs", type=Path, metavar="FILE",
                       help="pairs in LFW's format (default: pairs.txt in --lfw or beside it)")
    group.add_argument("--view", type=int, choices=(1, 2),
                       help="2 for reporting: the folds of pairs.txt; 1 for development: the threshold from "
                            "pairsDevTrain.txt, the accuracy on pairsDevTest.txt (default: by the files' names; 2 if "
                            "there are both)")
    group.add_argument("--landmarks", type=Path, metavar="FILE",
                       help="landmark list (default: the one that mtcnn/lfw_landmark.py wrote for this folder; without "
                            "one, MTCNN detects the landmarks now)")
    group.add_argument("--aligned", action=argparse.BooleanOptionalAction, default=False,
                       help="the images are already aligned to 112x96 or 112x112; no landmarks are used")


def _add_model_options(group, nets):
    group.add_argument("--model", type=Path, required=True, action="append", metavar="FILE|DIR",
                       help=f"{MODEL_HELP}; repeat --model to compare further models with the first")
    group.add_argument("--net", choices=nets, action="append",
                       help="network that the model must have, once, or once per --model; not needed, because the file "
                            "says which it has")
    add_channels_option(group)
    group.add_argument("--title", action="append", metavar="TEXT",
                       help="name of a model in pictures and of its folder in --output, once per --model (default: the "
                            "name of the run's folder if there are several models, else method and network)")


def _add_protocol_options(group):
    group.add_argument("--protocol", choices=PROTOCOLS, nargs="+", default=["folds"],
                       help="one or several of: folds, the accuracy with AUC and EER; tar, the true acceptance rate "
                            "at each --far; identification, rank 1, 5 and 10 over all images of people with two or "
                            "more, one of each in the gallery (default: folds)")
    group.add_argument("--far", type=_rate, nargs="+", metavar="RATE",
                       help="false acceptance rates for the protocol tar, above 0 and below 1; the 3,000 impostor "
                            "pairs of LFW resolve 4e-4 at best (default: 1e-3 1e-2)")
    group.add_argument("--mirror", choices=MIRROR, default="concatenate",
                       help="how to use the embedding of the mirror image: append it, add it, or do not compute it, "
                            "which takes half the time (default: concatenate)")
    group.add_argument("--subtract-mean", action=argparse.BooleanOptionalAction, default=False,
                       help="subtract the mean embedding of the training folds from every embedding, except for "
                            "identification (default: no)")
    group.add_argument("--resamples", type=_resamples, default=1000, metavar="R",
                       help=f"bootstrap samples for the 95 %% confidence interval, 1 to {MAX_RESAMPLES:,}; 10,000 take "
                            "a second or two (default: 1000)")
    group.add_argument("--seed", type=_positive, default=1, metavar="N",
                       help="seed of the bootstrap and of the gallery, at least 1 (default: 1)")


def _add_machine_options(group):
    group.add_argument("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu (default: auto)")
    group.add_argument("--batch-size", type=_positive, metavar="N",
                       help="faces at a time, at least 1; affects only the speed (default: 256, or 32 on a CPU)")
    group.add_argument("--precision", choices=tuple(PRECISION), default="float32",
                       help="bf16 is faster where the device supports it, but less exact (default: float32)")
    group.add_argument("--output", type=Path, metavar="DIR",
                       help="folder for results.json, scores.tsv, roc.png, histogram.png, errors.png (the hardest "
                            "pairs) and, for identification, cmc.png; with several models, each gets a folder of its "
                            "own in it")
    group.add_argument("--save-threshold", action="store_true",
                       help="save the threshold with the highest accuracy on these pairs, and its error counts, beside "
                            "each model as MODEL.threshold.json, where tools/compare.py finds them")


def _positive(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _resamples(text):
    if _positive(text) > MAX_RESAMPLES:
        raise argparse.ArgumentTypeError(f"{text} is more than {MAX_RESAMPLES:,}")
    return int(text)


def _rate(text):
    try:
        rate = float(text)
    except ValueError:
        rate = 0
    if not 0 < rate < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a rate above 0 and below 1")
    return rate


def _plain(settings):
    """Return the options of a command line in a form that JSON can hold."""
    return {name: [str(item) for item in value] if name == "model" else str(value) if isinstance(value, Path) else value
            for name, value in settings.items()}


def _check_outputs(args):
    if args.save_threshold and (args.mirror != "concatenate" or args.subtract_mean):
        raise InputError("--save-threshold is for compare.py, which appends the mirror image's embedding and subtracts "
                         "no mean; leave out --mirror and --subtract-mean.")
    for path in args.model if args.save_threshold else []:
        if not os.access(threshold_path(path).parent, os.W_OK):
            raise InputError(f"--save-threshold can't write {threshold_path(path)}; copy the model to a folder of your "
                             "own.")
    if args.output:
        check_writable(args.output)
