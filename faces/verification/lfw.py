"""Load a verification set: Labeled Faces in the Wild, a folder like it, or one of InsightFace's .bin files."""
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from faces.align import HEIGHT, WIDTH, align, crop_aligned, position_problem
from faces.data.sources import is_zip
from faces.device import count_cpus
from faces.files import InputError
from faces.images import UnreadableImage, one_opencv_thread, read_image, summarize
from faces.jpeg import watched_stderr
from faces.landmarks import default_list, normal_form, read_landmarks
from faces.text import count_of, shorten
from faces.verification.binset import read_bin
from faces.verification.pairs import Pairs, open_images, read_pairs


class Lfw(NamedTuple):
    """A verification set in memory.

    pairs: Pairs.
    faces: uint8 (N, HEIGHT, WIDTH, 3), RGB, aligned; one per path of `pairs`.
    landmarks: where the landmarks came from, in words.
    """
    pairs: Pairs
    faces: np.ndarray
    landmarks: str


def load_lfw(root, file=None, landmarks=None, aligned=False, view=None, find_landmarks=None, device="cpu",
             identification=False):
    """Read the pairs of LFW, or of a similar set, and align the images that they name.

    Args:
        root: folder or zip of `Name/Name_0001.jpg`; or a file such as InsightFace's lfw.bin, which has aligned images
            and its own pairs.
        file, view: which pairs to read, see faces.verification.pairs.read_pairs.
        landmarks: landmark list; None uses the list that mtcnn/lfw_landmark.py wrote for this folder, or else
            `find_landmarks`.
        aligned: whether the images are already aligned, 112x96 or 112x112.
        find_landmarks: function (root, paths, device=...) that detects landmarks and returns float32 (N, 5, 2) and the
            number of images without a face, such as mtcnn.landmark_lists.find_landmarks.
        device: for `find_landmarks`.
        identification: also take all other images of people with two images or more; a .bin file has none.

    Raises:
        InputError: anything is missing, malformed or unreadable; no pair is ever left out.
    """
    root = Path(root).expanduser()
    if root.is_file() and not is_zip(root):
        return _load_bin(root, file or landmarks or view)
    pairs = read_pairs(root, file, view, identification)
    if aligned:
        return Lfw(pairs, load_faces(root, pairs.paths), "none, the images are aligned")
    listed = Path(landmarks or default_list(root, "lfw_landmark.txt"))
    if landmarks is None and find_landmarks is not None and not listed.exists():
        if is_zip(root):
            raise InputError(f"there is no landmark list for {root}; unpack it, so that landmarks can be found, or "
                             "pass a list with --landmarks, or --aligned if the faces are aligned.")
        points, source = _detect_landmarks(root, pairs.paths, listed, find_landmarks, device)
    else:
        points, source = landmarks_of(listed, pairs.paths), str(listed)
    return Lfw(pairs, load_faces(root, pairs.paths, points), source)


def load_faces(root, paths, points=None):
    """Read and align N images of a folder or zip; see decode_faces()."""
    source = open_images(root)
    return decode_faces(root, paths, lambda i: source.open(paths[i]), points)


def decode_faces(where, names, open_image, points=None):
    """Decode and align images in several threads.

    Args:
        where: the folder or file that holds them, for messages.
        names: N names, for messages.
        open_image: function of a position 0..N-1 that returns a path, or an encoded image as bytes.
        points: float (N, 5, 2) landmarks; None for images that are already aligned, 112x96 or 112x112.

    Returns:
        uint8 (N, HEIGHT, WIDTH, 3), RGB.

    Raises:
        InputError: an image can't be read or aligned; a verification set must not lose pairs.
    """
    faces = np.empty((len(names), HEIGHT, WIDTH, 3), np.uint8)
    centers = np.full((len(names), 2), np.nan)

    def load(i):
        try:
            image = read_image(open_image(i))
            faces[i] = crop_aligned(image) if points is None else align(image, points[i])
            if points is not None:
                centers[i] = points[i].mean(0) / image.shape[1::-1]
        except (UnreadableImage, ValueError) as error:
            return names[i], str(error)

    with one_opencv_thread(), watched_stderr(), ThreadPoolExecutor(min(16, count_cpus())) as pool:
        results = pool.map(load, range(len(names)))
        bad = [r for r in tqdm(results, "aligning", len(names), unit=" faces", leave=False) if r]
    if bad:
        raise InputError(f"{len(bad):,} of {count_of(len(names), 'image~')} in {where} can't be used "
                         f"({summarize(bad)}); replace them, because a verification set must be complete.")
    problem = position_problem(centers)
    if problem:
        raise InputError(f"the landmarks of {where} are in {problem}; use the images that the landmark list was made "
                         "for, or create a list for these with mtcnn/lfw_landmark.py.")
    return faces


def landmarks_of(file, paths):
    """Return the landmarks of some images from a list, float32 (N, 5, 2).

    Args:
        file: landmark list without labels, as mtcnn/lfw_landmark.py writes it.
        paths: N paths that the list contains.

    Raises:
        InputError: the list can't be read, or lacks an image.
    """
    listed = read_landmarks(file, labeled=False)
    row = {normal_form(path): i for i, path in enumerate(listed.paths)}
    absent = [path for path in paths if normal_form(path) not in row]
    if absent:
        raise InputError(f"{file} lacks {len(absent)} of the {len(paths)} images that are needed ({shorten(absent)}); "
                         "write the list again with mtcnn/lfw_landmark.py.")
    return listed.points[[row[normal_form(path)] for path in paths]]


def _load_bin(file, surplus):
    if surplus:
        raise InputError(f"{file} contains its pairs and aligned faces; leave out --pairs, --landmarks and --view.")
    pairs, images = read_bin(file)
    faces = decode_faces(file, pairs.paths, images.__getitem__)
    return Lfw(pairs, faces, f"none, the faces in {file.name} are aligned")


def _detect_landmarks(root, paths, listed, find_landmarks, device):
    print(f"{listed} does not exist; detecting landmarks in {count_of(len(paths), 'image~')} now "
          "(mtcnn/lfw_landmark.py would save them)", file=sys.stderr)
    points, missed = find_landmarks(root, paths, device=device)
    source = f"MTCNN, for this run; no face in {missed:,} of {count_of(len(paths), 'image~')}" + (
        ", which got the median landmarks" if missed else "")
    print(source, file=sys.stderr)
    return points, source
