"""Measure a network on LFW: the command behind both lfw_eval.py, and the function that a training run uses."""
import argparse
import time
from pathlib import Path

import torch

from faces import figures
from faces.embed import MIRROR, embed
from faces.errors import InputError, command
from faces.files import atomic_write, write_json
from faces.lfw import load_lfw
from faces.run import pick_device
from faces.verify import tar_at_far, verify
from faces.weights import CHANNELS, load_weights

PRECISION = {"float32": torch.float32, "bf16": torch.bfloat16}
FAR = 1e-3  # the lowest that 3,000 impostor pairs can speak of: three false acceptances


def evaluate(net, lfw, device, mirror="concatenate", subtract_mean=False, batch_size=256, dtype=torch.float32,
             progress=True):
    """Run the k-fold protocol on a network.

    Args:
        net: module, (B, 3, 112, 96) to (B, D), on `device`; its training mode is restored.
        lfw: faces.lfw.Lfw, loaded once and used as often as wanted.
        mirror, batch_size, dtype, progress: see faces.embed.
        subtract_mean: see faces.verify.

    Returns:
        faces.verify.Verification.

    Raises:
        InputError: the network's embeddings are not finite, or zero.
    """
    embeddings = embed(net, lfw.faces, device, batch_size, mirror, dtype, progress)
    try:
        return verify(embeddings, lfw.pairs.pairs, lfw.pairs.same, lfw.pairs.folds, subtract_mean)
    except ValueError as error:
        raise InputError(f"the model's embeddings can't be compared: {error}; the training must have failed.") from None


@command
def main(net_module, method):
    """Run lfw_eval.py.

    Args:
        net_module: module with NETS, a dict from a network's name to its constructor.
        method: "CosFace" or "SphereFace", for the words.
    """
    args = _parser(net_module, method).parse_args()
    started = time.monotonic()
    if args.output:
        _make_folder(args.output)  # before the work, not after it
    device = pick_device(args.device)
    net = net_module.NETS[args.net]()
    loaded = load_weights(net, args.model, args.channels)
    net.to(device, memory_format=torch.channels_last)
    lfw = load_lfw(args.lfw, args.pairs, args.landmarks, args.aligned, device)
    try:
        result = evaluate(net, lfw, device, args.mirror, args.subtract_mean, args.batch_size, PRECISION[args.precision])
    except torch.OutOfMemoryError:
        raise InputError(f"--batch-size {args.batch_size} is too much for {device}; try a smaller one.") from None
    seconds = time.monotonic() - started
    print(summary_line(result))
    print(_table(args, loaded["method"] or method, lfw, result, seconds))
    if args.output:
        _write(args, method, loaded, device, lfw, result, seconds)


def summary_line(result):
    """Return the line people know: mean accuracy, standard deviation over the folds (ddof=0), mean threshold."""
    return f"LFWACC={result.accuracy:.4f} std={result.std:.4f} thd={result.threshold:.4f}"


