"""Turn photos into embeddings from Python: detect the face in each photo, align it, embed it.

    from tools.embedder import Embedder
    embed = Embedder("runs/cosFace/checkpoint.pt")
    a, b = embed(["a.jpg", "b.jpg"])    # float32 (1024,) each, flipped image included
"""
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cosFace.net import NETS
from faces.align import align, crop_aligned
from faces.device import pick_device
from faces.files import InputError
from faces.images import UnreadableImage, read_image
from faces.verification.embed import embed
from faces.verification.weights import load_net
from mtcnn.detector import Detector, groups
from mtcnn.inputs import IMAGE_TYPES, as_rgb
from mtcnn.search import ATTEMPTS, RULES, choose, frame, normalize_rule, prefetch

NO_FACE = "no face was found"


class Face(NamedTuple):
    """The chosen face of a photo.

    crop: uint8 (112, 96, 3), RGB, the aligned face.
    box, score, landmarks: float32 (4,), float32, float32 (5, 2), in pixels of the photo; see mtcnn.detector.Faces.
    chosen: which of the detected faces it is, in order of decreasing score, from 0.
    count: number of faces detected in the photo.
    """
    crop: np.ndarray
    box: np.ndarray
    score: float
    landmarks: np.ndarray
    chosen: int
    count: int


class Embedder:
    """A model, a face detector, and all that happens between a photo and its embedding.

    Args:
        model: path of a checkpoint, see faces.verification.weights.load_weights; or a module, float (N, 3, 112, 96) to
            (N, D).
        device: where to detect and embed: "auto", "cuda", "cuda:1", "mps" or "cpu".
        select: which face to use if a photo shows several: "largest", "center" or "score".
        mirror: how to use the embedding of the mirror image, see faces.verification.embed.embed.
        batch_size: faces per batch; changes the result by rounding only.
        net, channels: see faces.verification.weights.load_net.
        detector: mtcnn.detector.Detector; None makes one with its defaults when the first photo needs it.

    Attributes:
        loaded: what load_net() said about the file; None if `model` is a module.
    """

    def __init__(self, model, device="auto", select="largest", mirror="concatenate", batch_size=None, net=None,
                 channels=None, detector=None):
        self.device = pick_device(str(device))
        is_file = isinstance(model, (str, Path))
        self.net, self.loaded = load_net(model, NETS, net, channels) if is_file else (model, None)
        self.net.to(self.device)
        self.select, self.mirror, self.batch_size = select, mirror, batch_size
        if detector is not None:
            self.detector = detector

    @cached_property
    def detector(self):
        return Detector(device=self.device)

    def __call__(self, photos, aligned=False):
        """Embed one photo, or a list of photos.

        Args:
            photos: what mtcnn.detector.Detector.detect() takes: uint8 RGB (H, W, 3) or gray (H, W), as an array or a
                tensor; a PIL image; or the path of a file. Or a list of these, of any sizes.
            aligned: the photos are faces that are already aligned, 112x96 or 112x112; nothing is detected.

        Returns:
            float32 (D,), or (N, D) for a list of N; not normalized. D is 512, or 1024 with the mirror image.

        Raises:
            InputError: a photo can't be read, is not a photo, has no face or, if aligned, another size; or an empty
                list.
        """
        single = isinstance(photos, IMAGE_TYPES) and getattr(photos, "ndim", 3) < 4
        try:
            photos = [photos] if single else list(photos)
        except TypeError:
            raise InputError(f"can't embed {photos!r}; pass a photo or a list of photos.") from None
        if not photos:
            raise InputError("there is nothing to embed; pass at least one photo.")
        faces = crop_faces(photos) if aligned else find_faces(photos, self.detector, self.select)
        for i, (photo, face) in enumerate(zip(photos, faces)):
            if isinstance(face, str):
                name = photo if isinstance(photo, (str, Path)) else f"photo {i + 1} of {len(photos)}"
                raise InputError(f"can't embed {name}: {face}.")
        embeddings = self.embed(np.stack([face.crop for face in faces]))
        return embeddings[0] if single else embeddings

    def embed(self, crops):
        """Return the embeddings of aligned faces, uint8 (N, 112, 96, 3), N >= 1; float32 (N, D)."""
        return embed(self.net, crops, self.device, self.batch_size, self.mirror, progress=False)


def find_faces(photos, detector, select="largest"):
    """Find and align one face in each photo; few of the photos are in memory at a time.

    Args:
        photos: list of N photos; see Embedder.
        detector: mtcnn.detector.Detector.
        select: which face to use if a photo shows several: "largest", "center" or "score".

    Returns:
        list of N: a Face, or the reason why there is none, as text.
    """
    results = []
    images = map(_read, photos)
    for group in prefetch(groups(images, lambda image: 0 if isinstance(image, str) else image[..., 0].size)):
        results += _find_in_images(group, detector, select)
    return results


def crop_faces(photos):
    """Return what find_faces() does for faces that are already aligned, 112x96 or 112x112; only `crop` is set."""
    faces = []
    for image in map(_read, photos):
        try:
            faces.append(image if isinstance(image, str) else Face(crop_aligned(image), None, None, None, None, None))
        except ValueError as error:
            faces.append(str(error))
    return faces


def _read(photo):
    """Return uint8 (H, W, 3), or the reason why the photo can't be read."""
    try:
        return read_image(photo) if isinstance(photo, (str, Path)) else np.ascontiguousarray(as_rgb(photo))
    except (UnreadableImage, ValueError) as error:
        return str(error)


def _find_in_images(images, detector, select):
    results = [image if isinstance(image, str) else None for image in images]
    # Try the photo itself, then the photo in a black frame. The later attempts are left out because their lower
    # thresholds would produce false detections.
    for thresholds, part in ATTEMPTS[:2]:
        missing = [i for i, result in enumerate(results) if result is None]
        framed = [frame(images[i], part) for i in missing]
        for i, (image, corner), faces in zip(missing, framed, detector.detect([f[0] for f in framed], thresholds)):
            row = choose(faces, image.shape[:2], select, corner)
            if row is None:
                continue
            points = faces.landmarks[row] - corner
            try:
                results[i] = Face(align(images[i], points), faces.boxes[row] - np.tile(corner, 2), faces.scores[row],
                                  points, row, len(faces.boxes))
            except ValueError as error:    # the image is too wide or too tall
                results[i] = str(error)
    return [NO_FACE if result is None else result for result in results]


def add_select_option(parser):
    """Add the option --select, for Embedder's argument of that name."""
    parser.add_argument("--select", type=normalize_rule, choices=RULES, default="largest",
                        help="which face to use if a photo shows several: the largest, the one nearest the center, or "
                             "the one with the highest score (default: largest)")
