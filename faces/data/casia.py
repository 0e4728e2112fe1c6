"""List the images of CASIA-WebFace in any of its common formats: person folders or a zip of them with a landmark list,
or aligned faces in folders, in a zip, or in InsightFace's RecordIO."""
import re
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from faces.data.recordio import Records
from faces.data.sources import Folder, Zip, is_zip, open_source
from faces.files import InputError, count_of, existing_folder
from faces.landmarks import default_list, normal_form, read_labels, read_landmarks

LANDMARK_LIST = "casia_landmark.txt"
MAX_LOST = 0.01     # fraction of the files that may be photos but can't be read; more of them suggest a wrong folder
MAX_STRAYS = 10     # photos outside the person folders, beyond which the layout is not what it seems
# These identities are in both CASIA-WebFace and LFW. The set is the union of the lists in the FaceDatasets and
# AM-Softmax repositories.
LFW_OVERLAP = frozenset("""
    0000513 0004539 0004763 0005009 0005082 0005172 0166921 0208962 0430107 0454042 0662519 0706787 0955471 1056413
    1091782 1193098 1303492 2425974 3478560""".split())


class TrainingList(NamedTuple):
    """The images of a training set.

    source: Folder, Zip or Records.
    paths: the N names of the images in `source`.
    labels: int64 (N,), 0..C-1.
    points: float32 (N, 5, 2), landmarks; None if the faces are already aligned.
    notes: sentences about what was left out, and where it was found.
    gaps: how the labels were renumbered, as the end of a phrase about the people; "" if they were not.
    """
    source: Folder | Zip | Records
    paths: list
    labels: np.ndarray
    points: np.ndarray | None
    notes: tuple = ()
    gaps: str = ""

    def face(self, row):
        """Return the arguments of faces.align.load_face() for a row: the image, and its landmarks or None."""
        points = None if self.points is None else self.points[row]
        return self.source.open(self.paths[row]), points


def list_casia(root, landmarks=None, label_list=None):
    """Return the TrainingList of a data set, with the landmark list that belongs to it unless a list is passed.

    Args:
        root, label_list: see read_casia().
        landmarks: landmark list with labels. Without it and a label list, it is casia_landmark.txt in `root`, or else
            the list that mtcnn/casia_landmark.py wrote for it; without any list, faces must be aligned already.

    Raises:
        InputError: see read_casia().
    """
    if landmarks is None and label_list is None:
        own = Path(root).expanduser() / LANDMARK_LIST
        landmarks = next((path for path in (own, default_list(root, LANDMARK_LIST)) if path.is_file()), None)
    return read_casia(root, landmarks, label_list)


def read_casia(root, landmarks=None, label_list=None):
    """Return the TrainingList of a data set.

    Args:
        root: folder of person folders (0000045/001.jpg), a zip of it, or a RecordIO folder (train.rec).
        landmarks: landmark list with labels; None for faces that are already aligned, 112x96 or 112x112.
        label_list: list `path label` of aligned faces; None numbers the person folders in sorted order. A RecordIO
            folder has its own labels and takes neither list.

    Labels are renumbered from 0 if they have gaps.

    Raises:
        InputError: the data set is missing or unreadable, a list is malformed, both lists were passed, or the set has
            fewer than two people, is LFW, or has too many files that can't be read.
    """
    source, labels_from = _open(root), label_list or landmarks
    if landmarks is not None and label_list is not None:
        raise InputError(f"{landmarks} and {label_list} can't be combined; pass only one of --landmarks and --list.")
    if isinstance(source, Records):
        if labels_from is not None:
            raise InputError(f"{source.path} already contains labels and aligned faces; leave out {labels_from}.")
        paths, labels, points, labels_from = source.names(), source.labels, None, source.path
        notes = ()
    elif labels_from is None:
        paths, notes = list_photos(source)
        labels, points = np.unique([person(path) for path in paths], return_inverse=True)[1].astype(np.int64), None
        labels_from = source
    else:
        paths, labels, points = (*read_labels(label_list), None) if label_list else read_landmarks(landmarks, True)
        refuse_lfw(source, paths)
        listed = set(map(normal_form, paths))
        unlisted = sum(normal_form(path) not in listed for path in source.names())
        notes = _left_out_notes(source, unlisted, "photo~ not in the list")
    labels, gaps = _renumber(labels, labels_from)
    return TrainingList(source, paths, labels, points, notes, gaps)


def person(path):
    """Return the person in a photo of a set without a list: the folder that directly holds it, such as part/0000045."""
    return path.rpartition("/")[0]


