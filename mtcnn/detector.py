"""Detect faces and their five landmarks with MTCNN, a cascade of three networks (arXiv:1604.02878), in batches.

    python mtcnn/detector.py PHOTO... --output DIR

draws the faces it finds on the photos and lists them in DIR/faces.json. In Python: `Detector().detect(images)`.

Coordinates in this package are distances from the upper left corner of the image: pixel k covers k to k + 1, a box is
the rectangle that its network sees, and its width is x2 - x1. No coordinate is ever rounded. The authors' release
counts pixels from 1, adds or subtracts 1 in places, truncates fractions, and uses the requested scale of a resized
image although sizes are rounded to whole pixels. That shifts its boxes by a fraction of a pixel of the resized image,
which is up to a twelfth of the face at the far border.
"""
import os
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from faces.signals import end_quietly

end_quietly(__name__)    # Ctrl-C during the slow imports below prints no traceback
import cv2
import numpy as np
import torch
from tqdm import tqdm

from faces.device import exact_float32, pick_device, to_input
from faces.files import InputError, atomic_write, check_writable, command, script_parser, write_json
from faces.images import UnreadableImage
from faces.text import count_of, printable
from mtcnn.boxes import nms, nms_of_smaller, regress, squares
from mtcnn.inputs import IMAGE_TYPES, as_rgb
from mtcnn.nets import load_nets
from mtcnn.processes import in_processes, start_method
from mtcnn.pyramid import CELL, Pyramid

STRIDE = 2                   # pixels between neighboring cells of P-Net
# Overlap above which the less certain of two boxes is suppressed: in one level of P-Net, over all levels, after R-Net,
# and after O-Net. The release uses 0.7 after R-Net, so O-Net sees each face several times, and its landmarks differ
# more than they should. With 0.3, landmarks follow the face more closely (benchmarks/mtcnn_equivariance.py), and O-Net
# takes a third of the time; but 2 % of the faces are lost, small or partly covered ones in the background.
OVERLAP = (0.5, 0.7, 0.3, 0.7)
# Pixels that a network processes at once. On a CPU, its largest layers then fit in the cache; on a GPU, they take
# 320 MB, which is enough to keep it busy.
MAX_PIXELS = {"cpu": 50_000, "gpu": 2_000_000}
GROUP_PIXELS = 8_000_000     # pixels of the images that are searched together
MAX_BATCH = 32               # images per batch for a worker process, at most
ORANGE, BLUE = (230, 159, 0), (86, 180, 233)    # of the palette in faces/plots.py


class Faces(NamedTuple):
    """The faces in one image, in order of decreasing score.

    boxes: float32 (n, 4), x1, y1, x2, y2; pixel k covers k to k + 1; may reach beyond the image.
    scores: float32 (n,), probability of a face.
    landmarks: float32 (n, 5, 2), image-left eye, image-right eye, nose, left and right corner of the mouth. The center
        of pixel k is at k, as in cv2.warpAffine and faces.align.
    """
    boxes: np.ndarray
    scores: np.ndarray
    landmarks: np.ndarray


