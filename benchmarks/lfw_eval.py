"""Evaluate on LFW as this project does and as the textbook script does, by turns in one run; print times and agreement.

    python lfw_eval.py --lfw DIR --model FILE              the whole of LFW: half an hour on one core
    python lfw_eval.py --lfw DIR --model FILE --pairs 600  some of every fold, and the whole by arithmetic

The textbook script takes each pair by itself: both images are read and aligned, they and their mirror images go through
the network as it was trained in one call of four, in float32. Both start from the same landmarks. Without a model the
network is untrained, which costs the same time. Threads are torch's: set OMP_NUM_THREADS.
"""
import argparse
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cosFace.net import NETS
from faces.align import load_face
from faces.device import keep_large_blocks, pick_device
from faces.files import InputError, command
from faces.landmarks import default_list
from faces.verification.bootstrap import bootstrap
from faces.verification.embed import embed, optimized_copy
from faces.verification.evaluate import PRECISION
from faces.verification.lfw import landmarks_of, load_faces
from faces.verification.metrics import identify, operating_point, verify
from faces.verification.pairs import read_pairs
from faces.verification.weights import add_options as add_model_options
from faces.verification.weights import load_weights

TURNS = 6
FLOP = 3.5e9  # of one image through the network: two for each product of the definition, however they are computed
SIMILARITY, ACCURACY = 1e-5, 5e-4  # what float32 may differ by


def textbook(net, root, paths, points, pairs, device):
    """Embed pairs one by one: float32 (P, 2, 1024), each image's embedding with its mirror image's behind it."""
    embeddings = []
    with torch.no_grad():
        for pair in pairs:
            faces = [load_face(root / paths[i], points[i]) for i in pair]
            images = np.stack([image for face in faces for image in (face, face[:, ::-1])]).transpose(0, 3, 1, 2)
            batch = (torch.from_numpy(np.ascontiguousarray(images, np.float32)) - 127.5) / 128
            embeddings.append(net(batch.to(device)).reshape(2, -1).cpu().numpy())
    return np.stack(embeddings)


def ours(net, root, paths, points, device, dtype):
    """Embed images as lfw_eval.py does: float32 (N, 1024), and the seconds that reading and aligning took."""
    start = time.perf_counter()
    faces = load_faces(root, paths, points)
    seconds = time.perf_counter() - start
    return embed(net, faces, device, dtype=dtype, progress=False), seconds


def sample(pairs, count):
    """Return `count` pairs spread evenly over all of them, with the images they name and no others."""
    rows = np.unique(np.linspace(0, len(pairs.same) - 1, count).astype(int))
    used, index = np.unique(pairs.pairs[rows], return_inverse=True)
    return pairs._replace(paths=[pairs.paths[i] for i in used], pairs=index.reshape(-1, 2), same=pairs.same[rows],
                          folds=pairs.folds[rows], identities=pairs.identities[used])


def race(net, args, pairs, points, device):
    """Take turns over a part of the pairs and of the images at a time.

    Returns:
        float32 (P, 2, 1024) and (N, 1024), embeddings; float64 (TURNS, 4), seconds of a pair of the textbook's, of an
        image of ours, of that the reading, and of a product of two 1024 x 1024 matrices; seconds of preparing the
        network, which lfw_eval.py does once.
    """
    theirs, own, times = [], [], []
    square = torch.ones(1024, 1024, device=device)
    start = time.perf_counter()
    fast = optimized_copy(net, device, PRECISION[args.precision])
    preparing = time.perf_counter() - start
    for rows, images in zip(np.array_split(pairs.pairs, TURNS), np.array_split(np.arange(len(points)), TURNS)):
        start = time.perf_counter()
        theirs.append(textbook(net, args.lfw, pairs.paths, points, rows, device))
        middle = time.perf_counter()
        part, reading = ours(fast, args.lfw, [pairs.paths[i] for i in images], points[images], device,
                             PRECISION[args.precision])
        own.append(part)
        end = time.perf_counter()
        (square @ square).sum().item()
        times.append(((middle - start) / len(rows), (end - middle) / len(images), reading / len(images),
                      time.perf_counter() - end))
        print(f"turn {len(times)} of {TURNS}: textbook {4 / times[-1][0]:.1f}, ours {2 / times[-1][1]:.1f} forward "
              "passes/s", file=sys.stderr)
    return np.concatenate(theirs), np.concatenate(own), np.array(times), preparing


def protocol_seconds(embeddings, pairs):
    """Return the seconds of all that follows the embeddings: folds, bootstrap, TAR, identification."""
    start = time.perf_counter()
    result = verify(embeddings, pairs.pairs, pairs.same, pairs.folds)
    folds = time.perf_counter()
    bootstrap(result.correct[None], pairs.identities[pairs.pairs])
    operating_point(result.similarities, pairs.same, 1e-3)
    identify(embeddings, pairs.identities)
    return folds - start, time.perf_counter() - folds


