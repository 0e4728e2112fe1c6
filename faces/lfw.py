"""Read Labeled Faces in the Wild, or a set laid out like it: the pairs of its protocol and its aligned faces.

The folder holds `Name/Name_0001.jpg`. pairs.txt begins with `10 300` (folds, pairs of each kind in a fold) or with
`300` alone, and goes on with one pair a line, `Name i j` (genuine) or `Name1 i Name2 j` (impostor), fold after fold.
"""
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from faces.align import HEIGHT, WIDTH, align, crop_aligned
from faces.errors import InputError
from faces.files import folder
from faces.images import UnreadableImage, list_images, read_image
from faces.landmarks import default_list, read_landmarks


class Pairs(NamedTuple):
    """P pairs among N distinct images, in the order of pairs.txt.

    paths: N paths relative to the folder, with forward slashes.
    pairs: int64 (P, 2), indices into paths.
    same: bool (P,), true for a genuine pair.
    folds: int64 (P,), 0 .. K-1; fold k is the k-th run of 2 x 300 lines, or of what the header says.
    """
    paths: list
    pairs: np.ndarray
    same: np.ndarray
    folds: np.ndarray


class Lfw(NamedTuple):
    """A set ready to be measured on, loaded once.

    pairs: Pairs.
    faces: uint8 (N, HEIGHT, WIDTH, 3), RGB, aligned; one per path of `pairs`.
    landmarks: where the landmarks came from, in words.
    """
    pairs: Pairs
    faces: np.ndarray
    landmarks: str


def load_lfw(root, file=None, landmarks=None, aligned=False, device="cpu"):
    """Read LFW's pairs and align the images they name.

    Args:
        root: folder of `Name/Name_0001.jpg`.
        file: pairs.txt; None looks in `root`, then beside it.
        landmarks: landmark list; None takes what mtcnn/lfw_landmark.py wrote for this folder, or finds the landmarks
            now, and says so.
        aligned: the images are aligned faces already, 112x96 or 112x112.
        device: where MTCNN runs if it has to.

    Raises:
        InputError: anything missing, malformed or unreadable; no pair is ever left out.
    """
    pairs = read_pairs(root, file)
    if aligned:
        return Lfw(pairs, load_faces(root, pairs.paths), "none, the images are aligned")
    listed = Path(landmarks or default_list(root, "lfw_landmark.txt"))
    if landmarks is None and not listed.exists():
        points, source = _find_landmarks(root, pairs.paths, listed, device)
    else:
        points, source = landmarks_of(listed, pairs.paths), str(listed)
    return Lfw(pairs, load_faces(root, pairs.paths, points), source)


def read_pairs(root, file=None):
    """Read the pairs and find their images.

    Args:
        root: folder of `Name/Name_0001.jpg`. Any other extension of faces.images will do; .jpg comes first.
        file: pairs.txt; None looks in `root`, then beside it.

    Raises:
        InputError: no such folder or file, a malformed line, another number of lines than the header announces, or
            images that are not there.
    """
    root = folder(root, "LFW images as Name/Name_0001.jpg")
    file = _find_pairs(root) if file is None else Path(file)
    rows, same, folds = _parse(file, _lines(file))
    present = {}
    for path in sorted(list_images(root), key=lambda path: not path.endswith(".jpg")):
        present.setdefault(path.rpartition(".")[0], path)
    names = sorted({name for pair in rows for name in pair})
    absent = [name for name in names if name not in present]
    if absent:
        raise InputError(f"{file} names {len(names)} images of which {len(absent)} are not in {root} "
                         f"({_first(absent)}); give the folder that holds Name/Name_0001.jpg, complete.")
    index = {name: i for i, name in enumerate(names)}
    pairs = np.array([(index[a], index[b]) for a, b in rows])
    return Pairs([present[name] for name in names], pairs, same, folds)


