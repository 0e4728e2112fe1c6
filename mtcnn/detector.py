"""Detect faces and their five landmarks with MTCNN, a cascade of three networks (arXiv:1604.02878).

    python mtcnn/detector.py PHOTO|DIR... --output DIR

draws the faces it finds on the photos and lists them in DIR/faces.json. In Python: `Detector().detect(images)`.
"""
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cv2
import numpy as np
import torch
from joblib import cpu_count

from faces import files
from faces.device import exact_float32, pick_device, to_input
from faces.files import InputError, at_least, atomic_write, command, count_of, path, script_parser, write_json
from faces.images import UnreadableImage, is_image, read_image, scan_images
from mtcnn.boxes import nms, nms_of_smaller, regress, squares
from mtcnn.nets import load_nets
from mtcnn.pyramid import CELL, Pyramid

STRIDE = 2                   # pixels between neighboring cells of P-Net
# NMS thresholds: within a level of P-Net, across levels, after R-Net, after O-Net. The release has 0.7 after R-Net;
# with 0.3, landmarks are more accurate and O-Net takes a third of the time, but 2 % of the faces, small ones, are lost.
NMS = (0.5, 0.7, 0.3, 0.7)
# Pixels that a network processes at once: few enough for a CPU's cache, enough to keep a GPU busy (320 MB).
CPU_PIXELS, GPU_PIXELS = 50_000, 2_000_000
GROUP_PIXELS = 8_000_000     # pixels of the images that are searched together
BLACK, ORANGE, BLUE = (0, 0, 0), (230, 159, 0), (86, 180, 233)


class Faces(NamedTuple):
    """The faces in one image, in order of decreasing score, float32."""
    boxes: np.ndarray        # (n, 4), x1, y1, x2, y2; pixel k covers k to k + 1; may reach beyond the image
    scores: np.ndarray       # (n,), probability of a face
    landmarks: np.ndarray    # (n, 5, 2), eyes, nose, mouth corners, image-left first; the center of pixel k is at k


