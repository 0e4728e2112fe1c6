"""Read and write lists of images.

A landmark list is tab-separated, `path x1 y1 ... x5 y5` (LFW) or `path label x1 y1 ... x5 y5` (CASIA-WebFace). A list
of aligned faces has lines of `path label`.
"""
import codecs
import hashlib
import io
import itertools
import math
import os
import unicodedata
from array import array
from pathlib import Path
from typing import NamedTuple

import numpy as np

from faces.align import arrangement_problem
from faces.files import CACHE, InputError, atomic_write, read_json, write_json

# Error messages use these: the name of the kind of list, and how to get one.
LANDMARKS = "landmark list", "create one with mtcnn/lfw_landmark.py or mtcnn/casia_landmark.py"
ALIGNED = "list", "pass a text file with lines of `path label`"
MAX_LINE = 20_000    # characters of a line; a path has at most 4,096 bytes


class LandmarkList(NamedTuple):
    """The images and faces of a landmark list.

    paths: N relative paths.
    labels: int64 (N,); None if the list has no labels.
    points: float32 (N, 5, 2), landmarks in pixels of the whole image.
    """
    paths: list
    labels: np.ndarray | None
    points: np.ndarray


def read_landmarks(path, labeled):
    """Read a landmark list.

    Args:
        path: the file. A trailing tab is accepted; numbers may be integers or decimals.
        labeled: whether a label follows the path (CASIA) or not (LFW).

    Returns:
        LandmarkList.

    Raises:
        InputError: the file can't be read or is empty; a line has the wrong number of fields, a value that is not a
            finite number, or a path that leaves the folder or occurs twice; or the landmarks can't be those of faces.
    """
    columns = 12 if labeled else 11
    paths, labels, points = [], array("q"), array("f")    # an array per line would take most of the memory and time
    for number, line in _lines(path, *LANDMARKS):
        fields = line.rstrip().split("\t")
        if len(fields) != columns:
            raise InputError(f"{path}, line {number}: expected {columns} tab-separated fields (path, "
                             f"{'label, ' if labeled else ''}ten numbers) but found {len(fields)}; correct the line.")
        try:
            name = _relative_path(path, number, fields[0])
            label = _label(fields[1]) if labeled else 0
            values = array("f", map(float, fields[columns - 10:]))
            if not all(map(math.isfinite, values)):
                raise ValueError
        except ValueError:
            what = "a label that is a whole number from 0, and " if labeled else ""
            raise InputError(f"{path}, line {number}: expected {what}ten finite numbers as coordinates; correct the "
                             "line.") from None
        paths.append(name)
        labels.append(label)
        points += values
    _check_paths(paths, path, *LANDMARKS)
    points = np.array(points, np.float32).reshape(-1, 5, 2)
    problem = arrangement_problem(points)
    if problem:
        raise InputError(f"{path} is not a usable landmark list: {problem}; expected x1 y1 ... x5 y5 in pixels for "
                         f"the image-left eye, the other eye, the nose, and both corners of the mouth; {LANDMARKS[1]}.")
    return LandmarkList(paths, np.array(labels, np.int64) if labeled else None, points)


def is_landmark_list(path):
    """Return whether the first line of an existing file is one of a landmark list."""
    try:
        _, line = next(read_lines(Path(path)))
        return len(line.rstrip().split("\t")) in (11, 12)
    except (OSError, ValueError, StopIteration):
        return False


def read_labels(path):
    """Read a list of aligned faces: one `path label` per line, separated by a tab or spaces.

    Args:
        path: the file. A path may contain spaces, because the label follows the last space or tab.

    Returns:
        (list of N relative paths, int64 (N,) labels).

    Raises:
        InputError: the file can't be read or is empty; a label is not a whole number; a path leaves the folder or
            occurs twice.
    """
    paths, labels = [], []
    for number, line in _lines(path, *ALIGNED):
        name, *label = line.strip().rsplit(maxsplit=1)
        try:
            paths.append(_relative_path(path, number, name))
            labels.append(_label(*label))
        except (ValueError, TypeError):
            raise InputError(f"{path}, line {number}: expected a path and a whole number as its label; correct the "
                             "line.") from None
    _check_paths(paths, path, *ALIGNED)
    return paths, np.array(labels, np.int64)


