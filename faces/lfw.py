"""Load a verification set: Labeled Faces in the Wild, a folder laid out like it, or one of InsightFace's .bin files."""
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from faces.align import HEIGHT, WIDTH, load_face
from faces.binset import read_bin
from faces.errors import InputError
from faces.images import UnreadableImage
from faces.landmarks import default_list, read_landmarks
from faces.pairs import Pairs, first, read_pairs


class Lfw(NamedTuple):
    """A set ready to be measured on, loaded once.

    pairs: Pairs.
    faces: uint8 (N, HEIGHT, WIDTH, 3), RGB, aligned; one per path of `pairs`.
    landmarks: where the landmarks came from, in words.
    """
    pairs: Pairs
    faces: np.ndarray
    landmarks: str


def load_lfw(root, file=None, landmarks=None, aligned=False, device="cpu", view=None):
    """Read the pairs of LFW, or of a set like it, and align the images they name.

    Args:
        root: folder of `Name/Name_0001.jpg`; or a file, InsightFace's lfw.bin or one like it, whose images are aligned
            and whose pairs are its own.
        file, view: which pairs, see faces.pairs.read_pairs.
        landmarks: landmark list; None takes what mtcnn/lfw_landmark.py wrote for this folder, or finds the landmarks
            now, and says so.
        aligned: the images are aligned faces already, 112x96 or 112x112.
        device: where MTCNN runs if it has to.

    Raises:
        InputError: anything missing, malformed or unreadable; no pair is ever left out.
    """
    if Path(root).expanduser().is_file():
        return _load_bin(Path(root).expanduser(), file or landmarks or view)
    pairs = read_pairs(root, file, view)
    if aligned:
        return Lfw(pairs, load_faces(root, pairs.paths), "none, the images are aligned")
    listed = Path(landmarks or default_list(root, "lfw_landmark.txt"))
    if landmarks is None and not listed.exists():
        points, source = _find_landmarks(root, pairs.paths, listed, device)
    else:
        points, source = landmarks_of(listed, pairs.paths), str(listed)
    return Lfw(pairs, load_faces(root, pairs.paths, points), source)


def load_faces(root, paths, points=None):
    """Read and align the images of a folder: decode_faces() of N paths below `root`."""
    return decode_faces(root, paths, [Path(root) / path for path in paths], points)


def decode_faces(where, names, sources, points=None):
    """Decode and align images, several at a time.

    Args:
        where: the folder or file they are in, for messages.
        names: N names, for messages.
        sources: N paths, or files as bytes.
        points: float (N, 5, 2) landmarks; None for images that are aligned already, 112x96 or 112x112.

    Returns:
        uint8 (N, HEIGHT, WIDTH, 3), RGB.

    Raises:
        InputError: an image that can't be read or aligned; verification leaves no pair out.
    """
    faces = np.empty((len(sources), HEIGHT, WIDTH, 3), np.uint8)

    def load(i):
        try:
            faces[i] = load_face(sources[i], None if points is None else points[i])
        except (UnreadableImage, ValueError) as error:
            return f"{names[i]}: {error}"

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        results = pool.map(load, range(len(sources)))
        bad = [r for r in tqdm(results, "aligning", len(sources), unit="face", leave=False) if r]
    if bad:
        raise InputError(f"{len(bad)} of {len(sources)} images in {where} can't be used ({first(bad, '; ')}); "
                         "mend or replace them, for a verification set may not lose pairs.")
    return faces


def landmarks_of(file, paths):
    """Return the landmarks of some images from a list: float32 (N, 5, 2).

    Args:
        file: landmark list without labels, as mtcnn/lfw_landmark.py writes it.
        paths: N paths, as in the list.

    Raises:
        InputError: a list that can't be read, or that lacks an image.
    """
    listed = read_landmarks(file, labelled=False)
    row = {path: i for i, path in enumerate(listed.paths)}
    absent = [path for path in paths if path not in row]
    if absent:
        raise InputError(f"{file} lacks {len(absent)} of the {len(paths)} images that are needed ({first(absent)}); "
                         "make it anew with mtcnn/lfw_landmark.py.")
    return listed.points[[row[path] for path in paths]]


def _load_bin(file, surplus):
    if surplus:
        raise InputError(f"{file} holds its pairs and aligned faces itself; leave out --pairs, --landmarks and --view.")
    pairs, images = read_bin(file)
    return Lfw(pairs, decode_faces(file, pairs.paths, images), f"none, the faces in {file.name} are aligned")


def _find_landmarks(root, paths, listed, device):
    """Find the landmarks of some images with MTCNN; return float32 (N, 5, 2), and words on where they came from."""
    from mtcnn.detector import Detector  # here, because most runs have a list and need no detector
    from mtcnn.landmark_lists import find_landmarks
    print(f"{listed} does not exist; finding the landmarks of {len(paths)} images now (mtcnn/lfw_landmark.py would "
          "keep them)", file=sys.stderr)
    points, missed = find_landmarks(root, paths, Detector(device=device))
    source = f"MTCNN, found for this run; no face in {missed} of {len(paths)} images, which got the median landmarks"
    print(source, file=sys.stderr)
    return points, source
