"""Lists of images: tab-separated landmarks, `path x1 y1 ... x5 y5`, or with a label after the path; and `path label`
for faces that are aligned already."""
import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from faces.files import CACHE, InputError, atomic_write, inside

LANDMARKS = "landmark list", "lfw_landmark.py and casia_landmark.py in mtcnn/ write one"
ALIGNED = "list", "give a text of lines `path label`"


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
    columns = 12 if labelled else 11
    paths, labels, points = [], [], []
    for number, line in _lines(path, *LANDMARKS):
        fields = line.rstrip().split("\t")
        if len(fields) != columns:
            raise InputError(f"{path}, line {number}: expected {columns} tab-separated fields (path, "
                             f"{'label, ' if labelled else ''}ten numbers) but found {len(fields)}; mend the line.")
        try:
            inside(Path(path).parent, fields[0])
            label = _label(fields[1]) if labelled else 0
            values = np.array(fields[columns - 10:], np.float32)
            if not np.isfinite(values).all():
                raise ValueError
        except ValueError:
            raise InputError(f"{path}, line {number}: a value is not a number; mend the line.") from None
        paths.append(fields[0])
        labels.append(label)
        points.append(values)
    _check_paths(paths, path, *LANDMARKS)
    return LandmarkList(paths, np.array(labels, np.int64) if labelled else None, np.array(points).reshape(-1, 5, 2))


def read_labels(path):
    """Read a list of faces that are aligned already: `path label` in each line, a tab or spaces between.

    Args:
        path: the file. The path in a line may hold spaces itself: the label is what follows the last.

    Returns:
        (list of N relative paths, int64 (N,) labels).

    Raises:
        InputError: no such file, a label that is no whole number, a path that leaves its folder or comes twice, no
            lines.
    """
    paths, labels = [], []
    for number, line in _lines(path, *ALIGNED):
        name, *label = line.strip().rsplit(maxsplit=1)
        try:
            inside(Path(path).parent, name)
            paths.append(name)
            labels.append(_label(*label))
        except (ValueError, TypeError):
            raise InputError(f"{path}, line {number}: expected a path and a whole number, the label; mend the line."
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


def _lines(path, what, advice):
    """Return (number, line) of the lines that are not blank."""
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