@command
def main(argv=None):
    args = _parse(argv)
    device = pick_device(args.device)
    keep_large_blocks(device)   # as lfw_eval.py does; of both: it is the process's
    whole = read_pairs(args.lfw)
    pairs = sample(whole, args.pairs or len(whole.same))
    points = landmarks_of(args.landmarks or default_list(args.lfw, "lfw_landmark.txt"), pairs.paths)
    net = NETS[args.net]().to(device)
    if args.model:
        load_weights(net, args.model, args.channels)
    net.eval()
    ours(net, args.lfw, pairs.paths[:64], points[:64], device, torch.float32)  # first calls are slow
    textbook(net, args.lfw, pairs.paths, points, pairs.pairs[:4], device)
    theirs, own, times, preparing = race(net, args, pairs, points, device)
    expected = verify(theirs.reshape(2 * len(theirs), -1), np.arange(2 * len(theirs)).reshape(-1, 2), *pairs[2:4])
    found = verify(own, pairs.pairs, pairs.same, pairs.folds)
    folds, rest = protocol_seconds(np.random.default_rng(0).normal(size=(len(whole.paths), own.shape[1])), whole)
    report(args, device, whole, pairs, times, preparing, folds, rest)
    change = abs(found.similarities - expected.similarities).max()
    moved = found.accuracy - expected.accuracy
    print(f"agreement    similarities within {change:.1e}, accuracy {expected.accuracy:.4f} and {found.accuracy:.4f}")
    if args.precision == "float32" and not (change <= SIMILARITY and abs(moved) <= ACCURACY):
        raise InputError(f"the two disagree by more than {SIMILARITY:g} or {ACCURACY:g}; tell the authors.")


def report(args, device, whole, pairs, times, preparing, folds, rest):
    """Print what was measured, and from it the time of the whole of LFW."""
    pair, image, reading, product = np.median(times, 0)
    textbook_whole = times[:, 0] * len(whole.same)
    ours_whole = preparing + times[:, 1] * len(whole.paths) + folds
    ratios = textbook_whole / ours_whole  # of each turn, so that a machine that slows down harms both alike
    how = "measured" if len(pairs.same) == len(whole.same) else "extrapolated from these rates"
    print(f"device       {device}, {torch.get_num_threads()} threads, {processor()}, torch {torch.__version__}\n"
          f"measured     {len(pairs.same)} pairs of {len(pairs.paths)} images, medians of {TURNS} turns\n"
          f"textbook     {2 / pair:6.2f} images/s, {1 / pair:.2f} pairs/s; at {4 * FLOP / pair / 1e9:.1f} GFLOP/s\n"
          f"ours         {1 / image:6.2f} images/s in {args.precision}; at "
          f"{2 * FLOP / (image - reading) / 1e9:.1f} GFLOP/s, had it made all products of the definition\n"
          f"             reading and aligning take {reading / image:.1%} of it\n"
          f"machine      {2 * 1024 ** 3 / product / 1e9:.1f} GFLOP/s in products of 1024 x 1024 matrices\n"
          f"whole LFW    {len(whole.same)} pairs of {len(whole.paths)} images, {how}: textbook "
          f"{np.median(textbook_whole):.0f} s, ours {np.median(ours_whole):.0f} s\n"
          f"ratio        {np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f} by turn), of it "
          f"{2 * len(whole.same) / len(whole.paths):.2f} because each distinct image is embedded once\n"
          f"protocol     {folds:.2f} s for the ten folds, {rest:.2f} s for bootstrap, TAR and identification")


def processor():
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lfw", type=Path, required=True, metavar="DIR", help="folder of Name/Name_0001.jpg")
    parser.add_argument("--landmarks", type=Path, metavar="FILE",
                        help="list by mtcnn/lfw_landmark.py (default: the one it wrote for this folder)")
    parser.add_argument("--model", type=Path, metavar="FILE", help="checkpoint (default: an untrained network)")
    add_model_options(parser, NETS)
    parser.add_argument("--pairs", type=int, metavar="N", help="take so many pairs only, 300 or more (default: all)")
    parser.add_argument("--precision", choices=tuple(PRECISION), default="float32",
                        help="ours; bf16 shows what it changes (default: float32)")
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu (default: auto)")
    args = parser.parse_args(argv)
    if args.pairs is not None and args.pairs < 300:
        parser.error("--pairs must be at least 300")
    return args


if __name__ == "__main__":
    sys.exit(main())
