"""List the images of CASIA-WebFace in any of its common formats: person folders or a zip of them with a landmark list,
or aligned faces in folders, in a zip, or in InsightFace's RecordIO."""
import os
import zipfile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from faces.data.recordio import Records
from faces.files import InputError, folder
from faces.images import EXTENSIONS, MAX_BYTES, UnreadableImage, list_images
from faces.landmarks import read_labels, read_landmarks

# These identities are in both CASIA-WebFace and LFW. The set is the union of the lists in the FaceDatasets and
# AM-Softmax repositories.
LFW_OVERLAP = frozenset("""
    0000513 0004539 0004763 0005009 0005082 0005172 0166921 0208962 0430107 0454042 0662519 0706787 0955471 1056413
    1091782 1193098 1303492 2425974 3478560""".split())


class Folder:
    """The images in a folder and its subfolders."""

    def __init__(self, root):
        self.root = Path(root)

    def __str__(self):
        return str(self.root)

    def names(self):
        """Return the relative paths of all images, sorted."""
        return list_images(self.root)

    def open(self, name):
        """Return the path of the image `name`, to pass to read_image(); the name was checked when the list was read."""
        return os.path.join(self.root, name)


class Zip:
    """The images in a zip, read without unpacking it. Names omit a single top folder around all person folders."""

    def __init__(self, path):
        self.path = Path(path)
        try:
            self.archive = zipfile.ZipFile(self.path)
        except (OSError, zipfile.BadZipFile) as error:
            raise InputError(f"{path} is not a readable zip file ({error}); download it again.") from None
        members = {info.filename: info for info in self.archive.infolist()
                   if PurePosixPath(info.filename).suffix.lower() in EXTENSIONS}
        top_folders = {name.split("/")[0] for name in members}
        nested = all(name.count("/") >= 2 for name in members)
        prefix = len(top_folders.pop()) + 1 if len(top_folders) == 1 and nested else 0
        self.members = {name[prefix:]: info for name, info in members.items()}

    def __str__(self):
        return str(self.path)

    def names(self):
        """Return the relative paths of all images, sorted."""
        return sorted(self.members)

    def open(self, name):
        """Return the bytes of the image `name`.

        Raises:
            UnreadableImage: the member is missing, damaged, or over MAX_BYTES.
        """
        info = self.members.get(name)
        if info is None:
            raise UnreadableImage("not in the zip")
        if info.file_size > MAX_BYTES:
            raise UnreadableImage(f"over {MAX_BYTES // 10**6} MB")
        try:
            return self.archive.read(info)
        except Exception as error:  # decompressors raise many kinds of exceptions on damaged members
            raise UnreadableImage(f"damaged in the zip ({error})") from error


class TrainingList(NamedTuple):
    """The images of a training set.

    source: Folder, Zip or Records.
    paths: the N names of the images in `source`.
    labels: int64 (N,), 0..C-1.
    points: float32 (N, 5, 2), landmarks; None if the faces are already aligned.
    """
    source: Folder | Zip | Records
    paths: list
    labels: np.ndarray
    points: np.ndarray | None

    def face(self, row):
        """Return the arguments of faces.align.load_face() for a row: the image, and its landmarks or None."""
        points = None if self.points is None else self.points[row]
        return self.source.open(self.paths[row]), points


def read_casia(root, landmarks=None, labels=None):
    """Return the TrainingList of a data set.

    Args:
        root: folder of person folders (0000045/001.jpg), a zip of it, or a RecordIO folder (train.rec).
        landmarks: landmark list with labels; None for faces that are already aligned, 112x96 or 112x112.
        labels: list `path label` of aligned faces; None numbers the person folders in sorted order. A RecordIO
            folder has its own labels and takes neither list.

    Raises:
        InputError: the data set is missing or unreadable, a list is malformed, both lists were passed, the labels have
            gaps, or the set has fewer than two people.
    """
    source, labels_from = _open(root), labels or landmarks
    if landmarks is not None and labels is not None:
        raise InputError(f"{landmarks} and {labels} can't be combined; pass only one of --landmarks and --list.")
    if isinstance(source, Records):
        if labels_from is not None:
            raise InputError(f"{source.path} already contains labels and aligned faces; leave out {labels_from}.")
        paths, labels, points, labels_from = source.names(), source.labels, None, source.path
    elif labels is not None:
        (paths, labels), points = read_labels(labels), None
    elif landmarks is not None:
        paths, labels, points = read_landmarks(landmarks, labeled=True)
    else:
        return _list_person_folders(source)
    _check_labels(labels, labels_from)
    return TrainingList(source, paths, labels, points)


def _open(root):
    root = Path(root).expanduser()
    if root.suffix.lower() == ".zip" and root.is_file():
        return Zip(root)
    root = folder(root, "CASIA-WebFace")
    return Records(root) if (root / "train.rec").is_file() else Folder(root)


def _list_person_folders(source):
    paths = source.names()
    people = [str(PurePosixPath(path).parent) for path in paths]
    if len(set(people)) < 2:
        raise InputError(f"{source} contains {len(paths)} images of {len(set(people))} people; expected person "
                         "folders, such as 0000045/001.jpg, of at least two people.")
    return TrainingList(source, paths, np.unique(people, return_inverse=True)[1].astype(np.int64), None)


def without_lfw_overlap(listing):
    """Return a mask of the images whose person is not in LFW_OVERLAP.

    Args:
        listing: TrainingList whose paths contain the person folders.

    Returns:
        bool (N,).

    Raises:
        InputError: the source numbers its people instead of naming them.
    """
    if isinstance(listing.source, Records):
        raise InputError(f"{listing.source.path} numbers its people instead of naming them, so those in LFW can't be "
                         "dropped; leave out --drop-lfw-overlap.")
    return np.array([LFW_OVERLAP.isdisjoint(PurePosixPath(path).parts) for path in listing.paths])


def _check_labels(labels, path):
    people = np.unique(labels)
    if people[-1] >= len(people):
        missing = int(np.flatnonzero(people != np.arange(len(people)))[0])
        raise InputError(f"{path}: labels must be 0, 1, 2, ... without gaps, but {missing} is missing and the largest "
                         f"is {people[-1]}; renumber the people.")
    if len(people) < 2:
        raise InputError(f"{path} lists only one person; training needs at least two.")