def list_photos(source):
    """List the photos in the person folders of a set; every program that has no list of them takes these.

    Person folders are all at one level, below `source` or deeper. Photos elsewhere belong to nobody and are left out.

    Args:
        source: Folder or Zip.

    Returns:
        (sorted relative paths, tuple of sentences about what was left out).

    Raises:
        InputError: there are fewer than two person folders, or the set is LFW; or more than MAX_LOST of the files or
            MAX_STRAYS photos would be left out.
    """
    levels = Counter(path.count("/") for path in source.names())
    level = max(levels, key=levels.get, default=0)
    paths = [path for path in source.names() if path.count("/") == level]
    strays = [path for path in source.names() if path.count("/") != level]
    people = set(map(person, paths))
    if len(people) < 2:
        where = ", because they are not in folders" if paths and not level else ""
        left_out = f"; left out: {source.scan.left_out()}" if source.scan.left_out() else ""
        found = f"{count_of(len(paths), 'photo~')} of {count_of(len(people), 'person')}" if paths else "no photos"
        raise InputError(f"{source} has {found}{where}; pass a folder with one folder per person, such as "
                         f"0000045/001.jpg, of several people{left_out}.")
    refuse_lfw(source, paths)
    if len(strays) > max(MAX_STRAYS, MAX_LOST * len(paths)):
        raise InputError(f"{source} has {len(paths):,} photos in folders such as {person(paths[0])}, but "
                         f"{len(strays):,} at other levels, such as {strays[0]}; move all person folders to one level.")
    _refuse_lost(source)
    left_out = _left_out_notes(source, len(strays), "photo~ outside the person folders")
    return paths, left_out + _layout_notes(source, people)


def refuse_lfw(source, paths):
    """Raise InputError if the photos are those of LFW, the test set: Name/Name_0001.jpg, and a pairs.txt."""
    sample = paths[::-(-len(paths) // 1000)] if paths else []
    matching = sum(bool(re.search(r"(?:^|/)([^/]+)/\1_\d{4}\.\w+$", path)) for path in sample)
    root = Path(str(source))
    beside = [root.parent / "pairs.txt"] + ([root / "pairs.txt"] if isinstance(source, Folder) else [])
    if matching > len(sample) / 2 and (any(path.is_file() for path in beside)
                                       or isinstance(source, Zip) and "pairs.txt" in source.members):
        raise InputError(f"{source} is LFW, the test set, with photos such as {paths[0]} and a pairs.txt; training on "
                         "it would make its evaluation meaningless; pass a training set such as CASIA-WebFace.")


def _open(root):
    root = Path(root).expanduser()
    if not is_zip(root):
        root = existing_folder(root, "CASIA-WebFace")
        if (root / "train.rec").is_file():
            return Records(root)
    return open_source(root)


def _refuse_lost(source):
    lost, total = sum(source.scan.lost.values()), len(source.names())
    if lost > MAX_LOST * (total + lost):
        raise InputError(f"{lost:,} of {total + lost:,} files in {source} can't be read ({source.scan.left_out()}); "
                         "convert them to JPEG or PNG, make them readable, or remove them.")


def _left_out_notes(source, unused, kind):
    """Return a tuple with one sentence about what is left out of a set, or an empty tuple.

    Args:
        unused: number of photos that are left out.
        kind: what they are, for the sentence.
    """
    counts = [count_of(unused, kind)] * (unused > 0) + [source.scan.left_out()] * bool(source.scan.left_out())
    return (f"left out: {', '.join(counts)}",) if counts else ()


def _layout_notes(source, people):
    """Return a tuple of sentences about where the person folders are, unless they are directly in the set."""
    parents, names = {name.rpartition("/")[0] for name in people}, {name.rpartition("/")[2] for name in people}
    notes = ()
    if len(parents) == 1 and "" not in parents:
        notes += (f"the person folders are in {source}/{parents.pop()}",)
    if len(names) < len(people):
        notes += (f"{len(people):,} person folders have only {count_of(len(names), 'different name~')}; folders "
                  "of the same name in different folders count as different people",)
    return notes


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


def _renumber(labels, path):
    """Return labels 0..C-1 in the same order, int64 (N,), and what TrainingList.gaps says about that."""
    people, renumbered = np.unique(labels, return_inverse=True)
    if len(people) < 2:
        raise InputError(f"{path} lists only one person; training needs at least two.")
    if people[-1] == len(people) - 1:
        return labels, ""
    return renumbered.astype(np.int64), f", whose labels {people[0]} to {people[-1]} are renumbered from 0"
