"""Find faces and their five landmarks with MTCNN's cascade of three networks (arXiv:1604.02878), on batches of images.

    python detector.py PHOTO... --output DIR

draws what it finds on the photos and lists it in DIR/faces.json. In Python: `Detector().detect(images)`.

Inside, a coordinate is a distance from the image's upper left corner: pixel k reaches from k to k + 1, a box is the
rectangle its network sees, and its width is x2 - x1. The release counts pixels from 1, adds or subtracts 1 in
places, cuts fractions off, and takes the scale of a resized image for the one asked for though sizes are whole
pixels; that shifts a box by a part of a pixel of the resized image, up to a twelfth of the face at the far border.
Here no coordinate is ever rounded.
"""
import argparse
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cv2
import numpy as np
import torch
from tqdm import tqdm

from faces.device import pick_device
from faces.files import InputError, atomic_write, command, write_json
from faces.images import UnreadableImage, read_image
from mtcnn.boxes import nms, nms_of_smaller, regress, squares
from mtcnn.nets import load_nets
from mtcnn.processes import in_processes
from mtcnn.pyramid import CELL, Pyramid

STRIDE = 2                   # pixels from one look of P-Net to the next
# Of boxes that overlap by more, the surest stays: P-Net's of one level, P-Net's of all levels, R-Net's, O-Net's. The
# release has 0.7 after R-Net and so O-Net judges each face several times, with landmarks that differ by more than
# they should: 0.3 has the landmarks move with the face more closely (benchmarks/mtcnn_equivariance.py), in a third of
# O-Net's time, and finds the same faces.
OVERLAP = (0.5, 0.7, 0.3, 0.7)
# Pixels in a network at once. On a CPU its largest layers then stay in the cache; a GPU is filled with 320 MB.
MAX_PIXELS = {"cpu": 50_000, "gpu": 2_000_000}
GROUP = 8_000_000            # pixels of images that are searched together
BATCH = 32                   # images at most that one of several processes is given at a time


class Faces(NamedTuple):
    """What was found in one image, the surest first.

    boxes: float32 (n, 4), x1, y1, x2, y2; pixel k reaches from k to k + 1; may reach beyond the image.
    scores: float32 (n,), probability of a face.
    landmarks: float32 (n, 5, 2), image-left eye, image-right eye, nose, left and right corner of the mouth; the
        center of pixel k is k, as cv2.warpAffine and faces.align count.
    """
    boxes: np.ndarray
    scores: np.ndarray
    landmarks: np.ndarray


