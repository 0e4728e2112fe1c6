"""Turn photos into embeddings from Python: detect the faces in each photo, align and embed them.

    from tools.embedder import Embedder
    embed = Embedder("runs/cosFace/checkpoint.pt")
    a, b = embed(["a.jpg", "b.jpg"])                # float32 (1024,) each, flipped image included
    everyone = embed("group.jpg", all_faces=True)   # float32 (faces, 1024)
"""
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from cosFace.net import NETS
from faces.align import align, crop_aligned
from faces.device import pick_device
from faces.files import InputError
from faces.images import is_image, read_image
from faces.verification.embed import embed
from faces.verification.weights import add_model_options, announce, load_net
from mtcnn import search
from mtcnn.detector import Detector, add_detector_options, make_detector
from mtcnn.search import ATTEMPTS, RULES, image_or_reason

NO_FACE = "no face was found"


class Face(NamedTuple):
    """An aligned face, uint8 RGB (112, 96, 3), and where it was in the photo, as in mtcnn.detector.Faces."""
    crop: np.ndarray
    box: np.ndarray | None = None
    score: float | None = None
    landmarks: np.ndarray | None = None
    chosen: int | None = None    # which of how many detected faces it is, by decreasing score from 0
    count: int | None = None


class Embedder:
    """A model, a face detector, and all that happens between a photo and its embedding.

    Args:
        model: path, see faces.verification.weights.load_net; or a module, float (N, 3, 112, 96) to (N, D).
        device: where to detect and embed: "auto", "cuda", "cuda:1", "mps" or "cpu".
        select: which face to use if a photo shows several: "largest", "center" or "score".
        flip: how to use the embedding of the flipped face: "concatenate", "sum" or "none".
        net, channels: see load_net(), whose description of the file is the attribute `loaded`.
        detector: mtcnn.detector.Detector; None makes one with its defaults.
    """

    def __init__(self, model, device="auto", select: str = "largest", flip: str = "concatenate",
                 net: str | None = None, channels: str | None = None, detector: Detector | None = None):
        self.device, self.select, self.flip = pick_device(str(device)), select, flip
        if isinstance(model, torch.nn.Module):
            self.net, self.loaded, self.name = model, None, "the network"
        else:
            (self.net, self.loaded), self.name = load_net(model, NETS, net, channels), model
            announce(model, self.loaded)
        self.net.to(self.device)
        self.detector = detector or Detector(device=self.device)

    def __call__(self, photos, aligned: bool = False, all_faces: bool = False):
        """Embed one photo, or a list of photos, which are as for faces.images.read_image().

        With `aligned`, they are faces that are already aligned, 112x96 or 112x112, and nothing is detected. Returns
        float32 (D,), or (N, D) for a list of N; not normalized. D is 512, or 1024 with the flipped face. With
        `all_faces`, float32 (faces, D), or a list of N of these; find_faces() returns their boxes, in the same order.
        Raises InputError if a photo can't be read or has no face.
        """
        single = is_image(photos) and getattr(photos, "ndim", 3) < 4    # an array of four dimensions is a list
        photos = [photos] if single else list(photos)
        found = self.find(photos, aligned, all_faces)
        crops = [face.crop for faces in found for face in faces]
        embeddings = self.embed(np.stack(crops or [np.zeros((112, 96, 3), np.uint8)]))[:len(crops)]
        if all_faces:
            embeddings = np.split(embeddings, np.cumsum([len(faces) for faces in found])[:-1])
        return embeddings[0] if single else embeddings

    def find(self, photos: list, aligned: bool = False, all_faces: bool = False) -> list[list[Face]]:
        """Return the faces that __call__() embeds, for each photo of a list."""
        found = crop_faces(photos) if aligned else find_faces(photos, self.detector, self.select, all_faces)
        for i, (photo, faces) in enumerate(zip(photos, found)):
            if all_faces and faces == NO_FACE:
                found[i] = []
            elif isinstance(faces, str):
                name = photo if isinstance(photo, (str, Path)) else f"photo {i + 1} of {len(photos)}"
                advice = "; pass an upright photo with both eyes visible, or detect smaller faces (--min-face-size)"
                raise InputError(f"can't embed {name}: {faces}{advice if faces == NO_FACE else ''}.")
        return found

    def embed(self, crops: np.ndarray) -> np.ndarray:
        """Return the embeddings of aligned faces, uint8 (N, 112, 96, 3), N >= 1: float32 (N, D), finite, not zero."""
        embeddings = embed(self.net, crops, self.device, flip=self.flip, progress=False)
        if not np.isfinite(embeddings).all() or not embeddings.any(1).all():
            raise InputError(f"an embedding of {self.name} is not finite or is zero; its training must have failed.")
        return embeddings


def find_faces(photos, detector: Detector, select: str = "largest", all_faces: bool = False) -> list[list[Face] | str]:
    """Find and align a face in each photo, or with all_faces, all of them by decreasing score; see Embedder. Returns a
    list of Face for each photo, or the reason why there is none."""
    results = []
    attempts = ATTEMPTS[:2]    # the lower thresholds of the others would produce false detections
    for group in search.find_faces(enumerate(map(image_or_reason, photos)), detector, select, attempts):
        for _, image, found, rows, _ in group:
            faces = [Face(align(image, found.landmarks[row]), *(values[row] for values in found), row, len(found.boxes))
                     for row in (sorted(rows) if all_faces else rows[:1])]
            results.append(image if isinstance(image, str) else faces or NO_FACE)
    return results


def crop_faces(photos) -> list[list[Face] | str]:
    """Return what find_faces() does for faces that are already aligned, 112x96 or 112x112; only `crop` is set."""
    results = []
    for photo in photos:
        try:
            results.append([Face(crop_aligned(read_image(photo)))])
        except ValueError as error:
            results.append(str(error))
    return results


def add_photo_options(parser):
    """Add the options for make_embedder()."""
    add_model_options(parser, NETS)
    parser.add_argument("--select", choices=RULES, default="largest",
                        help="which of several faces in a photo: the largest, nearest to the center, or surest")
    add_detector_options(parser)


def make_embedder(args, flip: str = "concatenate") -> Embedder:
    """Return the Embedder that the options ask for."""
    return Embedder(args.model, args.device, args.select, flip, args.net, args.channels, make_detector(args))
