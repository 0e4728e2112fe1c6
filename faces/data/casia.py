"""List the photos of CASIA-WebFace in any of its common formats: person folders or a zip of them with a landmark list,
or aligned faces in folders, in a zip, in RecordIO (InsightFace, DCFace), or in an LMDB (HSFace, VFace)."""
import re
from collections import Counter
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np

from faces.data.recordio import Records
from faces.data.sources import Folder, Zip, open_source
from faces.files import InputError, count_of
from faces.landmarks import found_list, normal_form, read_labels, read_landmarks

LANDMARK_LIST = "casia_landmark.txt"
MAX_LOST = 0.01     # fraction of the files that may be photos but can't be read; more of them suggest a wrong folder
MAX_STRAYS = 10     # photos outside the person folders, beyond which the layout is not what it seems
# Identities in both CASIA-WebFace and LFW: the union of the lists in the FaceDatasets and AM-Softmax repositories.
LFW_OVERLAP = frozenset("""
    0000513 0004539 0004763 0005009 0005082 0005172 0166921 0208962 0430107 0454042 0662519 0706787 0955471 1056413
    1091782 1193098 1303492 2425974 3478560""".split())


class TrainingList(NamedTuple):
    """The images of a training set."""
    source: Folder | Zip | Records
    paths: list                  # the N names of the images in `source`
    labels: np.ndarray           # int64 (N,), 0..C-1
    points: np.ndarray | None    # float32 (N, 5, 2), landmarks; None if the faces are already aligned
    notes: tuple = ()            # sentences about what was left out, and where it was found
    gaps: str = ""               # how the labels were renumbered, as the end of a phrase about the people


def list_casia(root, landmarks=None, label_list=None) -> TrainingList:
    """Return the TrainingList of a folder of person folders (0000045/001.jpg), a zip of it, RecordIO, or an LMDB.

    Without a list of landmarks with labels, and without a `label_list` of aligned faces, `path label`, the list is
    casia_landmark.txt in the set, or else what mtcnn/casia_landmark.py wrote for it. Without any list, faces must be
    aligned, and the person folders are numbered in sorted order. RecordIO and LMDB take no list. Gaps between labels
    are closed. Raises InputError if the set or a list is missing or malformed, is LFW, or has fewer than two people.
    """
    if landmarks is not None and label_list is not None:
        raise InputError(f"--landmarks {landmarks} and --list {label_list} can't be combined; pass only one of them.")
    source, file = open_source(root), label_list or landmarks
    if isinstance(source, Records):
        if file is not None:
            raise InputError(f"{source.path} already contains labels and aligned faces; leave out {file}.")
        return _renumbered(TrainingList(source, source.names(), source.labels, None, source.notes), source.path)
    file = file or found_list(source, LANDMARK_LIST)
    if file is None:
        paths, notes = list_photos(source)
        labels = np.unique([person(path) for path in paths], return_inverse=True)[1].astype(np.int64)
        return _renumbered(TrainingList(source, paths, labels, None, notes), source)
    paths, labels, points = (*read_labels(file, source.root), None) if label_list else \
        read_landmarks(file, True, source.root)
    paths = [name.removeprefix(source.wrapper) for name in paths]
    refuse_lfw(source, paths)
    listed = set(map(normal_form, paths))
    unlisted = sum(normal_form(name) not in listed for name in source.names())
    notes = _left_out(source, unlisted, "photo~ not in the list")
    return _renumbered(TrainingList(source, paths, labels, points, notes), file)


def person(path: str) -> str:
    """Return the person in a photo of a set without a list: the folder that directly holds it, such as part/0000045."""
    return path.rpartition("/")[0]