class Detector:
    """MTCNN.

    Args:
        min_face_size: pixels; smaller faces are not looked for. Time is about proportional to 1 / min_face_size ** 2.
        thresholds: probability from which P-, R- and O-Net let a face pass.
        factor: each image of the pyramid is so much smaller than the one before; the default halves the area.
        device: where the networks run; default CUDA if there is one, else the CPU.
    """

    def __init__(self, min_face_size=20, thresholds=(0.6, 0.7, 0.7), factor=0.709, device=None):
        if min_face_size <= 0 or not 0 < factor < 1 or len(thresholds) != 3:
            raise ValueError("min_face_size > 0, 0 < factor < 1 and three thresholds are needed")
        self.min_face_size, self.thresholds, self.factor = min_face_size, tuple(thresholds), factor
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.max_pixels = MAX_PIXELS["cpu" if self.device.type == "cpu" else "gpu"]
        self.nets = load_nets(self.device)

    def detect(self, images, thresholds=None, workers=0):
        """Find the faces of a list of images, or of one.

        Args:
            images: uint8 RGB (H, W, 3), uint8 gray (H, W), or path of a file; or a list of these, of any sizes. Same
                sizes are fastest. Nothing found in one depends on the others. Files are read as they are needed.
            thresholds: instead of the detector's own.
            workers: processes that search a list, 0 or 1: this one alone. As many as there are cores are fastest on a
                CPU where the list has hundreds of images; a GPU wants none.

        Returns:
            A list of Faces, or one Faces; n = 0 where nothing was found.

        Raises:
            faces.images.UnreadableImage: a path that can't be read.
            ValueError: an array that is no image.
        """
        if isinstance(images, (np.ndarray, str, Path)):
            return self.detect([images], thresholds)[0]
        if workers > 1 and len(images) > 1:
            search, batch = partial(self.detect, thresholds=thresholds), min(BATCH, -(-len(images) // (4 * workers)))
            return [faces for part in in_processes(search, images, batch, workers) for faces in part]
        found = []
        for group in groups(map(as_rgb, images), lambda image: image.shape[0] * image.shape[1]):
            found += self.cascade(group, thresholds or self.thresholds)
        return found

    @torch.inference_mode()
    def cascade(self, images, thresholds):
        """Return the Faces of each of some uint8 (H, W, 3)."""
        pyramids = [Pyramid(image, self.min_face_size, self.factor) for image in images]
        boxes, image_index = self.propose(pyramids, thresholds[0])
        boxes, image_index = self.refine(pyramids, boxes, image_index, thresholds[1])
        boxes, image_index, scores, points = self.locate(pyramids, boxes, image_index, thresholds[2])
        found = [image_index == i for i in range(len(pyramids))]
        return [Faces(boxes[rows], scores[rows], points[rows] - np.float32(0.5)) for rows in found]

    def propose(self, pyramids, threshold):
        """Stage one, P-Net over all levels: the proposed boxes (n, 4), and which image each belongs to, int (n,)."""
        alike = {}
        for i, pyramid in enumerate(pyramids):
            alike.setdefault(pyramid.size, []).append(i)
        found = []  # a tuple of arrays for each run of P-Net
        for (height, width), members in alike.items():
            for level, (rows, columns, _) in enumerate(map(np.shape, pyramids[members[0]].searched())):
                scale = np.array((width / columns, height / rows) * 2, np.float32)
                for part, top, batch in self.batches([pyramids[i].searched()[level] for i in members]):
                    image_index, corner, scores, offsets = self.pnet_cells(batch, threshold)
                    if not len(image_index):  # thousands of small arrays, kept, would tear the heap to pieces
                        continue
                    corner[:, 1] += top
                    found.append((np.array(members)[part][image_index], np.full(len(image_index), level), corner, scores, offsets,
                                  np.broadcast_to(scale, (len(image_index), 4))))
        if not found:
            return np.empty((0, 4), np.float32), np.empty(0, int)
        image_index, level, corner, scores, offsets, scale = map(np.concatenate, zip(*found))
        # First at most one of overlapping cells of a level: levels lie apart. In whole numbers, so that it makes no
        # difference where neighbors overlap by just 0.5: all of them stay.
        apart = np.array((level * (2 + CELL + corner.max(initial=0)), 0 * level)).T + corner
        keep = nms(np.concatenate((apart, apart + CELL), 1).astype(np.float64), scores, image_index, OVERLAP[0])
        boxes = np.concatenate((corner, corner + CELL), 1).astype(np.float32) * scale
        keep = keep[nms(boxes[keep], scores[keep], image_index[keep], OVERLAP[1])]
        return regress(boxes[keep], offsets[keep]), image_index[keep]

    def batches(self, images):
        """Cut images of one size into what P-Net takes at once: several images, or a strip of one.

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
        """P-Net on uint8 (n, h, w, 3): the cells that pass, as image_index, corner (n, 2) x then y, scores, offsets."""
        probability, features = self.nets.pnet(self.network_input(batch))
        image_index, i, j = cells = torch.nonzero(probability >= threshold, as_tuple=True)
        found = image_index, torch.stack((j, i), 1) * STRIDE, probability[cells], self.nets.pnet.offsets(features[cells])
        return [tensor.cpu().numpy() for tensor in found]

    def refine(self, pyramids, boxes, image_index, threshold):
        """Stage two, R-Net: the proposals that pass, with better boxes."""
        boxes, image_index = squares(boxes, image_index, [pyramid.size for pyramid in pyramids])
        scores, offsets = self.judge(self.nets.rnet, pyramids, boxes, image_index, 24)
        passed = np.flatnonzero(scores > threshold)
        keep = passed[nms(boxes[passed], scores[passed], image_index[passed], OVERLAP[2])]
        return regress(boxes[keep], offsets[keep]), image_index[keep]

    def locate(self, pyramids, boxes, image_index, threshold):
        """Stage three, O-Net: boxes, image_index, scores and landmarks of the faces; those of an image by falling score."""
        boxes, image_index = squares(boxes, image_index, [pyramid.size for pyramid in pyramids])
        scores, offsets, points = self.judge(self.nets.onet, pyramids, boxes, image_index, 48)
        keep = np.flatnonzero(scores > threshold)
        boxes, image_index, scores = boxes[keep], image_index[keep], scores[keep]
        corner, size = boxes[:, None, :2], boxes[:, None, 2:] - boxes[:, None, :2]
        points = corner + points[keep] * size  # relative to the box that O-Net saw, not to its correction
        boxes = regress(boxes, offsets[keep])
        keep = nms_of_smaller(boxes, scores, image_index, OVERLAP[3])
        return boxes[keep], image_index[keep], scores[keep], points[keep]

    def judge(self, net, pyramids, boxes, image_index, size):
        """Run R- or O-Net on the square boxes, sampled to `size`: its outputs as arrays, one row a box."""
        outputs, chunk = [], max(1, self.max_pixels // size ** 2)
        for start in range(0, max(1, len(boxes)), chunk):  # no boxes: one run on none, for outputs of right shape
            part = slice(start, start + chunk)
            batch = np.empty((len(boxes[part]), size, size, 3), np.uint8)
            for i, box, target in zip(image_index[part], boxes[part].tolist(), batch):
                pyramids[i].crop(box, target)
            outputs.append([tensor.cpu().numpy() for tensor in net(self.network_input(batch))])
        return map(np.concatenate, zip(*outputs))

    def network_input(self, batch):
        """Turn uint8 (N, H, W, 3) into float (N, 3, H, W), (x - 127.5) / 128, which is then channels_last."""
        return torch.from_numpy(batch).to(self.device).permute(0, 3, 1, 2).float().sub_(127.5).div_(128)


def groups(items, pixels):
    """Yield lists of items that have about GROUP pixels together; pixels(item) counts. Items are taken as needed."""
    group, total = [], 0
    for item in items:
        group.append(item)
        total += pixels(item)
        if total >= GROUP:
            yield group
            group, total = [], 0
    if group:
        yield group


def as_rgb(image):
    """Return an array or a file as uint8 (H, W, 3)."""
    if isinstance(image, (str, Path)):
        return read_image(image)
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        raise ValueError("an image is a uint8 array or a path")
    if image.ndim == 2:
        return np.repeat(image[..., None], 3, axis=2)
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"an image is (H, W, 3) or (H, W), not {image.shape}")
    return image


def strips(rows, columns, pixels):
    """Cut an image of even height into strips (top, bottom) of about `pixels`, for P-Net to see each cell just once.

    Strips overlap by what a cell reaches beyond its stride.
    """
    height = max(CELL, pixels // columns // STRIDE * STRIDE)
    return [(top, min(top + height, rows)) for top in range(0, rows - CELL + STRIDE, height - CELL + STRIDE)]


def add_options(parser):
    """Add the options that say how to detect; make_detector() takes them."""
    parser.add_argument("--min-face-size", type=float, default=20, metavar="PIXELS",
                        help="smallest face to look for, at least 4 and below 10000 (default: 20); twice the size is up to four times as "
                             "fast and finds fewer faces where there are none")
    parser.add_argument("--device", default="auto", help="auto (default: the best there is), cpu, cuda, cuda:1, mps")


def make_detector(args):
    """Return the Detector that the options ask for.

    Raises:
        InputError: an option out of range, or a device that is not there.
    """
    if not 4 <= args.min_face_size < 10000:
        raise InputError(f"--min-face-size {args.min_face_size:g} is out of range; give at least 4 and less than 10000 pixels.")
    return Detector(args.min_face_size, device=pick_device(args.device))


def draw(image, faces):
    """Return a copy of the image with boxes and landmarks drawn on it."""
    image = image.copy()
    thickness = max(1, round(max(image.shape) / 500))
    for box, points in zip(faces.boxes, faces.landmarks):
        x1, y1, x2, y2 = np.rint(box).astype(int).tolist()
        cv2.rectangle(image, (x1, y1), (x2, y2), (0, 255, 0), thickness)
        for point in points:
            cv2.circle(image, np.rint(point).astype(int).tolist(), 2 * thickness, (255, 40, 40), -1)
    return image


def output_names(photos):
    """Name the drawing of each photo for it, with a number where two photos have one name."""
    seen, names = Counter(), []
    for photo in photos:
        seen[photo.stem] += 1
        names.append(f"{photo.stem}.png" if seen[photo.stem] == 1 else f"{photo.stem}-{seen[photo.stem]}.png")
    return names


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, nargs="+", metavar="PHOTO", help="image files, of any size")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for drawings and faces.json")
    add_options(parser)
    args = parser.parse_args(argv)
    detector = make_detector(args)
    listing = []
    for photo, name in zip(tqdm(args.photos, unit=" images", disable=None), output_names(args.photos)):
        try:
            image = read_image(photo)
        except UnreadableImage as error:
            raise InputError(f"can't read {photo}: {error}; give image files.") from None
        faces = detector.detect(image)
        with atomic_write(args.output / name) as file:
            file.write(cv2.imencode(".png", draw(image, faces)[..., ::-1])[1].tobytes())
        listing.append({"photo": str(photo), "drawing": name, "faces": [
            {"score": float(score), "box": box.tolist(), "landmarks": points.tolist()}
            for box, score, points in zip(*faces)]})
    write_json(args.output / "faces.json", listing)
    print(f"{sum(len(entry['faces']) for entry in listing)} faces in {len(listing)} photo(s): {args.output}")


if __name__ == "__main__":
    main()
