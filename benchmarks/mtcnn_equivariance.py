"""Measure how closely landmarks follow a face that is moved by a known similarity transform.

    python benchmarks/mtcnn_equivariance.py --lfw DIR              this repository and facenet-pytorch on 400 images
    python benchmarks/mtcnn_equivariance.py --lfw DIR --choices    also variants of this repository's pipeline

The true landmarks of a photo are not known to a fraction of a pixel, but it is known exactly how they must move. The
error is the distance between the landmarks found in a moved copy and those found in the photo and then moved, averaged
over the five points, in units of the distance between the eyes. The copies are shifted, resized, rotated, or all three;
all detectors see the same copies. Only the face nearest the center counts, if all detectors found it in the photo and
in the copies.

facenet-pytorch is skipped unless it was installed with `pip install --no-deps facenet-pytorch==2.6.0`.
"""
import importlib.util
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from faces.signals import end_quietly

end_quietly(__name__)    # Ctrl-C during the slow imports below prints no traceback
import cv2
import numpy as np
from tqdm import tqdm

from benchmarks.mtcnn import FACTOR, MIN_FACE, THRESHOLDS, facenet_on_images, read
from faces.files import InputError, command, folder, script_parser
from faces.images import list_images
from mtcnn import detector
from mtcnn.pyramid import Pyramid

# For each kind of copy: maximum shift in pixels, maximum factor of the size, maximum rotation in degrees.
MOVES = {"shifted 8 pixels": (8, 1, 0), "resized 0.8-1.25": (0, 1.25, 0), "rotated 10 degrees": (0, 1, 10),
         "all three": (8, 1.25, 10)}
BATCH = 32      # photos that are detected at a time, each with one copy of each kind


class FromTheImage(Pyramid):
    """Resizes each level from the image itself with area interpolation, like facenet-pytorch, not from the last one."""

    def __init__(self, image, *args):
        super().__init__(image, *args)
        self.levels[1:] = [cv2.resize(image, level.shape[1::-1], interpolation=cv2.INTER_AREA)
                           for level in self.levels[1:]]


class CropsOfTheImage(Pyramid):
    """Samples crops from the image itself, however much larger it is than the crop."""

    def __init__(self, *args):
        super().__init__(*args)
        self.scales = self.scales[:1]


class CropsOfWholePixels(Pyramid):
    """Rounds crops to whole pixels like the release, while the results still refer to the unrounded box."""

    def crop(self, box, target):
        x, y, size = round(box[0]), round(box[1]), max(1, round(box[2] - box[0]))
        super().crop((x, y, x + size, y + size), target)


def replacing(name, value):
    """Return a context in which `name` in the detector's module is replaced."""
    return lambda: patch.object(detector, name, value)


CHOICES = {"levels resized from the image": replacing("Pyramid", FromTheImage),
           "crops from the image": replacing("Pyramid", CropsOfTheImage),
           "crops of whole pixels": replacing("Pyramid", CropsOfWholePixels),
           "overlap 0.7 after R-Net": replacing("OVERLAP", (0.5, 0.7, 0.7, 0.7))}
FACTORS = (0.5, 0.794)      # one and three levels per halving of the side; the default has two


def detectors(choices):
    """Return, by name, functions from a list of images to the (boxes, landmarks) of each."""
    by_name = {"this repository": ours()}
    if importlib.util.find_spec("facenet_pytorch"):
        by_name["facenet-pytorch"] = facenet_on_images()
    if choices:
        by_name |= {f"  {name}": ours(context=context) for name, context in CHOICES.items()}
        by_name |= {f"  factor {factor}": ours(factor) for factor in FACTORS}
    return by_name


def ours(factor=FACTOR, context=nullcontext):
    """Return this repository's detector as a function of images, run inside `context`."""
    instance = detector.Detector(MIN_FACE, THRESHOLDS, factor, device="cpu")

    def detect(images):
        with context():
            return [(faces.boxes, faces.landmarks) for faces in instance.detect(images)]
    return detect