class Detector:
    """MTCNN face detector, for faces of at least min_face_size pixels; half of that takes four times as long.

    The thresholds are minimum probabilities of a face for P-Net, R-Net and O-Net; `factor` is the scale between
    neighboring images of the pyramid, of which the default halves the area.
    """

    def __init__(self, min_face_size: float = 20, thresholds=(0.6, 0.7, 0.7), factor: float = 0.709,
                 device: torch.device | str = "auto"):
        if min_face_size <= 0 or not 0 < factor < 1 or len(thresholds) != 3:
            raise ValueError("min_face_size must be above 0, factor between 0 and 1; and pass three thresholds")
        self.min_face_size, self.thresholds, self.factor = min_face_size, tuple(thresholds), factor
        self.device = pick_device(device)
        self.max_pixels = CPU_PIXELS if self.device.type == "cpu" else GPU_PIXELS
        self.nets = load_nets(self.device)

    def __reduce__(self):    # a process that gets a copy loads the networks anew, because a GPU's memory isn't pickled
        return type(self), (self.min_face_size, self.thresholds, self.factor, self.device)

    def detect(self, images, thresholds=None) -> "list[Faces] | Faces":
        """Return the Faces in each of a list of images, or in one image, which are as for faces.images.read_image():
        paths, bytes of files, PIL images, uint8 RGB (H, W, 3), ... UnreadableImage, a ValueError, names the file.
        `thresholds` replace the detector's own."""
        if is_image(images):
            return self.detect([images], thresholds)[0]
        together = groups(map(read, images), lambda image: image[..., 0].size)
        return [faces for group in together for faces in self.cascade(group, thresholds or self.thresholds)]

    @torch.inference_mode()
    def cascade(self, images: list, thresholds) -> list[Faces]:
        """Return the Faces in each of several images, uint8 (H, W, 3)."""
        pyramids = [Pyramid(image, self.min_face_size, self.factor) for image in images]
        with exact_float32(self.device), torch.autocast(self.device.type, enabled=False):
            boxes, owner = self.propose(pyramids, thresholds[0])
            boxes, owner, scores, offsets = self.classify(self.nets.rnet, 24, pyramids, boxes, owner, thresholds[1])
            keep = nms(boxes, scores, owner, NMS[2])
            boxes, owner = regress(boxes[keep], offsets[keep]), owner[keep]
            boxes, owner, scores, offsets, points = self.classify(self.nets.onet, 48, pyramids, boxes, owner,
                                                                  thresholds[2])
        points = boxes[:, None, :2] + points * (boxes[:, None, 2:] - boxes[:, None, :2])    # before boxes are refined
        boxes = regress(boxes, offsets)
        keep = nms_of_smaller(boxes, scores, owner, NMS[3])
        rows_of_image = [keep[owner[keep] == i] for i in range(len(pyramids))]
        return [Faces(boxes[rows], scores[rows], points[rows] - np.float32(0.5)) for rows in rows_of_image]

    def propose(self, pyramids, threshold):
        """Run stage one, P-Net, on all levels; return boxes (n, 4) and the index of their image, int (n,)."""
        same_size = {}
        for i, pyramid in enumerate(pyramids):
            same_size.setdefault(pyramid.size, []).append(i)
        candidates = []  # a tuple of arrays for each run of P-Net
        for (height, width), members in same_size.items():
            for level, (rows, columns, _) in enumerate(map(np.shape, pyramids[members[0]].searched)):
                scale = np.array((width / columns, height / rows) * 2, np.float32)
                for part, top, batch in self.batches([pyramids[i].searched[level] for i in members]):
                    index, corner, scores, offsets = self.pnet_cells(batch, threshold)
                    if not len(index):  # keeping thousands of small arrays alive would fragment the heap
                        continue
                    corner[:, 1] += top
                    candidates.append((np.array(members)[part][index], np.full(len(index), level), corner, scores,
                                       offsets, np.broadcast_to(scale, (len(index), 4))))
        if not candidates:
            return np.empty((0, 4), np.float32), np.empty(0, int)
        owner, level, corner, scores, offsets, scale = map(np.concatenate, zip(*candidates))
        # Suppress overlapping cells of one level first; the shift keeps levels from overlapping. Corners are integers
        # here, so that neighbors that overlap by exactly 0.5 are treated alike: all of them are kept.
        shifted = np.array((level * (2 + CELL + corner.max(initial=0)), 0 * level)).T + corner
        keep = nms(np.concatenate((shifted, shifted + CELL), 1).astype(np.float64), scores, owner, NMS[0])
        boxes = np.concatenate((corner, corner + CELL), 1).astype(np.float32) * scale
        keep = keep[nms(boxes[keep], scores[keep], owner[keep], NMS[1])]
        return regress(boxes[keep], offsets[keep]), owner[keep]

    def batches(self, images):
        """Yield inputs for P-Net of images of one size: (slice of the images, first row, uint8 (n, h, w, 3))."""
        rows, columns, _ = images[0].shape
        size = self.max_pixels // (rows * columns) or 1
        height = max(CELL, self.max_pixels // columns // STRIDE * STRIDE)
        for start in range(0, len(images), size):
            part = slice(start, start + size)
            for top in range(0, rows - CELL + STRIDE, height - CELL + STRIDE):    # strips with every cell once
                yield part, top, np.stack([image[top:top + height] for image in images[part]])

    def pnet_cells(self, batch, threshold):
        """Run P-Net on uint8 (n, h, w, 3); return index, corner (n, 2), x and y, scores, offsets of passing cells."""
        probability, features = self.nets.pnet(to_input(torch.from_numpy(batch).to(self.device)))
        index, row, column = cells = torch.nonzero(probability >= threshold, as_tuple=True)
        corner = torch.stack((column, row), 1) * STRIDE
        return [tensor.cpu().numpy() for tensor in
                (index, corner, probability[cells], self.nets.pnet.offsets(features[cells]))]

    def classify(self, net, size, pyramids, boxes, owner, threshold):
        """Run R-Net or O-Net on squares around boxes; return squares that pass, their owners, and its outputs."""
        boxes, owner = squares(boxes, owner, [pyramid.size for pyramid in pyramids])
        outputs, chunk = [], max(1, self.max_pixels // size ** 2)
        for start in range(0, max(1, len(boxes)), chunk):  # without boxes, one empty run gives the right shapes
            part = slice(start, start + chunk)
            batch = np.empty((len(boxes[part]), size, size, 3), np.uint8)
            for i, box, target in zip(owner[part], boxes[part].tolist(), batch):
                pyramids[i].crop(box, target)
            outputs.append([tensor.cpu().numpy() for tensor in net(to_input(torch.from_numpy(batch).to(self.device)))])
        scores, *others = map(np.concatenate, zip(*outputs))
        passed = np.flatnonzero(scores > threshold)
        return [array[passed] for array in (boxes, owner, scores, *others)]


def groups(items: Iterable, pixels: Callable) -> Iterator[list]:
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


def read(image) -> np.ndarray:
    """Return read_image(image); an error names the file."""
    try:
        return read_image(image)
    except UnreadableImage as error:
        if isinstance(image, (str, Path)):
            raise UnreadableImage(f"{image}: {error}") from None
        raise


def add_detector_options(parser):
    """Add the options for make_detector() to a parser."""
    parser.add_argument("--min-face-size", type=at_least(4, float), default=20, metavar="PIXELS", help="smallest face")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")


def make_detector(args) -> Detector:
    """Return the Detector that the options ask for."""
    torch.set_num_threads(min(torch.get_num_threads(), cpu_count()))
    # oneDNN keeps the convolutions of 1,024 sizes of images, which is no faster than 64 and fragments the memory.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    return Detector(args.min_face_size, device=args.device)


def draw(image: np.ndarray, faces: Faces) -> np.ndarray:
    """Return a copy of an image with boxes, scores and landmarks drawn on it."""
    image = image.copy()
    thickness = max(1, round(max(image.shape) / 500))
    for box, score, points in zip(*faces):
        x1, y1, x2, y2 = np.rint(box).astype(int).tolist()
        corner = max(0, x1), max(y1 - 4 * thickness, 16 * thickness)    # of the text, in the image if the box is not
        for color, line in ((BLACK, thickness + 2), (ORANGE, thickness)):    # black makes an outline
            cv2.rectangle(image, (x1, y1), (x2, y2), color, line)
            cv2.putText(image, f"{score:.3f}", corner, cv2.FONT_HERSHEY_SIMPLEX, 0.45 * thickness, color, line)
        for center in np.rint(points).astype(int).tolist():
            cv2.circle(image, center, 2 * thickness, BLUE, cv2.FILLED, cv2.LINE_AA)
    return image


def list_photos(paths: list) -> list[str]:
    """Return the image files among and below some paths, in order and without duplicates."""
    photos = []
    for name in map(path, paths):
        if not name.exists():
            raise InputError(f"{name} does not exist; pass photos, or folders of photos.")
        photos += [str(name / image) for image in scan_images(name).paths] if name.is_dir() else [str(name)]
    if not photos:
        raise InputError(f"there are no images in {', '.join(map(str, paths))}; pass photos, or folders of photos.")
    return list(dict.fromkeys(photos))


def output_names(photos: list[str]) -> list[str]:
    """Return different file names for the drawings: a photo's own, with a number appended if another photo has it."""
    names = {}    # in order; keys are in lower case, because some disks ignore case
    for stem in (Path(photo).stem for photo in photos):
        candidates = (f"{stem}-{n}.png" if n > 1 else f"{stem}.png" for n in count(1))
        name = next(name for name in candidates if name.lower() not in names)
        names[name.lower()] = name
    return list(names.values())


@command
def main(argv=None):
    parser = script_parser(__doc__)
    parser.add_argument("photos", nargs="+", metavar="PHOTO|DIR", help="image files of any size, or folders of them")
    parser.add_argument("--output", type=path, required=True, metavar="DIR", help="folder for drawings and faces.json")
    add_detector_options(parser)
    args = parser.parse_args(argv)
    photos = list_photos(args.photos)
    files.check_writable(args.output)
    detector, names = make_detector(args), output_names(photos)
    overwritten = {Path(p).resolve() for p in photos} & {(args.output / name).resolve() for name in names}
    if overwritten:
        raise InputError(f"a drawing would overwrite the photo {overwritten.pop()}; choose another --output.")
    listing = []
    for photo, name in zip(bar := files.progress_bar(photos, unit=" images"), names):
        try:
            image = read(photo)
        except UnreadableImage as error:
            bar.write(f"skipped {error}", file=sys.stderr)
            continue
        faces = detector.detect(image)
        with atomic_write(args.output / name) as file:
            file.write(cv2.imencode(".png", draw(image, faces)[..., ::-1])[1].tobytes())
        listing.append({"photo": photo, "drawing": name, "faces": [
            {"score": float(score), "box": box.tolist(), "landmarks": points.tolist()}
            for box, score, points in zip(*faces)]})
    if not listing:
        raise InputError("no photo can be read; pass image files.")
    write_json(args.output / "faces.json", listing)
    total = sum(len(entry["faces"]) for entry in listing)
    print(f"{count_of(total, 'face~')} in {count_of(len(listing), 'photo~')}, {len(photos) - len(listing):,} skipped: "
          f"{args.output}")


if __name__ == "__main__":
    main()
