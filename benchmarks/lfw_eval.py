"""Time evaluation on LFW against a script that embeds pair by pair, and check that the similarities are the same.

    python benchmarks/lfw_eval.py --lfw DIR --model FILE               the whole of LFW: half an hour per turn on a core
    python benchmarks/lfw_eval.py --lfw DIR --model FILE --pairs 600   600 pairs of all folds, and an extrapolation

Ours is what cosFace/lfw_eval.py runs. The peer is the script that most repositories have: for one pair after the other,
in float32, it reads and aligns both images, and passes them and their flipped images through the unmodified network as
a batch of four. Both start from the same landmarks. Without --model, the network is untrained, which takes the same
time. The protocol itself, after the embedding, takes a fraction of a second and is not timed.
"""
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import torch

from benchmarks.turns import check_same, in_turns, report
from cosFace.net import NETS
from faces.align import align
from faces.data.sources import open_photos
from faces.device import pick_device, tune_cpu
from faces.files import at_least, command, path, script_parser
from faces.images import read_image
from faces.landmarks import found_list, read_landmarks
from faces.verification.embed import embed
from faces.verification.lfw import load_lfw
from faces.verification.weights import load_net

# The type to compute in, and by how much a similarity may differ from the peer's
PRECISION = {"float32": (torch.float32, 1e-5), "bf16": (torch.bfloat16, 1e-2)}


def embed_pairs(net, images, pairs, device):
    """Embed pairs, int (P, 2), rows of `images`, (file, landmarks), one by one, as the peer; `net` is in eval mode on
    the device. Return the embeddings of each image and its flipped image, float32 (P, 2, 1024)."""
    embeddings = []
    with torch.no_grad():
        for pair in pairs:
            faces = [align(read_image(images[i][0]), images[i][1]) for i in pair]
            batch = np.stack([image for face in faces for image in (face, face[:, ::-1])]).transpose(0, 3, 1, 2)
            batch = (torch.from_numpy(np.ascontiguousarray(batch, np.float32)) - 127.5) / 128
            embeddings.append(net(batch.to(device)).reshape(2, -1).cpu().numpy())
    return np.stack(embeddings)


def cosine(pairs):
    """Return the cosine similarity of each pair of embeddings, (P, 2, D)."""
    a, b = (pairs / np.linalg.norm(pairs, axis=2, keepdims=True)).transpose(1, 0, 2)
    return (a * b).sum(1)


@command
def main(argv=None):
    args = _parse(argv)
    device, (dtype, tolerance) = pick_device(args.device), PRECISION[args.precision]
    tune_cpu(device)    # for the peer as well, since it affects the process
    net = load_net(args.model, NETS)[0] if args.model else NETS["faceNet"]()
    net = net.to(device).eval()
    source = open_photos(args.lfw)
    listed = args.landmarks or found_list(source, "lfw_landmark.txt")
    load_lfw(args.lfw, landmarks=listed)    # brings all files into memory, so that nothing waits for the disk
    start = time.perf_counter()
    lfw = load_lfw(args.lfw, landmarks=listed)
    loading = time.perf_counter() - start

    rows = np.unique(np.linspace(0, len(lfw.pairs.same) - 1, args.pairs or len(lfw.pairs.same)).astype(int))
    used, pairs = np.unique(lfw.pairs.pairs[rows], return_inverse=True)
    points = read_landmarks(listed, labeled=False, root=source.root)
    points = dict(zip(points.paths, points.points))
    images = [(source.open(name), points[name]) for name in (lfw.pairs.paths[i] for i in used)]
    pairs, found = pairs.reshape(-1, 2), {}
    embed_pairs(net, images, pairs[:4], device)    # the first calls are slow
    embed(net, lfw.faces[used[:64]], device, dtype=dtype, progress=False)

    def ours(turn):
        found["ours"] = embed(net, lfw.faces[used], device, dtype=dtype, progress=False)[pairs]

    def peer(turn):
        found["peer"] = embed_pairs(net, images, pairs, device)
    seconds = in_turns({"ours": ours, "peer": peer}, args.turns, device)
    _report(args, lfw, len(rows), len(used), loading, seconds, device)
    check_same("similarities", cosine(found["ours"]), cosine(found["peer"]), tolerance)


def _report(args, lfw, pairs, images, loading, seconds, device):
    """Print the seconds for the whole of LFW, which follow from those of the sample."""
    all_pairs, all_images = len(lfw.pairs.same), len(lfw.pairs.paths)
    whole = {f"ours, {args.precision}": [loading + value / images * all_images for value in seconds["ours"]],
             "pair by pair, float32": [value / pairs * all_pairs for value in seconds["peer"]]}
    print(f"{all_pairs:,} pairs of {all_images:,} images, from {pairs:,} pairs of {images:,} images: "
          + ", ".join(f"{name} {np.median(values):.0f} s" for name, values in whole.items())
          + f"; embedding each image only once makes a factor of {2 * all_pairs / all_images:.2f}")
    report(whole, all_pairs, "pairs", device)


def _parse(argv):
    parser = script_parser(__doc__)
    parser.add_argument("--lfw", type=path, required=True, metavar="DIR", help="folder of Name/Name_0001.jpg")
    parser.add_argument("--landmarks", type=path, metavar="FILE", help="list (default: mtcnn/lfw_landmark.py's)")
    parser.add_argument("--model", type=path, metavar="FILE", help="checkpoint (default: an untrained network)")
    parser.add_argument("--pairs", type=at_least(1), metavar="N", help="use only this many pairs (default: all)")
    parser.add_argument("--turns", type=at_least(1), default=3, help="turns of each")
    parser.add_argument("--precision", choices=PRECISION, default="float32", help="of ours")
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