def move(image, limits, rng):
    """Return the image after a random move about its center, and the transform (2, 3) of its points."""
    shift, size, degrees = limits
    height, width = image.shape[:2]
    center = (width - 1) / 2, (height - 1) / 2
    matrix = cv2.getRotationMatrix2D(center, rng.uniform(-degrees, degrees), size ** rng.uniform(-1, 1))
    matrix[:, 2] += rng.uniform(-shift, shift, 2)
    return cv2.warpAffine(image, matrix, (width, height), borderMode=cv2.BORDER_REPLICATE), matrix


def face_nearest(center, faces):
    """Return the landmarks (5, 2) of the face whose box is nearest to a point; NaN if there is no face."""
    boxes, points = faces
    if not len(boxes):
        return np.full((5, 2), np.nan)
    return points[np.linalg.norm((boxes[:, :2] + boxes[:, 2:]) / 2 - center, axis=1).argmin()]


def errors(detect, photos, copies):
    """Return the errors for photos and their copies (lists of (image, transform)), float (N, kinds); NaN if no face."""
    images = [image for photo, moved in zip(photos, copies) for image in (photo, *(image for image, _ in moved))]
    detections, rows = iter(detect(images)), []
    for photo, moved in zip(photos, copies):
        center = np.array(photo.shape[1::-1]) / 2
        points = face_nearest(center, next(detections))
        row = []
        for _, matrix in moved:
            expected = points @ matrix[:, :2].T + matrix[:, 2]
            actual = face_nearest(matrix @ (*center, 1), next(detections))
            row.append(np.linalg.norm(actual - expected, axis=1).mean() / np.linalg.norm(expected[0] - expected[1]))
        rows.append(row)
    return np.array(rows)


@command
def main(argv=None):
    parser = script_parser(__doc__)
    parser.add_argument("--lfw", type=Path, required=True, metavar="DIR", help="folder of LFW, with Name/Name_0001.jpg")
    parser.add_argument("--images", type=int, default=400, metavar="N",
                        help="number of images, spread over LFW (default: 400)")
    parser.add_argument("--choices", action="store_true", help="also measure variants of the pipeline, one at a time")
    args = parser.parse_args(argv)
    root = folder(args.lfw, "LFW images as Name/Name_0001.jpg")
    paths = list_images(root)
    if not paths:
        raise InputError(f"{root} contains no images; pass the folder that holds Name/Name_0001.jpg.")
    if args.images < 1:
        raise InputError(f"--images {args.images} is out of range; it must be at least 1.")
    count = min(args.images, len(paths))
    paths = [str(root / paths[i * len(paths) // count]) for i in range(count)]
    rng, by_name = np.random.default_rng(0), {name: (detect, []) for name, detect in detectors(args.choices).items()}
    for start in tqdm(range(0, count, BATCH), unit=" batches", disable=None):
        photos = [read(path) for path in paths[start:start + BATCH]]
        copies = [[move(photo, limits, rng) for limits in MOVES.values()] for photo in photos]
        for detect, rows in by_name.values():
            rows.append(errors(detect, photos, copies))
    report({name: np.concatenate(rows) for name, (_, rows) in by_name.items()})


def report(by_name):
    """Print the mean and the 95th percentile of each detector's errors over the faces that all detectors found."""
    found_by_all = np.isfinite(np.array(list(by_name.values()))).all((0, 2))             # (N,)
    print(f"equivariance error in eye distances, mean and 95th percentile of {found_by_all.sum()} faces")
    print(f"{'':32}" + "".join(f"{kind:>20}" for kind in MOVES) + "   not found")
    for name, values in by_name.items():
        cells = zip(values[found_by_all].mean(0), np.percentile(values[found_by_all], 95, axis=0))
        print(f"{name:32}" + "".join(f"{mean:>12.4f} {high:.4f} " for mean, high in cells)
              + f"{np.isnan(values).any(1).sum():>11}")


if __name__ == "__main__":
    main()