def load_faces(root, paths, points=None):
    """Read and align images, several at a time.

    Args:
        root: the folder.
        paths: N paths below it.
        points: float (N, 5, 2) landmarks; None for images that are aligned already, 112x96 or 112x112.

    Returns:
        uint8 (N, HEIGHT, WIDTH, 3), RGB.

    Raises:
        InputError: an image that can't be read or aligned; verification leaves no pair out.
    """
    faces = np.empty((len(paths), HEIGHT, WIDTH, 3), np.uint8)

    def load(i):
        try:
            image = read_image(Path(root) / paths[i])
            faces[i] = crop_aligned(image) if points is None else align(image, points[i])
        except (UnreadableImage, ValueError) as error:
            return f"{paths[i]}: {error}"

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        results = pool.map(load, range(len(paths)))
        bad = [r for r in tqdm(results, "aligning", len(paths), unit="face", leave=False) if r]
    if bad:
        raise InputError(f"{len(bad)} of {len(paths)} images in {root} can't be used ({_first(bad, '; ')}); "
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
        raise InputError(f"{file} lacks {len(absent)} of the {len(paths)} images that are needed ({_first(absent)}); "
                         "make it anew with mtcnn/lfw_landmark.py.")
    return listed.points[[row[path] for path in paths]]


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


def _find_pairs(root):
    for candidate in (root / "pairs.txt", root.resolve().parent / "pairs.txt"):
        if candidate.is_file():
            return candidate
    raise InputError(f"there is no pairs.txt in {root} or beside it; fetch LFW's, or name one with --pairs.")


def _lines(file):
    """Return (number, fields) of the lines that are not blank, numbers counted from 1."""
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not a text file"
        raise InputError(f"can't read the pairs {file}: {why}; give a file like LFW's pairs.txt.") from None
    lines = ((number, line.split("\t" if "\t" in line else None)) for number, line in enumerate(text.splitlines(), 1))
    return [(number, [field.strip() for field in fields]) for number, fields in lines if any(fields)]


def _parse(file, lines):
    """Return P pairs of image names without extension, whether they are genuine, bool (P,), and folds, int64 (P,)."""
    header = lines[0][1] if lines else []
    if not 1 <= len(header) <= 2 or not all(_is_count(field) for field in header):
        raise InputError(f"{file} does not begin with LFW's header, `10 300` or `300`; "
                         "give a file like LFW's pairs.txt.")
    size = 2 * int(header[-1])
    rows = [_names(file, number, fields) for number, fields in lines[1:]]
    folds = int(header[0]) if len(header) == 2 else max(1, len(rows) // size)
    if len(rows) != folds * size:
        raise InputError(f"{file} announces {folds} x {size} = {folds * size} pairs but has {len(rows)}; "
                         "complete it or mend its first line.")
    same = np.array([len(fields) == 3 for _, fields in lines[1:]])
    if folds < 2 or same.all() or not same.any():
        raise InputError(f"{file} has {folds} fold(s), {same.sum()} genuine and {(~same).sum()} impostor pairs; "
                         "the protocol needs at least two folds and both kinds.")
    return rows, same, np.arange(len(rows)) // size


def _names(file, number, fields):
    if len(fields) == 3:
        fields = [fields[0], fields[1], fields[0], fields[2]]
    elif len(fields) == 4 and fields[0] == fields[2]:
        raise InputError(f"{file}, line {number}: an impostor pair of one person ({fields[0]}); mend the line.")
    if len(fields) != 4 or not all(fields) or not _is_count(fields[1]) or not _is_count(fields[3]):
        raise InputError(f"{file}, line {number}: expected `Name i j` or `Name1 i Name2 j`; mend the line.")
    return tuple(f"{name}/{name}_{int(i):04d}" for name, i in (fields[:2], fields[2:]))


def _is_count(field):
    return field.isascii() and field.isdigit() and len(field) <= 9 and int(field) > 0


def _first(items, separator=", ", count=3):
    return separator.join(items[:count]) + (f"{separator}..." if len(items) > count else "")