def write_landmarks(path, rows, made_from=None):
    """Write a landmark list, atomically.

    Args:
        path: the file.
        rows: iterable of (path, points) or (path, label, points); points float (5, 2).
        made_from: photos_digest() of the photos, for found_list().
    """
    if made_from:
        write_json(Path(path).with_suffix(".json"), {"photos": made_from})
    with atomic_write(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(format_line(*row))


def default_list(root, name):
    """Return the default path of the list `name` for the images in `root`.

    The list is stored in cache/ of this clone, because data sets are often read-only. A hash distinguishes folders that
    have the same name.
    """
    root = Path(root).expanduser().resolve()
    return CACHE / f"{root.name}-{hashlib.sha256(os.fsencode(root)).hexdigest()[:8]}" / name


def photos_digest(source, names=None):
    """Return a digest of the names, sizes and times of photos in a faces.data.sources source, by default of all."""
    names = source.names() if names is None else names
    digest = hashlib.sha256("\n".join(names).encode(errors="surrogateescape"))
    digest.update(source.versions(names).tobytes())
    return digest.hexdigest()


def found_list(source, name):
    """Return the path of the list `name` of a source, if there is one that fits its photos, or None."""
    for file in (Path(str(source)) / name, default_list(str(source), name)):
        if file.is_file():
            record = read_json(file.with_suffix(".json"))
            own = file.parent == Path(str(source))
            if own if record is None else record["photos"] == photos_digest(source):
                return file
            print(f"the photos in {source} have changed since {file} was made; it is not used")
    return None


def format_line(path, *label_and_points):
    """Return one line of a landmark list.

    Coordinates get two decimals, which is more precise than any detector.
    """
    *label, points = label_and_points
    return "\t".join([path, *map(str, label), *(f"{v:.2f}" for v in np.ravel(points))]) + "\n"


def read_lines(path):
    """Yield the lines of a text file in UTF-8, or in UTF-16 if it starts with a byte-order mark, one at a time.

    Names of files are not always UTF-8; their bytes are kept, as os.fsdecode() does.

    Args:
        path: Path of a regular file, or anything else that has open() and is_file().

    Yields:
        (number, line) of each line that is not blank, counted from 1.

    Raises:
        OSError: the file can't be read.
        ValueError: it is not text, or a line has MAX_LINE characters.
    """
    if not path.is_file():      # reading a named pipe would wait forever
        raise OSError(0, "not a regular file" if path.exists() else "No such file or directory")
    with path.open("rb") as file:
        is_utf16 = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        file.seek(0)
        text = io.TextIOWrapper(file, "utf-16") if is_utf16 else io.TextIOWrapper(file, "utf-8-sig", "surrogateescape")
        for number in itertools.count(1):
            line = text.readline(MAX_LINE)
            if "\0" in line or len(line) == MAX_LINE:
                raise ValueError("not a text file")
            if line.strip():
                yield number, line
            if not line:
                break


def normal_form(name):
    """Return a name for comparisons: macOS may store an accented letter as two characters, most lists have one.

    Where Python takes names of files for ASCII, they are read as the UTF-8 that they usually are.
    """
    if not name.isascii():
        try:
            name = name.encode(errors="surrogateescape").decode()
        except UnicodeError:
            pass
    return unicodedata.normalize("NFC", name)


def _lines(path, kind, advice):
    """Yield what read_lines() does; its errors become InputError."""
    try:
        yield from read_lines(Path(path))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise InputError(f"can't read the {kind} {path}: {reason}; {advice}.") from None


def _relative_path(path, number, name):
    """Return a path in a line of the list `path`, with forward slashes; raise InputError if it leaves the folder."""
    name = name.replace("\\", "/")
    if ".." in name or ":" in name or name.startswith("/"):    # making a Path of each name would be slow
        try:
            _inside(name)
        except InputError as error:
            raise InputError(f"{path}, line {number}: {error}") from None
    return name


def _inside(name):
    relative = Path(name)
    if relative.drive or relative.root or ".." in relative.parts:
        raise InputError(f"the path {name!r} leaves the folder of the images; lists may only name files below it.")


def _label(text):
    label = int(text)
    if not 0 <= label < 2**31:
        raise ValueError
    return label


def _check_paths(paths, path, kind, advice):
    if not paths:
        raise InputError(f"the {kind} {path} is empty; {advice}.")
    if len(set(paths)) != len(paths):
        seen = set()
        duplicate = next(p for p in paths if p in seen or seen.add(p))
        raise InputError(f"{path} lists {duplicate} twice; remove one of the lines.")