def list_photos(source) -> tuple[list[str], tuple[str, ...]]:
    """Return the sorted paths of the photos in the person folders of a Folder or Zip, which are all at one level, and
    sentences on what is left out, such as photos elsewhere. Raises InputError if there are fewer than two people, the
    set is LFW, or too much would be left out."""
    levels = Counter(path.count("/") for path in source.names())
    level = max(levels, key=levels.get, default=0)
    paths = [path for path in source.names() if path.count("/") == level]
    strays = [path for path in source.names() if path.count("/") != level]
    people, left_out = set(map(person, paths)), source.scan.left_out()
    if len(people) < 2:
        where = ", because they are not in folders" if paths and not level else ""
        raise InputError(f"{source} has {count_of(len(paths), 'photo~')} of {count_of(len(people), 'person')}{where}; "
                         "pass a folder with one folder per person, such as 0000045/001.jpg, of several people"
                         f"{left_out and '; left out: '}{left_out}.")
    refuse_lfw(source, paths)
    if len(strays) > max(MAX_STRAYS, MAX_LOST * len(paths)):
        raise InputError(f"{source} has {len(paths):,} photos in folders such as {person(paths[0])}, but "
                         f"{len(strays):,} at other levels, such as {strays[0]}; move all person folders to one level.")
    lost, total = sum(source.scan.lost.values()), len(source.names())
    if lost > MAX_LOST * (total + lost):
        raise InputError(f"{lost:,} of {total + lost:,} files in {source} can't be read ({left_out}); "
                         "convert them to JPEG or PNG, make them readable, or remove them.")
    notes = _left_out(source, len(strays), "photo~ outside the person folders")
    parents, names = {person(name) for name in people}, {name.rpartition("/")[2] for name in people}
    if len(parents) == 1 and (source.wrapper or "" not in parents):
        notes += (f"the person folders are in {source.root / parents.pop()}",)
    if len(names) < len(people):
        notes += (f"{len(people):,} person folders have only {count_of(len(names), 'different name~')}; folders "
                  "of the same name in different folders count as different people",)
    return paths, notes


def refuse_lfw(source, paths: list[str]):
    """Raise InputError if the photos are those of LFW, the test set: Name/Name_0001.jpg, and a pairs.txt or .csv."""
    sample = paths[::len(paths) // 1000 + 1]
    matching = sum(bool(re.search(r"(?:^|/)([^/]+)/\1_\d{4}\.\w+$", path)) for path in sample)
    pairs = [folder / name for name in ("pairs.txt", "pairs.csv") for folder in (source.root, *source.root.parents[:2])]
    if matching > len(sample) / 2 and (any(file.is_file() for file in pairs)
                                       or isinstance(source, Zip) and "pairs.txt" in source.members):
        raise InputError(f"{source} is LFW, the test set, with photos such as {paths[0]} and a pairs.txt; training on "
                         "it would make its evaluation meaningless; pass a training set such as CASIA-WebFace.")


def without_lfw_overlap(listing: TrainingList) -> np.ndarray:
    """Return a mask, bool (N,), of the images whose person, by the name of a folder, is not in LFW_OVERLAP."""
    if isinstance(listing.source, Records):
        raise InputError(f"{listing.source.path} numbers its people instead of naming them, so those in LFW can't be "
                         "dropped; leave out --drop-lfw-overlap.")
    return np.array([LFW_OVERLAP.isdisjoint(PurePosixPath(path).parts) for path in listing.paths])


def _left_out(source, unused, kind):
    """Return the sentence about what is left out of a set, such as `unused` photos of a kind, in a tuple if any."""
    counts = ", ".join(filter(None, [unused and count_of(unused, kind), source.scan.left_out()]))
    return (f"left out: {counts}",) if counts else ()


def _renumbered(listing, labels_from):
    """Return a TrainingList with labels 0..C-1 in the same order."""
    people, renumbered = np.unique(listing.labels, return_inverse=True)
    if len(people) < 2:
        raise InputError(f"{labels_from} lists only one person; training needs at least two.")
    if people[-1] == len(people) - 1:
        return listing
    gaps = f", whose labels {people[0]} to {people[-1]} are renumbered from 0"
    return listing._replace(labels=renumbered.astype(np.int64), gaps=gaps)
