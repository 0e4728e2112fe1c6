"""Evaluate a model on IJB-B or IJB-C, 1:1 and 1:N.

    python tools/ijb_eval.py --model FILE --ijb IJBC

IJBC is the folder of InsightFace's release, with loose_crop/ and meta/. The same command continues a run that was
killed. See docs/evaluation.md for what the options and figures mean.
"""
import sys
import time
from argparse import BooleanOptionalAction
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import torch

from cosFace.net import NETS
from faces import files
from faces.align import align_all
from faces.data.sources import Folder
from faces.device import pick_device, pick_dtype, tune_cpu
from faces.files import RUNS, InputError, at_least, check_writable, command, path, script_parser, write_json
from faces.images import summarize
from faces.rows import Rows
from faces.verification import ijb
from faces.verification.embed import embed, optimized_copy
from faces.verification.weights import add_model_options, announce, load_net
from mtcnn.search import prefetch

PART = 1024    # images at a time; a killed run repeats the last part


def aligned_parts(folder: Folder, found: ijb.Ijb, first: int):
    """Yield the aligned faces of PART images at a time, uint8 (n, 112, 96, 3), from image number `first` on."""
    for start in range(first, len(found.images), PART):
        names = found.images[start:start + PART]
        # Like InsightFace, align faces of any pose; otherwise, some profiles would be refused.
        faces, _, bad = align_all(folder, names, found.points[start:start + PART], any_pose=True)
        _refuse([(names[row], reason) for row, reason in bad], folder)
        yield faces


def _refuse(bad, folder):
    if bad:
        raise InputError(f"{len(bad):,} of the images in {folder} can't be used ({summarize(bad)}); unpack the release "
                         "again, because a verification set must be complete.")


def embed_images(args, net, fingerprint: str, found: ijb.Ijb, device) -> np.ndarray:
    """Return the embeddings of all images, float32 (N, D), mapped from a file in --output that grows part by part and
    whose name holds a digest of all that they depend on."""
    folder, dtype, width = Folder(found.folder), pick_dtype(args.precision, device), net.fc5.out_features
    versions, extent = folder.versions(found.images), np.ptp(found.points, 1).max(1)
    _refuse([(name, "no such file" if size < 0 else "its landmarks coincide") for name, (size, _), pixels
             in zip(found.images, versions, extent) if size < 0 or not 0 < pixels < np.inf], folder)
    depends = fingerprint, args.flip, str(dtype), found.images, found.points.tobytes(), versions.tobytes()
    rows, count = Rows(args.output / found.prefix, depends, np.dtype((np.float32, width))), len(found.images)
    first = len(rows.read())
    first -= first % PART if first < count else 0
    rows.truncate(first)
    net = optimized_copy(net, device, dtype, count)    # not anew for each part
    with files.progress_bar(desc="embedding", total=count - first, unit=" images", disable=first == count) as bar:
        for faces in prefetch(aligned_parts(folder, found, first)):
            part = embed(net, faces, device, args.batch_size, args.flip, dtype, progress=False)
            if not np.isfinite(part).all():
                raise InputError(f"the embeddings of {args.model} are not finite; its training must have failed.")
            rows.append(part)
            bar.update(len(part))
    return rows.read()


def table(figures: dict) -> str:
    """Return the content of results.json as a table in text."""
    used = "flip {flip}, image norms {image_norms}, detector score {detector_score}".format(**figures["settings"])
    counts = ", ".join(f"{number:,} {kind}" for kind, number in figures["counts"].items() if number)
    rows = [(figures["set"], counts), ("templates", used)]
    if verified := figures["1:1"]:
        few = {True: "", False: "; too few to resolve this rate"}
        rows += [(f"TAR@FAR=1e{np.log10(point['far']):.0f}", "{tar:.4f} at threshold {threshold:.4f}, {accepted:,} of "
                  "{impostors:,} impostor pairs".format(**point) + few[point["resolved"]]) for point in verified["tar"]]
        rows.append(("AUC", f"{verified['auc']:.6f}"))
    if found := figures["1:N"]:
        rows.append(("1:N", "  ".join(f"{convention:<11}" for convention in found)))
        rows += [(name + str(key), "".join(f"{result[part][key]:<13.4f}" for result in found.values()))
                 for part, name in (("rank", "rank "), ("tpir", "TPIR@FPIR=")) for key in found["NIST"][part]]
    return "\n".join(f"{name:<20}{value}".rstrip() for name, value in rows)


@command
def main(argv=None):
    args, started = _parse(argv), time.monotonic()
    device = pick_device(args.device)
    tune_cpu(device)
    net, loaded = load_net(args.model, NETS, args.net, args.channels)
    announce(args.model, loaded)
    found, notes = ijb.read_ijb(args.ijb, args.protocol)
    name, counts, complete = f"IJB-{found.prefix[-1].upper()}", found.counts(), ijb.COMPLETE[found.prefix]
    if short := [f"{n:,} of {full:,} {kind}" for n, full, kind in zip(counts, complete, ijb.KINDS) if 0 < n != full]:
        notes.append(f"this is not the complete {name}: {', '.join(short)}")
    print("".join(f"{args.ijb}: {note}\n" for note in notes), end="", file=sys.stderr)
    with files.locked(args.output / ".lock", f"writing into {args.output}", wait=False):
        embeddings = embed_images(args, net, loaded["fingerprint"], found, device)
        templates = ijb.form_templates(embeddings, found, args.image_norms == "unit", args.detector_score)
        figures = {"set": name, "notes": notes, "counts": dict(zip(ijb.KINDS, counts)),
                   "1:1": ijb.verify_pairs(templates, found.pairs, found.same) if len(found.pairs) else None,
                   "1:N": ijb.identify(templates, found.probes, found.galleries) if found.galleries else None,
                   "settings": {**vars(args), "device": str(device), "net": loaded["net"], "weights": loaded},
                   "seconds": round(time.monotonic() - started, 2), "torch": str(torch.__version__)}
        write_json(args.output / "results.json", figures)
    print(f"{table(figures)}\nresults: {args.output}")


def _parse(argv):
    parser = script_parser(__doc__)
    add_model_options(parser, NETS)
    add = parser.add_argument
    add("--ijb", type=path, required=True, metavar="DIR", help="folder IJBB or IJBC of InsightFace's release")
    add("--output", type=path, metavar="DIR", help="folder for results.json and embeddings (default: one in runs/ijb)")
    add("--protocol", choices=ijb.PROTOCOLS, nargs="+", default=ijb.PROTOCOLS, help="what to evaluate (default: both)")
    add("--flip", choices=("sum", "none"), default="sum", help="what to do with the flipped image's embedding")
    add("--image-norms", choices=("keep", "unit"), default="keep", help="norms of the embeddings in a template")
    add("--detector-score", action=BooleanOptionalAction, default=True, help="weight images by the detector's score")
    add("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu")
    add("--batch-size", type=at_least(1), metavar="N", help="faces at a time (default: 256, or 32 on a CPU)")
    add("--precision", choices=("float32", "bf16"), default="float32", help="bf16 is faster on GPUs, but less exact")
    args = parser.parse_args(argv)
    model = args.model.absolute().parent if args.model.stem == "checkpoint" else args.model.absolute()
    name = model.name if model.is_dir() else model.stem    # the name of a folder may have dots, too
    args.output = args.output or RUNS / "ijb" / f"{name}-{args.ijb.absolute().name}"
    check_writable(args.output)    # now, so that a mistake does not surface after the work
    return args


if __name__ == "__main__":
    sys.exit(main())
