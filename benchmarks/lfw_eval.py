"""Compare evaluation on LFW with the usual script: run both in turn, print their times and how closely they agree.

    python benchmarks/lfw_eval.py --lfw DIR --model FILE               the whole of LFW: half an hour on one core
    python benchmarks/lfw_eval.py --lfw DIR --model FILE --pairs 600   600 pairs from all folds, and an extrapolation

The reference is a script as most repositories write it. It processes one pair at a time in float32: it reads and aligns
both images, and passes them and their mirror images through the unmodified network in one batch of four. Ours is what
cosFace/lfw_eval.py runs. Both start from the same landmarks. Without --model, the network is untrained, which takes the
same time. The number of threads is torch's; set OMP_NUM_THREADS to change it.
"""
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from faces.signals import end_quietly

end_quietly(__name__)    # Ctrl-C during the slow imports below prints no traceback
import numpy as np
import torch

from cosFace.net import NETS
from faces.align import load_face
from faces.device import keep_large_blocks, pick_device, processor
from faces.files import InputError, command, script_parser
from faces.landmarks import default_list
from faces.verification.bootstrap import bootstrap
from faces.verification.embed import embed, optimized_copy
from faces.verification.evaluate import PRECISION
from faces.verification.lfw import landmarks_of, load_faces
from faces.verification.metrics import identify, operating_point, verify
from faces.verification.pairs import open_images, read_pairs
from faces.verification.weights import add_options as add_model_options
from faces.verification.weights import load_net

TURNS = 6
# Floating-point operations of one pass of one image through the network, two for each product of direct convolution.
# Winograd's algorithm needs fewer, so our GFLOP/s are those that direct convolution would need to be as fast.
FLOPS = 3.5e9
SIMILARITY_TOLERANCE, ACCURACY_TOLERANCE = 1e-5, 5e-4   # rounding in float32 changes the results by less than this


def embed_reference(net, root, paths, points, pairs, device):
    """Embed pairs one by one.

    Returns:
        float32 (P, 2, 1024), the concatenated embeddings of each image and its mirror image.
    """
    embeddings, source = [], open_images(root)
    with torch.no_grad():
        for pair in pairs:
            faces = [load_face(source.open(paths[i]), points[i]) for i in pair]
            images = np.stack([image for face in faces for image in (face, face[:, ::-1])]).transpose(0, 3, 1, 2)
            batch = (torch.from_numpy(np.ascontiguousarray(images, np.float32)) - 127.5) / 128
            embeddings.append(net(batch.to(device)).reshape(2, -1).cpu().numpy())
    return np.stack(embeddings)


def embed_ours(net, root, paths, points, device, dtype):
    """Embed images as cosFace/lfw_eval.py does.

    Returns:
        (float32 (N, 1024), seconds spent on reading and aligning).
    """
    start = time.perf_counter()
    faces = load_faces(root, paths, points)
    seconds = time.perf_counter() - start
    return embed(net, faces, device, dtype=dtype, progress=False), seconds


def sample(pairs, count):
    """Return `count` evenly spaced pairs, with only the images that occur in them."""
    rows = np.unique(np.linspace(0, len(pairs.same) - 1, count).astype(int))
    used, index = np.unique(pairs.pairs[rows], return_inverse=True)
    return pairs._replace(paths=[pairs.paths[i] for i in used], pairs=index.reshape(-1, 2), same=pairs.same[rows],
                          folds=pairs.folds[rows], identities=pairs.identities[used])


def race(net, args, pairs, points, device):
    """Run both in turn, each on a part of its pairs or images at a time.

    Returns:
        (reference embeddings, float32 (P, 2, 1024); our embeddings, float32 (N, 1024); times, float64 (TURNS, 4);
        seconds of preparing the network, which lfw_eval.py does once). The columns of the times are seconds per pair of
        the reference, per image of ours, of the latter for reading and aligning, and for the product of two 1024 x 1024
        matrices.
    """
    reference, ours, times = [], [], []
    square = torch.ones(1024, 1024, device=device)
    start = time.perf_counter()
    fast = optimized_copy(net, device, PRECISION[args.precision])
    preparing = time.perf_counter() - start
    for rows, images in zip(np.array_split(pairs.pairs, TURNS), np.array_split(np.arange(len(points)), TURNS)):
        start = time.perf_counter()
        reference.append(embed_reference(net, args.lfw, pairs.paths, points, rows, device))
        reference_end = time.perf_counter()
        embeddings, reading = embed_ours(fast, args.lfw, [pairs.paths[i] for i in images], points[images], device,
                                         PRECISION[args.precision])
        ours.append(embeddings)
        ours_end = time.perf_counter()
        (square @ square).sum().item()  # item() waits for the device
        times.append(((reference_end - start) / len(rows), (ours_end - reference_end) / len(images),
                      reading / len(images), time.perf_counter() - ours_end))
        print(f"turn {len(times)} of {TURNS}: reference {4 / times[-1][0]:.1f}, ours {2 / times[-1][1]:.1f} forward "
              "passes/s", file=sys.stderr)
    return np.concatenate(reference), np.concatenate(ours), np.array(times), preparing


