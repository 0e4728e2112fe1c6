"""CASIA-WebFace as people have it: person folders or a zip of them with a landmark list, or faces already aligned in
folders, in a zip, or as InsightFace's RecordIO."""
import os
import zipfile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from faces.data.recordio import Records
from faces.files import InputError, folder
from faces.images import EXTENSIONS, MAX_BYTES, UnreadableImage, list_images
from faces.landmarks import read_labels, read_landmarks

# Identities that CASIA-WebFace shares with LFW: the union of the lists in the FaceDatasets and AM-Softmax repositories.
LFW_OVERLAP = frozenset("""
    0000513 0004539 0004763 0005009 0005082 0005172 0166921 0208962 0430107 0454042 0662519 0706787 0955471 1056413
    1091782 1193098 1303492 2425974 3478560""".split())


class Folder:
    """Images below a folder."""

    def __init__(self, root):
        self.root = Path(root)

    def __str__(self):
        return str(self.root)

    def names(self):
        """Relative paths of all images, sorted."""
        return list_images(self.root)

    def open(self, name):
        """What faces.images.read_image takes to read the image `name`, which the list's reader has checked."""
        return os.path.join(self.root, name)


class Zip:
    """Images in a zip, read in place. One folder around everything, as zips often have, is not part of a name."""

    def __init__(self, path):
        self.path = Path(path)
        try:
            self.archive = zipfile.ZipFile(self.path)
        except (OSError, zipfile.BadZipFile) as error:
            raise InputError(f"{path} is not a zip that can be read ({error}); check the download.") from None
        members = {info.filename: info for info in self.archive.infolist()
                   if PurePosixPath(info.filename).suffix.lower() in EXTENSIONS}
        tops = {name.split("/")[0] for name in members}
        deep = all(name.count("/") >= 2 for name in members)
        cut = len(tops.pop()) + 1 if len(tops) == 1 and deep else 0
        self.members = {name[cut:]: info for name, info in members.items()}

    def __str__(self):
        return str(self.path)

    def names(self):
        """Relative paths of all images, sorted."""
        return sorted(self.members)

    def open(self, name):
        """The bytes of the image `name`.

        Raises:
            UnreadableImage: no such member, damaged, or larger than any image has a right to be.
        """
        info = self.members.get(name)
        if info is None:
            raise UnreadableImage("not in the zip")
        if info.file_size > MAX_BYTES:
            raise UnreadableImage(f"over {MAX_BYTES // 10**6} MB")
        try:
            return self.archive.read(info)
        except Exception as error:  # damaged members raise whatever their decompressor does
            raise UnreadableImage(f"damaged in the zip ({error})") from error


class TrainingList(NamedTuple):
    """source: Folder, Zip or Records; paths: N names in it; labels: int64 (N,), 0..C-1; points: float32 (N, 5, 2), or
    None where the faces are aligned already."""
    source: Folder | Zip | Records
    paths: list
    labels: np.ndarray
    points: np.ndarray | None

    def face(self, row):
        """What faces.align.load_face takes to read the face of a row: the image, and its landmarks or None."""
        return self.source.open(self.paths[row]), None if self.points is None else self.points[row]


def read_casia(root, landmarks=None, labels=None):
    """List the training images.

    Args:
        root: folder of person folders (0000045/001.jpg), a zip of it, or a RecordIO folder (train.rec).
        landmarks: landmark list with labels; None for faces aligned to 112x96 or 112x112.
        labels: list `path label` of aligned faces; None: labels are the person folders in sorted order. A RecordIO
            folder has its own labels and neither list.

    Raises:
        InputError: nothing there, a bad list, two lists, or labels that leave a gap.
    """
    source, given = _open(root), labels or landmarks
    if landmarks is not None and labels is not None:
        raise InputError(f"{landmarks} and {labels} can't be used together; give one of --landmarks and --list.")
    if isinstance(source, Records):
        if given is not None:
            raise InputError(f"{source.path} has labels and aligned faces; leave {given} out.")
        paths, labels, points, given = source.names(), source.labels, None, source.path
    elif labels is not None:
        (paths, labels), points = read_labels(labels), None
    elif landmarks is not None:
        paths, labels, points = read_landmarks(landmarks, labelled=True)
    else:
        return _by_person_folder(source)
    _check_labels(labels, given)
    return TrainingList(source, paths, labels, points)


def _open(root):
    root = Path(root).expanduser()
    if root.suffix.lower() == ".zip" and root.is_file():
        return Zip(root)
    root = folder(root, "CASIA-WebFace")
    return Records(root) if (root / "train.rec").is_file() else Folder(root)


def _by_person_folder(source):
    paths = source.names()
    people = [str(PurePosixPath(path).parent) for path in paths]
    if len(set(people)) < 2:
        raise InputError(f"{source} holds {len(paths)} images of {len(set(people))} people; expected person folders "
                         "such as 0000045/001.jpg of at least two people.")
    return TrainingList(source, paths, np.unique(people, return_inverse=True)[1].astype(np.int64), None)


def without_lfw_overlap(listing):
    """Boolean (N,): which images of a TrainingList are of nobody in LFW_OVERLAP, by the person folder in their path.

    Raises:
        InputError: the source doesn't know the people by name.
    """
    if isinstance(listing.source, Records):
        raise InputError(f"{listing.source.path} numbers its people and doesn't name them, so that those in LFW can't "
                         "be dropped; leave --drop-lfw-overlap out.")
    return np.array([LFW_OVERLAP.isdisjoint(PurePosixPath(path).parts) for path in listing.paths])


def _check_labels(labels, path):
    people = np.unique(labels)
    if people[-1] >= len(people):
        missing = int(np.flatnonzero(people != np.arange(len(people)))[0])
        raise InputError(f"{path}: labels must be 0, 1, 2, ... without a gap, but none is {missing} and the largest is "
                         f"{people[-1]}; number the people anew.")
    if len(people) < 2:
        raise InputError(f"{path} lists one person; training needs at least two.")
