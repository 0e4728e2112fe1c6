"""Find faces and their five landmarks with MTCNN's cascade of three networks (arXiv:1604.02878), on batches of images.

    python detector.py PHOTO... --output DIR

draws what it finds on the photos and lists it in DIR/faces.json. In Python: `Detector().detect(images)`.

Inside, a coordinate is a distance from the image's upper left corner: pixel k reaches from k to k + 1, a box is the
rectangle its network sees, and its width is x2 - x1. The release counts pixels from 1, adds or subtracts 1 in
places, cuts fractions off, and takes the scale of a resized image for the one asked for though sizes are whole
pixels; that shifts a box by a part of a pixel of the resized image, up to a twelfth of the face at the far border.
Here a side is only rounded where pixels are cut out, and then the rounded box is what comes next is relative to.
"""
import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cv2
import numpy as np
import torch
from torchvision import ops
from tqdm import tqdm

from faces.errors import InputError, command
from faces.files import atomic_write, write_json
from faces.images import UnreadableImage, read_image
from faces.run import pick_device
from mtcnn.nets import load_nets

CELL, STRIDE = 12, 2         # pixels that P-Net looks at, and from one look to the next
MAX_PIXELS = 2_000_000       # resized pixels in P-Net at once: 80 MB for each of its largest two layers
MAX_CROPS = 128              # crops in R- and O-Net at once: 35 MB for O-Net's largest layer


