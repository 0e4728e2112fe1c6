"""Landmark lists: tab-separated text, `path x1 y1 ... x5 y5`, or `path label x1 y1 ... x5 y5` with a label."""
import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from faces.errors import InputError
from faces.files import atomic_write, inside

CACHE = Path(__file__).resolve().parents[1] / "cache"


class LandmarkList(NamedTuple):
    """paths: N relative paths; labels: int64 (N,) or None; points: float32 (N, 5, 2), pixels of the whole image."""
    paths: list
    labels: np.ndarray | None
    points: np.ndarray


def read_landmarks(path, labelled):
    """Read a landmark list.

    Args:
        path: the file. A trailing tab is accepted; numbers may be integers or decimals.
        labelled: whether a label follows the path (CASIA) or not (LFW).

    Raises:
        InputError: no such file, a line with another number of fields, a value that is no finite number, a path
            that leaves its folder or comes twice, no lines.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not a text file"
        raise InputError(f"can't read the landmark list {path}: {why}; lfw_landmark.py and casia_landmark.py in "
                         "mtcnn/ write one.") from None
    columns = 12 if labelled else 11
    paths, labels, points = [], [], []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        fields = line.rstrip().split("\t")
        if len(fields) != columns:
            raise InputError(f"{path}, line {number}: expected {columns} tab-separated fields (path, "
                             f"{'label, ' if labelled else ''}ten numbers) but found {len(fields)}; mend the line.")
        try:
            inside(path.parent, fields[0])
            label = int(fields[1]) if labelled else 0
            values = np.array(fields[columns - 10:], np.float32)
            if not np.isfinite(values).all() or label < 0:
                raise ValueError
        except ValueError:
            raise InputError(f"{path}, line {number}: a value is not a number; mend the line.") from None
        paths.append(fields[0])
        labels.append(label)
        points.append(values)
    if not paths:
        raise InputError(f"{path} is empty; lfw_landmark.py and casia_landmark.py in mtcnn/ write such a list.")
    if len(set(paths)) != len(paths):
        seen = set()
        twice = next(p for p in paths if p in seen or seen.add(p))
        raise InputError(f"{path} lists {twice} twice; remove one of the lines.")
    return LandmarkList(paths, np.array(labels, np.int64) if labelled else None, np.array(points).reshape(-1, 5, 2))


def write_landmarks(path, rows):
    """Write a landmark list, atomically.

    Args:
        rows: iterable of (path, points) or (path, label, points); points float (5, 2).
    """
    with atomic_write(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(format_line(*row))


def default_list(root, name):
    """Return where the list `name` of the images below `root` is kept unless the user says otherwise.

    It is a folder of its own in this repository's cache/, because data sets are often read-only; the hash keeps two
    folders of the same name apart.
    """
    root = Path(root).expanduser().resolve()
    return CACHE / f"{root.name}-{hashlib.sha256(str(root).encode()).hexdigest()[:8]}" / name


def format_line(path, *label_and_points):
    """Return one line of a list: two decimals, which is finer than any detector is."""
    *label, points = label_and_points
    return "\t".join([path, *map(str, label), *(f"{v:.2f}" for v in np.ravel(points))]) + "\n"