def protocol_seconds(embeddings, pairs):
    """Return the seconds of the 10-fold protocol, and those of bootstrap, TAR and identification together."""
    start = time.perf_counter()
    result = verify(embeddings, pairs.pairs, pairs.same, pairs.folds)
    folds_end = time.perf_counter()
    bootstrap(result.correct[None], pairs.identities[pairs.pairs])
    operating_point(result.similarities, pairs.same, 1e-3)
    identify(embeddings, pairs.identities)
    return folds_end - start, time.perf_counter() - folds_end


@command
def main(argv=None):
    args = _parse(argv)
    device = pick_device(args.device)
    keep_large_blocks(device)   # as lfw_eval.py does; speeds up the reference as well, since it affects the process
    all_pairs = read_pairs(args.lfw)
    pairs = sample(all_pairs, args.pairs or len(all_pairs.same))
    points = landmarks_of(args.landmarks or default_list(args.lfw, "lfw_landmark.txt"), pairs.paths)
    net = load_net(args.model, NETS, args.net, args.channels)[0] if args.model else NETS[args.net or "faceNet"]()
    net = net.to(device).eval()
    load_faces(args.lfw, pairs.paths, points)    # brings all files into memory, so that neither waits for the disk
    embed_ours(net, args.lfw, pairs.paths[:64], points[:64], device, torch.float32)  # the first calls are slow
    embed_reference(net, args.lfw, pairs.paths, points, pairs.pairs[:4], device)
    reference, ours, times, preparing = race(net, args, pairs, points, device)
    count = 2 * len(reference)
    expected = verify(reference.reshape(count, -1), np.arange(count).reshape(-1, 2), pairs.same, pairs.folds)
    actual = verify(ours, pairs.pairs, pairs.same, pairs.folds)
    # The time of the protocol does not depend on the values of the embeddings.
    random = np.random.default_rng(0).normal(size=(len(all_pairs.paths), ours.shape[1]))
    report(args, device, all_pairs, pairs, times, preparing, *protocol_seconds(random, all_pairs))
    difference = abs(actual.similarities - expected.similarities).max()
    print(f"agreement    similarities within {difference:.1e}, accuracy {expected.accuracy:.4f} and "
          f"{actual.accuracy:.4f}")
    if args.precision == "float32" and not (difference <= SIMILARITY_TOLERANCE and
                                            abs(actual.accuracy - expected.accuracy) <= ACCURACY_TOLERANCE):
        raise InputError(f"ours differs from the reference by more than {SIMILARITY_TOLERANCE:g} in a similarity or "
                         f"{ACCURACY_TOLERANCE:g} in accuracy; please report this as a bug, with the output above.")


def report(args, device, all_pairs, pairs, times, preparing, folds, rest):
    """Print the measurements and the time for the whole of LFW that follows from them."""
    pair, image, reading, product = np.median(times, 0)
    reference_total = times[:, 0] * len(all_pairs.same)
    ours_total = preparing + times[:, 1] * len(all_pairs.paths) + folds
    ratios = reference_total / ours_total  # one per turn, so that a slowdown of the machine affects both
    how = "measured" if len(pairs.same) == len(all_pairs.same) else "extrapolated from these rates"
    print(f"device       {device}, {torch.get_num_threads()} threads, {processor()}, torch {torch.__version__}\n"
          f"measured     {len(pairs.same)} pairs of {len(pairs.paths)} images, medians of {TURNS} turns\n"
          f"reference    {2 / pair:6.2f} images/s, {1 / pair:.2f} pairs/s; {4 * FLOPS / pair / 1e9:.1f} GFLOP/s\n"
          f"ours         {1 / image:6.2f} images/s in {args.precision}; equivalent to "
          f"{2 * FLOPS / (image - reading) / 1e9:.1f} GFLOP/s of direct convolution\n"
          f"             reading and aligning take {reading / image:.1%} of the time\n"
          f"machine      {2 * 1024 ** 3 / product / 1e9:.1f} GFLOP/s in products of 1024 x 1024 matrices\n"
          f"whole LFW    {len(all_pairs.same)} pairs of {len(all_pairs.paths)} images, {how}: reference "
          f"{np.median(reference_total):.0f} s, ours {np.median(ours_total):.0f} s\n"
          f"ratio        {np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f} per turn), of which a "
          f"factor of {2 * len(all_pairs.same) / len(all_pairs.paths):.2f} is due to embedding each image only once\n"
          f"protocol     {folds:.2f} s for the 10 folds, {rest:.2f} s for bootstrap, TAR and identification")


def _parse(argv):
    parser = script_parser(__doc__)
    parser.add_argument("--lfw", type=Path, required=True, metavar="DIR", help="folder of Name/Name_0001.jpg")
    parser.add_argument("--landmarks", type=Path, metavar="FILE",
                        help="landmark list (default: the one that mtcnn/lfw_landmark.py wrote for this folder)")
    parser.add_argument("--model", type=Path, metavar="FILE", help="checkpoint (default: an untrained network)")
    add_model_options(parser, NETS)
    parser.add_argument("--pairs", type=int, metavar="N", help="use only this many pairs, at least 300 (default: all)")
    parser.add_argument("--precision", choices=tuple(PRECISION), default="float32",
                        help="precision of ours; bf16 shows how much it changes the results (default: float32)")
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu (default: auto)")
    args = parser.parse_args(argv)
    if args.pairs is not None and args.pairs < 300:
        parser.error("--pairs must be at least 300")
    return args


if __name__ == "__main__":
    sys.exit(main())