class Detector:
    """MTCNN face detector.

    Args:
        min_face_size: smallest face to look for, in pixels. The time is roughly proportional to 1 / min_face_size ** 2.
        thresholds: minimum probabilities of a face for P-Net, R-Net and O-Net.
        factor: scale between neighboring images of the pyramid, 0 to 1; the default halves the area.
        device: where the networks run; default "auto", the best available, see faces.device.pick_device().
    """

    def __init__(self, min_face_size=20, thresholds=(0.6, 0.7, 0.7), factor=0.709, device="auto"):
        if min_face_size <= 0 or not 0 < factor < 1 or len(thresholds) != 3:
            raise ValueError("min_face_size must be above 0, factor between 0 and 1, and there must be three "
                             "thresholds")
        self.min_face_size, self.thresholds, self.factor = min_face_size, tuple(thresholds), factor
        self.device = pick_device(device or "auto")
        self.max_pixels = MAX_PIXELS["cpu" if self.device.type == "cpu" else "gpu"]
        self.nets = load_nets(self.device)

    def __getstate__(self):
        """Return everything but the networks; each process loads its own, because a GPU's memory can't be pickled."""
        return {name: value for name, value in vars(self).items() if name != "nets"}

    def __setstate__(self, state):
        vars(self).update(state)
        self.nets = load_nets(self.device)

    def detect(self, images, thresholds=None, workers=0):
        """Detect the faces in a list of images, or in one image.

        Args:
            images: a list of images of any sizes, or one image: uint8 RGB (H, W, 3) or gray (H, W), as an array or a
                tensor; a PIL image; or the path of a file. Equal sizes are fastest. The result of an image does not
                depend on the others. Files are read when needed and rotated by their EXIF orientation; a PIL image is
                taken as it is.
            thresholds: used instead of the detector's own.
            workers: worker processes for a list; 0 or 1 uses only this process. For hundreds of images, one per core
                is fastest, or up to 8 that share a GPU. With a GPU, and on systems other than Linux, a script then
                needs `if __name__ == "__main__":`, because each process imports it.

        Returns:
            A list of Faces, or a single Faces; n = 0 if no face was found, or if the image has no pixels.

        Raises:
            faces.images.UnreadableImage: a file can't be read; the message starts with its path.
            ValueError: something is not an image.
            faces.files.InputError: a worker process died.
        """
        if isinstance(images, IMAGE_TYPES):
            return self.detect([images], thresholds)[0]
        if workers > 1 and len(images) > 1:
            detect, method = partial(self.detect, thresholds=thresholds), start_method(self.device)
            images = [image if isinstance(image, (str, Path)) else as_rgb(image) for image in images]
            batch_size = min(MAX_BATCH, -(-len(images) // (4 * workers)))
            return [faces for batch in in_processes(detect, images, batch_size, workers, method) for faces in batch]
        results = []
        for group in groups(map(as_rgb, images), lambda image: image.shape[0] * image.shape[1]):
            results += self.cascade(group, thresholds or self.thresholds)
        return results

    @torch.inference_mode()
    def cascade(self, images, thresholds):
        """Return the Faces in each of several images, uint8 (H, W, 3)."""
        pyramids = [Pyramid(image, self.min_face_size, self.factor) for image in images]
        with exact_float32(self.device):
            boxes, image_index = self.propose(pyramids, thresholds[0])
            boxes, image_index = self.refine(pyramids, boxes, image_index, thresholds[1])
            boxes, image_index, scores, points = self.locate(pyramids, boxes, image_index, thresholds[2])
        rows_of_image = [image_index == i for i in range(len(pyramids))]
        return [Faces(boxes[rows], scores[rows], points[rows] - np.float32(0.5)) for rows in rows_of_image]

    def propose(self, pyramids, threshold):
        """Run stage one, P-Net, on all levels; return proposed boxes (n, 4) and the index of their images, int (n,)."""
        same_size = {}
        for i, pyramid in enumerate(pyramids):
            same_size.setdefault(pyramid.size, []).append(i)
        candidates = []  # a tuple of arrays for each run of P-Net
        for (height, width), members in same_size.items():
            for level, (rows, columns, _) in enumerate(map(np.shape, pyramids[members[0]].searched())):
                scale = np.array((width / columns, height / rows) * 2, np.float32)
                for part, top, batch in self.batches([pyramids[i].searched()[level] for i in members]):
                    index, corner, scores, offsets = self.pnet_cells(batch, threshold)
                    if not len(index):  # keeping thousands of small arrays alive would fragment the heap
                        continue
                    corner[:, 1] += top
                    candidates.append((np.array(members)[part][index], np.full(len(index), level), corner, scores,
                                       offsets, np.broadcast_to(scale, (len(index), 4))))
        if not candidates:
            return np.empty((0, 4), np.float32), np.empty(0, int)
        image_index, level, corner, scores, offsets, scale = map(np.concatenate, zip(*candidates))
        # Suppress overlapping cells of one level first; the shift keeps levels from overlapping. Corners are integers
        # here, so that neighbors that overlap by exactly 0.5 are treated alike: all of them are kept.
        shifted = np.array((level * (2 + CELL + corner.max(initial=0)), 0 * level)).T + corner
        keep = nms(np.concatenate((shifted, shifted + CELL), 1).astype(np.float64), scores, image_index, OVERLAP[0])
        boxes = np.concatenate((corner, corner + CELL), 1).astype(np.float32) * scale
        keep = keep[nms(boxes[keep], scores[keep], image_index[keep], OVERLAP[1])]
        return regress(boxes[keep], offsets[keep]), image_index[keep]

    def batches(self, images):
        """Split images of one size into inputs for P-Net: several images, or a strip of one.

        Yields:
            (slice of the images, first row, uint8 (n, h, w, 3)).
        """
        rows, columns, _ = images[0].shape
        size = self.max_pixels // (rows * columns) or 1
        for start in range(0, len(images), size):
            part = slice(start, start + size)
            for top, bottom in strips(rows, columns, self.max_pixels):
                yield part, top, np.stack([image[top:bottom] for image in images[part]])

    def pnet_cells(self, batch, threshold):
        """Run P-Net on uint8 (n, h, w, 3); return index, corner (n, 2), x and y, scores, offsets of passing cells."""
        probability, features = self.nets.pnet(self.network_input(batch))
        index, row, column = cells = torch.nonzero(probability >= threshold, as_tuple=True)
        corner = torch.stack((column, row), 1) * STRIDE
        tensors = index, corner, probability[cells], self.nets.pnet.offsets(features[cells])
        return [tensor.cpu().numpy() for tensor in tensors]

    def refine(self, pyramids, boxes, image_index, threshold):
        """Run stage two, R-Net; return the proposals that pass, with refined boxes."""
        boxes, image_index = squares(boxes, image_index, [pyramid.size for pyramid in pyramids])
        scores, offsets = self.classify(self.nets.rnet, pyramids, boxes, image_index, 24)
        passed = np.flatnonzero(scores > threshold)
        keep = passed[nms(boxes[passed], scores[passed], image_index[passed], OVERLAP[2])]
        return regress(boxes[keep], offsets[keep]), image_index[keep]

    def locate(self, pyramids, boxes, image_index, threshold):
        """Run stage three, O-Net; return boxes, image_index, scores and landmarks, an image's by decreasing score."""
        boxes, image_index = squares(boxes, image_index, [pyramid.size for pyramid in pyramids])
        scores, offsets, points = self.classify(self.nets.onet, pyramids, boxes, image_index, 48)
        keep = np.flatnonzero(scores > threshold)
        boxes, image_index, scores = boxes[keep], image_index[keep], scores[keep]
        corner, size = boxes[:, None, :2], boxes[:, None, 2:] - boxes[:, None, :2]
        points = corner + points[keep] * size  # relative to the box that O-Net saw, before it is refined
        boxes = regress(boxes, offsets[keep])
        keep = nms_of_smaller(boxes, scores, image_index, OVERLAP[3])
        return boxes[keep], image_index[keep], scores[keep], points[keep]

    def classify(self, net, pyramids, boxes, image_index, size):
        """Run R-Net or O-Net on square boxes resampled to `size`; return its outputs as arrays, one row per box."""
        outputs, chunk = [], max(1, self.max_pixels // size ** 2)
        for start in range(0, max(1, len(boxes)), chunk):  # without boxes, one empty run gives the right shapes
            part = slice(start, start + chunk)
            batch = np.empty((len(boxes[part]), size, size, 3), np.uint8)
            for i, box, target in zip(image_index[part], boxes[part].tolist(), batch):
                pyramids[i].crop(box, target)
            outputs.append([tensor.cpu().numpy() for tensor in net(self.network_input(batch))])
        return map(np.concatenate, zip(*outputs))

    def network_input(self, batch):
        """Turn uint8 (N, H, W, 3) into float (N, 3, H, W) in the device's memory format, (x - 127.5) / 128."""
        return to_input(torch.from_numpy(batch).to(self.device))


def groups(items, pixels):
    """Yield lists of items with about GROUP_PIXELS pixels in total, counted by pixels(item); items are read lazily."""
    group, total = [], 0
    for item in items:
        group.append(item)
        total += pixels(item)
        if total >= GROUP_PIXELS:
            yield group
            group, total = [], 0
    if group:
        yield group


def strips(rows, columns, pixels):
    """Split an image of even height into strips (top, bottom) of about `pixels`, such that P-Net sees every cell once.

    Neighboring strips overlap by the size of a cell minus its stride.
    """
    height = max(CELL, pixels // columns // STRIDE * STRIDE)
    return [(top, min(top + height, rows)) for top in range(0, rows - CELL + STRIDE, height - CELL + STRIDE)]


def add_options(parser, auto="the best available"):
    """Add the options for make_detector() to a parser; `auto` says which device that is."""
    parser.add_argument("--min-face-size", type=float, default=20, metavar="PIXELS",
                        help="smallest face to look for, at least 4 and below 10000 (default: 20); doubling it is up "
                             "to four times as fast")
    parser.add_argument("--device", default="auto", help=f"auto (default: {auto}), cpu, cuda, cuda:1, mps")


def make_detector(args, device=None):
    """Return the Detector that the options ask for, on `device` instead of args.device if it is given.

    Raises:
        InputError: an option is out of range, or the device is not available.
    """
    if not 4 <= args.min_face_size < 10000:
        raise InputError(f"--min-face-size {args.min_face_size:g} is out of range; it must be at least 4 and below "
                         "10000.")
    # oneDNN compiles a convolution for each size of image and keeps 1,024 of them, which is no faster than 64 and makes
    # gaps in memory grow for long. It reads this variable when it is used for the first time.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    return Detector(args.min_face_size, device=pick_device(device or args.device))


def draw(image, faces):
    """Return a copy of an image with boxes, scores and landmarks drawn on it, as in images/detection.png."""
    image = image.copy()
    thickness = max(1, round(max(image.shape) / 500))
    scale = 0.45 * thickness
    for box, score, points in zip(*faces):
        x1, y1, x2, y2 = np.rint(box).astype(int).tolist()
        cv2.rectangle(image, (x1, y1), (x2, y2), (0, 0, 0), thickness + 2)
        cv2.rectangle(image, (x1, y1), (x2, y2), ORANGE, thickness)
        text = f"{score:.3f}"
        (width, height), below = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, thickness)
        x, y = max(0, x1), max(y1 - below, height + below)  # inside the image, even if the box is not
        cv2.rectangle(image, (x, y - height - below), (x + width, y + below), (0, 0, 0), cv2.FILLED)
        cv2.putText(image, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, scale, (255, 255, 255), thickness, cv2.LINE_AA)
        for point in points:
            center = np.rint(point).astype(int).tolist()
            cv2.circle(image, center, 2 * thickness + 1, (0, 0, 0), cv2.FILLED, cv2.LINE_AA)
            cv2.circle(image, center, 2 * thickness, BLUE, cv2.FILLED, cv2.LINE_AA)
    return image


def output_names(photos):
    """Return different file names for the drawings: a photo's own, with a number appended if another photo has it."""
    names, taken = [], set()    # in lower case, because some disks ignore case
    for photo in photos:
        name, number = f"{photo.stem}.png", 1
        while name.lower() in taken:
            number += 1
            name = f"{photo.stem}-{number}.png"
        names.append(name)
        taken.add(name.lower())
    return names


@command
def main(argv=None):
    parser = script_parser(__doc__)
    parser.add_argument("photos", type=Path, nargs="+", metavar="PHOTO", help="image files of any size; those that "
                        "can't be read are skipped and listed")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for drawings and faces.json")
    add_options(parser)
    args = parser.parse_args(argv)
    detector, names = make_detector(args), output_names(args.photos)
    overwritten = {photo.resolve() for photo in args.photos} & {(args.output / name).resolve() for name in names}
    if overwritten:
        raise InputError(f"a drawing would overwrite the photo {overwritten.pop()}; choose another --output.")
    check_writable(args.output)
    listing, skipped = [], []
    for photo, name in zip(tqdm(args.photos, unit=" images", disable=None), names):
        try:
            image = as_rgb(photo)
        except UnreadableImage as error:
            skipped.append(str(error))
            continue
        faces = detector.detect(image)
        with atomic_write(args.output / name) as file:
            file.write(cv2.imencode(".png", draw(image, faces)[..., ::-1])[1].tobytes())
        listing.append({"photo": str(photo), "drawing": name, "faces": [
            {"score": float(score), "box": box.tolist(), "landmarks": points.tolist()}
            for box, score, points in zip(*faces)]})
    for reason in skipped:
        print(f"skipped {printable(reason)}", file=sys.stderr)
    if not listing:
        raise InputError("no photo can be read; pass image files.")
    write_json(args.output / "faces.json", listing)
    count = sum(len(entry["faces"]) for entry in listing)
    print(f"{count_of(count, 'face~')} in {count_of(len(listing), 'photo~')}, {len(skipped):,} skipped: {args.output}")


if __name__ == "__main__":
    main()
