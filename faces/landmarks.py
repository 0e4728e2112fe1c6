"""Read and write lists of images: tab-separated landmark lists (`path x1 y1 ... x5 y5`, or with a label after the path)
and lists of aligned faces (`path label`)."""
import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from faces.files import CACHE, InputError, atomic_write, inside

LANDMARKS = "landmark list", "lfw_landmark.py and casia_landmark.py in mtcnn/ write one"
ALIGNED = "list", "pass a text file with lines of `path label`"


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
        InputError: the file can't be read or is empty; a line has another number of fields, a value that is not a
            finite number, or a path that leaves its folder or occurs twice.
    """
    columns = 12 if labelled else 11
    paths, labels, points = [], [], []
    for number, line in _lines(path, *LANDMARKS):
        fields = line.rstrip().split("\t")
        if len(fields) != columns:
            raise InputError(f"{path}, line {number}: expected {columns} tab-separated fields (path, "
                             f"{'label, ' if labelled else ''}ten numbers) but found {len(fields)}; correct the line.")
        try:
            inside(Path(path).parent, fields[0])
            label = _label(fields[1]) if labelled else 0
            values = np.array(fields[columns - 10:], np.float32)
            if not np.isfinite(values).all():
                raise ValueError
        except ValueError:
            raise InputError(f"{path}, line {number}: a value is not a number; correct the line.") from None
        paths.append(fields[0])
        labels.append(label)
        points.append(values)
    _check_paths(paths, path, *LANDMARKS)
    return LandmarkList(paths, np.array(labels, np.int64) if labelled else None, np.array(points).reshape(-1, 5, 2))


def read_labels(path):
    """Read a list of aligned faces, with lines of `path label` separated by a tab or spaces.

    Args:
        path: the file. Paths may contain spaces; the label follows the last one.

    Returns:
        (list of N relative paths, int64 (N,) labels).

    Raises:
        InputError: the file can't be read or is empty; a label is not a whole number; a path leaves its folder or
            occurs twice.
    """
    paths, labels = [], []
    for number, line in _lines(path, *ALIGNED):
        name, *label = line.strip().rsplit(maxsplit=1)
        try:
            inside(Path(path).parent, name)
            paths.append(name)
            labels.append(_label(*label))
        except (ValueError, TypeError):
            raise InputError(f"{path}, line {number}: expected a path and a whole number, the label; correct the line."
                             ) from None
    _check_paths(paths, path, *ALIGNED)
    return paths, np.array(labels, np.int64)


def write_landmarks(path, rows):
    """Write a landmark list, atomically.

    Args:
        rows: iterable of (path, points) or (path, label, points); points float (5, 2).
    """
    with atomic_write(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(format_line(*row))


def default_list(root, name):
    """Return the default path of the list `name` for the images in `root`.

    It is in cache/ of this clone, because data sets are often read-only; a hash distinguishes folders of the same name.
    """
    root = Path(root).expanduser().resolve()
    return CACHE / f"{root.name}-{hashlib.sha256(str(root).encode()).hexdigest()[:8]}" / name


def format_line(path, *label_and_points):
    """Return one line of a list. Two decimals are more precise than any detector."""
    *label, points = label_and_points
    return "\t".join([path, *map(str, label), *(f"{v:.2f}" for v in np.ravel(points))]) + "\n"


def _lines(path, what, advice):
    """Return (number, line) of all lines that are not blank."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not a text file"
        raise InputError(f"can't read the {what} {path}: {why}; {advice}.") from None
    return [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]


def _label(text):
    label = int(text)
    if not 0 <= label < 2**31:
        raise ValueError
    return label


def _check_paths(paths, path, what, advice):
    if not paths:
        raise InputError(f"{path} is empty; {advice}.")
    if len(set(paths)) != len(paths):
        seen = set()
        twice = next(p for p in paths if p in seen or seen.add(p))
        raise InputError(f"{path} lists {twice} twice; remove one of the lines.")