class Faces(NamedTuple):
    """What was found in one image, the surest first.

    boxes: float32 (n, 4), x1, y1, x2, y2; pixel k reaches from k to k + 1; may reach beyond the image.
    scores: float32 (n,), probability of a face.
    landmarks: float32 (n, 5, 2), image-left eye, image-right eye, nose, left and right corner of the mouth; the
        centre of pixel k is k, as cv2.warpAffine and faces.align count.
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
        self.nets = load_nets(self.device)

    @torch.inference_mode()
    def detect(self, images, thresholds=None):
        """Find the faces of a list of images, or of one.

        Args:
            images: uint8 RGB (H, W, 3), uint8 grey (H, W), or path of a file; or a list of these, of any sizes. Same
                sizes are fastest. Nothing found in one depends on the others.
            thresholds: instead of the detector's own.

        Returns:
            A list of Faces, or one Faces; n = 0 where nothing was found.

        Raises:
            faces.images.UnreadableImage: a path that can't be read.
            ValueError: an array that is no image.
        """
        if isinstance(images, (np.ndarray, str, Path)):
            return self.detect([images], thresholds)[0]
        images = [as_rgb(image) for image in images]
        thresholds = thresholds or self.thresholds
        owner, boxes = self.propose(images, thresholds[0])
        owner, boxes = self.refine(images, owner, boxes, thresholds[1])
        owner, boxes, scores, points = self.locate(images, owner, boxes, thresholds[2])
        found = [np.flatnonzero(owner == i) for i in range(len(images))]
        return [Faces(boxes[rows], scores[rows], points[rows] - np.float32(0.5)) for rows in found]

    def propose(self, images, threshold):
        """Stage one, P-Net over the pyramid: (owner, boxes), which image each of the proposed boxes belongs to."""
        sizes = {}
        for i, image in enumerate(images):
            sizes.setdefault(image.shape[:2], []).append(i)
        found = []  # of every size and scale: (owner, box, score), all of one image before non-maximum suppression
        for size, members in sizes.items():
            for scaled in pyramid(*size, self.min_face_size, self.factor):
                chunk = max(1, MAX_PIXELS // (scaled[0] * scaled[1]))
                for start in range(0, len(members), chunk):
                    part = members[start:start + chunk]
                    owner, *rest = self.propose_at_scale([images[i] for i in part], scaled, threshold)
                    found.append((np.array(part)[owner], *rest))
        if not found:
            return np.empty(0, int), np.empty((0, 4), np.float32)
        owner, boxes, scores, offsets = map(np.concatenate, zip(*found))
        keep = nms(boxes, scores, owner, 0.7)
        return owner[keep], regress(boxes[keep], offsets[keep])

    def propose_at_scale(self, images, scaled, threshold):
        """P-Net on images of one size, resized to `scaled` (rows, columns), at most one box from overlapping cells.

        Returns:
            owner int (n,), boxes float32 (n, 4) in pixels of the images, scores (n,), offsets (n, 4).
        """
        height, width = images[0].shape[:2]
        batch = np.stack([resize(image, scaled) for image in images])
        parts = [self.pnet_cells(batch[:, top:bottom], threshold, top) for top, bottom in strips(*scaled)]
        owner, corner, scores, offsets = map(np.concatenate, zip(*parts))
        cells = np.concatenate((corner, corner + CELL), 1).astype(np.float32)
        keep = nms(cells, scores, owner, 0.5)  # on whole numbers: neighbours that overlap by just 0.5 all stay
        scale = np.array((width / scaled[1], height / scaled[0]) * 2, np.float32)  # as resized, not as asked for
        return owner[keep], cells[keep] * scale, scores[keep], offsets[keep]

    def pnet_cells(self, batch, threshold, top):
        """P-Net on uint8 (N, H, W, 3): the cells that pass, as owner, corner (n, 2) x then y, scores, offsets."""
        probability, offsets = self.nets.pnet(self.network_input(batch))
        owner, i, j = torch.nonzero(probability >= threshold, as_tuple=True)
        corner = torch.stack((j, i), 1) * STRIDE + torch.tensor((0, top), device=self.device)
        return tuple(t.cpu().numpy() for t in (owner, corner, probability[owner, i, j], offsets[owner, :, i, j]))

    def refine(self, images, owner, boxes, threshold):
        """Stage two, R-Net: the proposals that pass, with better boxes."""
        owner, boxes = squares(images, owner, boxes)
        scores, offsets = self.judge(self.nets.rnet, images, owner, boxes, 24)
        passed = np.flatnonzero(scores > threshold)
        keep = passed[nms(boxes[passed], scores[passed], owner[passed], 0.7)]
        return owner[keep], regress(boxes[keep], offsets[keep])

    def locate(self, images, owner, boxes, threshold):
        """Stage three, O-Net: (owner, boxes, scores, landmarks) of the faces, by falling score."""
        owner, boxes = squares(images, owner, boxes)
        scores, offsets, points = self.judge(self.nets.onet, images, owner, boxes, 48)
        keep = np.flatnonzero(scores > threshold)
        owner, boxes, scores = owner[keep], boxes[keep], scores[keep]
        corner, size = boxes[:, None, :2], boxes[:, None, 2:] - boxes[:, None, :2]
        points = corner + points[keep] * size  # relative to the box that O-Net saw, not to its correction
        boxes = regress(boxes, offsets[keep])
        keep = nms_of_smaller(boxes, scores, owner, 0.7)
        return owner[keep], boxes[keep], scores[keep], points[keep]

    def judge(self, net, images, owner, boxes, size):
        """Run R- or O-Net on the square boxes, resized to `size`: its outputs as arrays, one row a box."""
        outputs = []
        for start in range(0, max(1, len(boxes)), MAX_CROPS):  # no boxes: one run on none, for outputs of right shape
            part = slice(start, start + MAX_CROPS)
            batch = np.empty((len(boxes[part]), size, size, 3), np.uint8)
            for i, box, target in zip(owner[part], boxes[part].astype(int).tolist(), batch):
                target[:] = resize(cut(images[i], box), (size, size))
            outputs.append([t.cpu().numpy() for t in net(self.network_input(batch))])
        return map(np.concatenate, zip(*outputs))

    def network_input(self, batch):
        """Turn uint8 (N, H, W, 3) into float (N, 3, H, W), (x - 127.5) / 128."""
        return torch.from_numpy(batch).to(self.device).permute(0, 3, 1, 2).float().sub_(127.5).div_(128)


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


def pyramid(height, width, min_face_size, factor):
    """Return the sizes (rows, columns) to resize an image to, so that faces of P-Net's size are found in one of them.

    The largest makes min_face_size 12 pixels; the smallest has at least 12 rows and columns. Sizes are rounded up, as
    in the release. Empty where the image is smaller than min_face_size.
    """
    scale, sizes = CELL / min_face_size, []
    while min(height, width) * scale >= CELL:
        sizes.append((int(np.ceil(height * scale)), int(np.ceil(width * scale))))
        scale *= factor
    return sizes


def strips(height, width):
    """Cut rows 0 to height into (top, bottom) so that P-Net over the strips gives each of its cells just once.

    Strips overlap by what a cell reaches beyond its stride. One strip unless the image is over MAX_PIXELS.
    """
    rows = max(MAX_PIXELS // width // STRIDE, CELL) * STRIDE  # that a strip adds
    tops = range(0, max(height - CELL + STRIDE, 1), rows)
    return [(top, min(top + rows + CELL - STRIDE, height)) for top in tops]


def resize(image, size):
    """Resize uint8 (H, W, 3) to `size` (rows, columns).

    Averages areas where it shrinks, as the release smoothes before it does, and is bilinear where it enlarges.
    """
    shrinks = size[0] <= image.shape[0] and size[1] <= image.shape[1]
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def squares(images, owner, boxes):
    """Make boxes the squares of whole pixels that are cut out: same centre, side the longer of the two.

    Boxes without a pixel of their image are dropped: nothing is there to be judged.

    Returns:
        (owner, boxes) of the rest; boxes float32 of whole numbers.
    """
    side = np.maximum(np.rint((boxes[:, 2:] - boxes[:, :2]).max(1, initial=0)), 0)
    corner = np.rint((boxes[:, :2] + boxes[:, 2:] - side[:, None]) / 2)
    limit = np.array([image.shape[1::-1] for image in images]).reshape(-1, 2)[owner]
    keep = ((side[:, None] >= 1) & (corner < limit) & (corner + side[:, None] > 0)).all(1)
    return owner[keep], np.concatenate((corner, corner + side[:, None]), 1)[keep]


def cut(image, box):
    """Cut a box of whole pixels out of uint8 (H, W, 3); it is black where it reaches beyond the image."""
    x1, y1, x2, y2 = box
    height, width = image.shape[:2]
    inner = image[max(y1, 0):y2, max(x1, 0):x2]
    if x1 >= 0 and y1 >= 0 and x2 <= width and y2 <= height:
        return inner
    return cv2.copyMakeBorder(inner, max(-y1, 0), max(y2 - height, 0), max(-x1, 0), max(x2 - width, 0),
                              cv2.BORDER_CONSTANT, value=(0, 0, 0))


def regress(boxes, offsets):
    """Move the sides of boxes (n, 4) by `offsets` (n, 4), parts of the width or height."""
    size = boxes[:, 2:] - boxes[:, :2]
    return boxes + offsets * np.concatenate((size, size), 1)


def nms(boxes, scores, owner, threshold):
    """Non-maximum suppression within each image; overlap is intersection over union.

    Returns:
        Rows to keep, int; those of one image by falling score.
    """
    keep = [np.empty(0, int)]
    for rows in rows_of_each(owner):
        keep.append(rows[ops.nms(torch.from_numpy(boxes[rows]), torch.from_numpy(scores[rows]), threshold).numpy()])
    return np.concatenate(keep)


def nms_of_smaller(boxes, scores, owner, threshold):
    """The same with intersection over the smaller of the two areas, so that a box inside another goes too."""
    keep = []
    for rows in rows_of_each(owner):
        kept = []
        for row in rows[np.argsort(-scores[rows], kind="stable")]:
            inner = np.minimum(boxes[row, 2:], boxes[kept, 2:]) - np.maximum(boxes[row, :2], boxes[kept, :2])
            smaller = np.minimum(area_of(boxes[row]), area_of(boxes[kept]))
            if not (inner.clip(0).prod(1) > threshold * smaller).any():
                kept.append(row)
        keep += kept
    return np.array(keep, int)


def rows_of_each(owner):
    """Return the rows of each image that has any."""
    return [np.flatnonzero(owner == i) for i in np.unique(owner)]


def area_of(boxes):
    """Area of boxes (..., 4)."""
    return (boxes[..., 2:] - boxes[..., :2]).prod(-1)


def add_options(parser):
    """Add the options that say how to detect; make_detector() takes them."""
    parser.add_argument("--min-face-size", type=float, default=20, metavar="PIXELS",
                        help="smallest face to look for (12 to 200, default 20); twice the size is up to four times as "
                             "fast and finds fewer faces where there are none")
    parser.add_argument("--device", default="auto", help="auto (default: the best there is), cpu, cuda, cuda:1, mps")


def make_detector(args):
    """Return the Detector that the options ask for.

    Raises:
        InputError: an option out of range, or a device that is not there.
    """
    if not 4 <= args.min_face_size < 10000:
        raise InputError(f"--min-face-size {args.min_face_size:g} makes no sense; 12 to 200 do.")
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
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, nargs="+", metavar="PHOTO", help="image files, of any size")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for drawings and faces.json")
    add_options(parser)
    args = parser.parse_args()
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