def _parser(net_module, method):
    parser = argparse.ArgumentParser(
        description=f"Measure a {method} model on LFW by its ten folds: each face and its mirror image are embedded "
                    "once, pairs are compared by cosine, and each fold is judged with the threshold that is best on "
                    "the others.")
    data = parser.add_argument_group("data")
    data.add_argument("--lfw", type=Path, required=True, metavar="DIR", help="folder of Name/Name_0001.jpg")
    data.add_argument("--pairs", type=Path, metavar="FILE",
                      help="pairs in LFW's format (default: pairs.txt in --lfw or beside it)")
    data.add_argument("--landmarks", type=Path, metavar="FILE",
                      help="list by mtcnn/lfw_landmark.py (default: the one it wrote for this folder; without one, "
                           "MTCNN finds the landmarks now)")
    data.add_argument("--aligned", action=argparse.BooleanOptionalAction, default=False,
                      help="the images are faces aligned already, 112x96 or 112x112; no landmarks are used")
    model = parser.add_argument_group("model")
    model.add_argument("--model", type=Path, required=True, metavar="FILE",
                       help="checkpoint.pt of casia_train.py, or a public checkpoint of the same network")
    model.add_argument("--net", choices=tuple(net_module.NETS), default="faceNet",
                       help="faceNet has batch normalisation; sphere20a is the paper's net without it (default: "
                            "faceNet)")
    model.add_argument("--channels", choices=CHANNELS,
                       help="order of the channels the model was trained with (default: rgb for checkpoints of this "
                            "project, bgr for any other, as the released ones are)")
    protocol = parser.add_argument_group("protocol")
    protocol.add_argument("--mirror", choices=MIRROR, default="concatenate",
                          help="what becomes of the mirror image's embedding: put behind the face's own, added to it, "
                               "or not computed, in half the time (default: concatenate)")
    protocol.add_argument("--subtract-mean", action=argparse.BooleanOptionalAction, default=False,
                          help="take the mean embedding of the training folds from every embedding (default: no)")
    machine = parser.add_argument_group("machine and output")
    machine.add_argument("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu (default: auto)")
    machine.add_argument("--batch-size", type=_positive, default=256, metavar="N",
                         help="faces at a time, 1 to whatever fits; changes the speed only (default: 256)")
    machine.add_argument("--precision", choices=tuple(PRECISION), default="float32",
                         help="bf16 is faster where the device has it, and rounds more (default: float32)")
    machine.add_argument("--output", type=Path, metavar="DIR",
                         help="folder for results.json, scores.tsv, roc.png and histogram.png")
    return parser


def _positive(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _make_folder(path):
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"can't write to --output {path}: {error.strerror}; name a folder.") from None


def _figures(result):
    return {"accuracy": result.accuracy, "std": result.std, "threshold": result.threshold, "auc": result.auc,
            "eer": result.eer, "tar_at_far_1e-3": tar_at_far(result.far, result.tar, FAR)}


def _table(args, method, lfw, result, seconds):
    genuine = int(lfw.pairs.same.sum())
    impostor = len(lfw.pairs.same) - genuine
    coarse = "" if impostor * FAR >= 1 else f" (of {impostor} impostor pairs, so none is accepted)"
    rows = [("model", f"{args.model} ({method}, {args.net})"),
            ("accuracy", f"{result.accuracy:.4f}"),
            ("standard deviation", f"{result.std:.4f} over {len(result.accuracies)} folds (ddof=0)"),
            ("AUC", f"{result.auc:.4f}"),
            ("EER", f"{result.eer:.4f}"),
            ("TAR@FAR=1e-3", f"{tar_at_far(result.far, result.tar, FAR):.4f}{coarse}"),
            ("pairs", f"{len(lfw.pairs.same)} ({genuine} genuine, {impostor} impostor)"),
            ("images", f"{len(lfw.faces)}, mirror image: {args.mirror}"),
            ("landmarks", lfw.landmarks),
            ("seconds", f"{seconds:.1f}")]
    return "\n".join(f"{name:<20}{value}" for name, value in rows)


def _write(args, method, loaded, device, lfw, result, seconds):
    pairs = lfw.pairs
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    write_json(args.output / "results.json", {
        "method": loaded["method"] or method, **_figures(result), "std_ddof": 0,
        "folds": [{"accuracy": float(a), "threshold": float(t)} for a, t in zip(result.accuracies, result.thresholds)],
        "counts": {"pairs": len(pairs.same), "genuine": int(pairs.same.sum()), "images": len(pairs.paths)},
        "settings": {**settings, "device": str(device), "weights": loaded, "landmarks": lfw.landmarks},
        "seconds": round(seconds, 2), "torch": str(torch.__version__)})
    with atomic_write(args.output / "scores.tsv", "w", encoding="utf-8") as file:
        file.write("left\tright\tsame\tfold\tsimilarity\n")
        for (a, b), same, fold, similarity in zip(pairs.pairs, pairs.same, pairs.folds, result.similarities):
            file.write(f"{pairs.paths[a]}\t{pairs.paths[b]}\t{int(same)}\t{fold}\t{similarity:.6f}\n")
    name = f"{loaded['method'] or method} {args.net}, AUC {result.auc:.4f}"
    figures.roc_picture(args.output / "roc.png", {name: (result.far, result.tar)})
    figures.histogram_picture(args.output / "histogram.png", result.similarities, pairs.same, result.threshold)
