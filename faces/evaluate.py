"""Measure networks on a verification set: the command behind both lfw_eval.py, and the function of a training run."""
import argparse
import time
from pathlib import Path

import numpy as np
import torch

from faces import report
from faces.bootstrap import bootstrap
from faces.embed import MIRROR, default_batch_size, embed
from faces.errors import InputError, command
from faces.lfw import load_lfw
from faces.protocols import identify, operate
from faces.run import keep_large_blocks, pick_device
from faces.verify import verify
from faces.weights import CHANNELS, load_weights

PRECISION = {"float32": torch.float32, "bf16": torch.bfloat16}
PROTOCOLS = ("folds", "tar", "identification")


def evaluate(net, lfw, device, mirror="concatenate", subtract_mean=False, batch_size=None, dtype=torch.float32,
             progress=True):
    """Run the k-fold protocol on a network.

    Args:
        net: module, (B, 3, 112, 96) to (B, D); it stays as it is.
        lfw: faces.lfw.Lfw, loaded once and used as often as wanted.
        mirror, batch_size, dtype, progress: see faces.embed.
        subtract_mean: see faces.verify.

    Returns:
        faces.verify.Verification.

    Raises:
        InputError: the network's embeddings are not finite, or zero.
    """
    return _verify(embed(net, lfw.faces, device, batch_size, mirror, dtype, progress), lfw.pairs, subtract_mean)


@command
def main(net_module, method):
    """Run lfw_eval.py.

    Args:
        net_module: module with NETS, a dict from a network's name to its constructor.
        method: "CosFace" or "SphereFace", for the words.
    """
    args = _parse(net_module, method)
    started = time.monotonic()
    if args.output:
        _make_folder(args.output)  # before the work, not after it
    device = pick_device(args.device)
    keep_large_blocks(device)
    args.batch_size = args.batch_size or default_batch_size(device)
    nets = [net_module.NETS[name]() for name in args.net]
    loaded = [load_weights(net, path, args.channels) for net, path in zip(nets, args.model)]
    lfw = load_lfw(args.lfw, args.pairs, args.landmarks, args.aligned, device, args.view)
    if "identification" in args.protocol:
        _check_names(args, lfw.pairs)
    models = []
    for path, name, net, weights in zip(args.model, args.net, nets, loaded):
        result, draws, operating, identification = _measure(args, net, device, lfw)
        models.append(report.Measured(str(path), name, weights["method"] or method, weights, result, draws, operating,
                                      identification, time.monotonic() - started))
        print(report.table(models[-1], lfw, args.protocol, args.mirror), end="\n\n" if len(args.model) > 1 else "\n")
        started = time.monotonic()
    if len(models) > 1:
        print(report.comparison_lines(report.compare(models)))
    if args.output:
        report.write(args.output, models, lfw, {**_plain(vars(args)), "device": str(device)})


def _measure(args, net, device, lfw):
    """Return (faces.verify.Verification, bootstrap draws, Operating points, Identification or None) of a network."""
    try:
        embeddings = embed(net, lfw.faces, device, args.batch_size, args.mirror, PRECISION[args.precision])
    except torch.OutOfMemoryError:
        raise InputError(f"--batch-size {args.batch_size} is too much for {device}; try a smaller one.") from None
    pairs = lfw.pairs.judged()
    result = _verify(embeddings, lfw.pairs, args.subtract_mean)
    draws, = bootstrap(result.correct[None], pairs.identities[pairs.pairs], args.resamples, args.seed)
    operating = [operate(result.similarities, pairs.same, far) for far in args.far if "tar" in args.protocol]
    identification = (identify(embeddings, pairs.identities, args.seed) if "identification" in args.protocol else None)
    return result, draws, operating, identification


def _verify(embeddings, pairs, subtract_mean):
    try:
        return verify(embeddings, pairs.pairs, pairs.same, pairs.folds, subtract_mean)
    except ValueError as error:
        raise InputError(f"the model's embeddings can't be compared: {error}; the training must have failed.") from None


def _check_names(args, pairs):
    if not pairs.named:
        raise InputError(f"{args.lfw} does not say who is on its images, so --protocol identification can't be run; "
                         "leave it out or give a folder of people.")
    if (np.bincount(pairs.identities) >= 2).sum() < 2:
        raise InputError(f"the pairs of {args.lfw} name fewer than two people with two images or more, so --protocol "
                         "identification can't be run; leave it out.")


def _parse(net_module, method):
    parser = argparse.ArgumentParser(
        description=f"Measure a {method} model on LFW by its ten folds: each face and its mirror image are embedded "
                    "once, pairs are compared by cosine, and each fold is judged with the threshold that is best on "
                    "the others. Other sets and protocols by the options below.")
    _add_data(parser.add_argument_group("data"))
    _add_model(parser.add_argument_group("model"), tuple(net_module.NETS))
    _add_protocol(parser.add_argument_group("protocol"))
    machine = parser.add_argument_group("machine and output")
    machine.add_argument("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu (default: auto)")
    machine.add_argument("--batch-size", type=_positive, metavar="N",
                         help="faces at a time, 1 to whatever fits; changes the speed only (default: 256, on a CPU "
                              "32)")
    machine.add_argument("--precision", choices=tuple(PRECISION), default="float32",
                         help="bf16 is faster where the device has it, and rounds more (default: float32)")
    machine.add_argument("--output", type=Path, metavar="DIR",
                         help="folder for results.json, scores.tsv, roc.png, cmc.png of an identification, "
                              "histogram.png and errors.png, the hardest pairs; of several models each gets a folder "
                              "in it")
    args = parser.parse_args()
    args.net = args.net or ["faceNet"]
    if len(args.net) == 1:
        args.net *= len(args.model)
    if len(args.net) != len(args.model):
        parser.error(f"--net was given {len(args.net)} times for {len(args.model)} models; once, or once for each")
    return args


def _add_data(group):
    group.add_argument("--lfw", type=Path, required=True, metavar="DIR|FILE",
                       help="folder of Name/Name_0001.jpg; or a .bin set of InsightFace (lfw, agedb_30, cfp_fp, calfw, "
                            "cplfw)")
    group.add_argument("--pairs", type=Path, metavar="FILE",
                       help="pairs in LFW's format (default: pairs.txt in --lfw or beside it)")
    group.add_argument("--view", type=int, choices=(1, 2),
                       help="2 for reporting: the folds of pairs.txt; 1 for development: the threshold from "
                            "pairsDevTrain.txt, the accuracy on pairsDevTest.txt (default: by the files' names, 2 "
                            "where there are both)")
    group.add_argument("--landmarks", type=Path, metavar="FILE",
                       help="list by mtcnn/lfw_landmark.py (default: the one it wrote for this folder; without one, "
                            "MTCNN finds the landmarks now)")
    group.add_argument("--aligned", action=argparse.BooleanOptionalAction, default=False,
                       help="the images are faces aligned already, 112x96 or 112x112; no landmarks are used")


def _add_model(group, nets):
    group.add_argument("--model", type=Path, required=True, action="append", metavar="FILE",
                       help="checkpoint.pt of casia_train.py, or a public checkpoint of the same network; give --model "
                            "again to compare others with the first")
    group.add_argument("--net", choices=nets, action="append",
                       help="faceNet has batch normalisation; sphere20a is the paper's net without it (default: "
                            "faceNet); once, or once for each --model")
    group.add_argument("--channels", choices=CHANNELS,
                       help="order of the channels the model was trained with (default: rgb for checkpoints of this "
                            "project, bgr for any other, as the released ones are)")


def _add_protocol(group):
    group.add_argument("--protocol", choices=PROTOCOLS, nargs="+", default=["folds"],
                       help="one or several: folds, accuracy with AUC and EER; tar, the true acceptance rate at each "
                            "--far; identification, rank 1, 5 and 10 with a gallery of one image for each person of "
                            "two or more (default: folds)")
    group.add_argument("--far", type=_rate, nargs="+", default=[1e-3, 1e-2], metavar="RATE",
                       help="false acceptance rates of the protocol tar, above 0 and below 1; LFW's 3,000 impostor "
                            "pairs resolve 4e-4 at best (default: 1e-3 1e-2)")
    group.add_argument("--mirror", choices=MIRROR, default="concatenate",
                       help="what becomes of the mirror image's embedding: put behind the face's own, added to it, "
                            "or not computed, in half the time (default: concatenate)")
    group.add_argument("--subtract-mean", action=argparse.BooleanOptionalAction, default=False,
                       help="take the mean embedding of the training folds from every embedding; identification does "
                            "without (default: no)")
    group.add_argument("--resamples", type=_positive, default=1000, metavar="R",
                       help="draws of the bootstrap behind the 95 %% interval; 10,000 takes a second or two "
                            "(default: 1000)")
    group.add_argument("--seed", type=_positive, default=1, metavar="N",
                       help="of the bootstrap and of the gallery (default: 1)")


def _positive(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
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
    """Return a command line's options as JSON can hold them."""
    return {name: [str(item) for item in value] if name == "model" else str(value) if isinstance(value, Path) else value
            for name, value in settings.items()}


def _make_folder(path):
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"can't write to --output {path}: {error.strerror}; name a folder.") from None
