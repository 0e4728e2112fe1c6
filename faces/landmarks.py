"""Read and write lists of images.

A landmark list has lines of `path x1 y1 ... x5 y5` (LFW) or `path label x1 y1 ... x5 y5` (CASIA-WebFace), a list of
aligned faces lines of `path label`. Fields are separated by tabs or spaces and read from the right, so that a path may
contain spaces. Beside a list that our scripts made is a record of the photos that it was made from.
"""
import codecs
import contextlib
import hashlib
import io
import itertools
import math
import os
import unicodedata
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np

from faces.align import arrangement_problem
from faces.files import CACHE, InputError, atomic_write, read_json, reading, write_json

ADVICE = "create one with mtcnn/lfw_landmark.py or mtcnn/casia_landmark.py"
OUTSIDE = "the path {!r} leaves the folder of the images; lists may only name files below it."
MAX_LINE = 20_000    # characters; a path has at most 4,096 bytes


class LandmarkList(NamedTuple):
    """The images and faces of a landmark list."""
    paths: list                  # N relative paths
    labels: np.ndarray | None    # int64 (N,); None if the list has no labels
    points: np.ndarray           # float32 (N, 5, 2), landmarks in pixels of the whole image


def read_landmarks(path, labeled: bool, root=None) -> LandmarkList:
    """Read a landmark list.

    Args:
        path: the file. Numbers may be integers or decimals.
        labeled: whether a label follows the path (CASIA) or not (LFW).
        root: folder of the images; absolute paths below it become relative.

    Raises:
        InputError: the file can't be read or is empty; a line has the wrong fields, or a path that leaves the folder or
            occurs twice; or the landmarks can't be those of faces.
    """
    with reading(path, "landmark list", ADVICE):
        paths, labels, values = _read(path, root, labeled, 10)
    points = np.array(values, np.float32).reshape(-1, 5, 2)
    problem = arrangement_problem(points)
    if problem:
        raise InputError(f"{path} is not a usable landmark list: {problem}; expected x1 y1 ... x5 y5 in pixels for "
                         f"the image-left eye, the other eye, the nose, and both corners of the mouth; {ADVICE}.")
    return LandmarkList(paths, np.array(labels, np.int64) if labeled else None, points)


def read_labels(path, root=None) -> tuple[list[str], np.ndarray]:
    """Return the N relative paths and the labels, int64 (N,), of a list of aligned faces; see read_landmarks()."""
    with reading(path, "list", "pass a text file with lines of `path label`"):
        paths, labels, _ = _read(path, root, True, 0)
    return paths, np.array(labels, np.int64)


def write_landmarks(path, rows: Iterable[tuple], made_from: str | None = None):
    """Write a landmark list, atomically.

    Args:
        path: the file.
        rows: (path, points) or (path, label, points); points float (5, 2). Coordinates get two decimals, which is more
            precise than any detector.
        made_from: photos_digest() of the set, for found_list().
    """
    _record(path).unlink(missing_ok=True)    # the old one does not describe the new list
    with atomic_write(path, "w") as file:
        for name, *label, points in rows:
            file.write("\t".join([name, *map(str, label), *(f"{v:.2f}" for v in np.ravel(points))]) + "\n")
    if made_from:
        write_json(_record(path), {"photos": made_from})


def default_list(root, name: str) -> Path:
    """Return where our scripts write the list `name` for the images in `root`.

    It is in cache/ of this clone, because data sets are often read-only. A hash distinguishes folders of the same name.
    """
    root = Path(root).expanduser().resolve()
    return CACHE / f"{root.name}-{hashlib.sha256(os.fsencode(root)).hexdigest()[:8]}" / name


def photos_digest(source, names: list[str] | None = None) -> str:
    """Return a digest of the names, sizes and times of photos in a faces.data source, by default of all of them."""
    names = source.names() if names is None else names
    digest = hashlib.sha256("\n".join(names).encode(errors="surrogateescape"))    # names need not be UTF-8
    digest.update(source.versions(names).tobytes())
    return digest.hexdigest()


def found_list(source, name: str) -> Path | None:
    """Return the list `name` of a faces.data source: in its own folder, or else where our scripts write it; or None.

    A list made for other photos than those that are there now is not used, and that is printed.
    """
    own = Path(source.root) / name
    for file in (own, default_list(source.root, name)):
        if not file.is_file():
            continue
        record = read_json(_record(file))
        if record["photos"] == photos_digest(source) if record else file == own:
            return file
        print(f"not using {file}: the photos in {source} have changed since it was made, or it has no record of them")
    return None


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a text file in UTF-8, or in UTF-16 if it starts with a byte-order mark, one at a time.

    Names of files are not always UTF-8; their bytes are kept, as os.fsdecode() does.

    Yields:
        (number, line) of each line that is not blank, counted from 1.

    Raises:
        OSError: the file can't be read.
        ValueError: it is not text, or a line has MAX_LINE characters.
    """
    if path.exists() and not path.is_file():      # reading a named pipe would wait forever
        raise OSError(0, "not a regular file")
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


def normal_form(name: str) -> str:
    """Return a name for comparisons: macOS may store an accented letter as two characters, most lists have one.

    Where Python takes names of files for ASCII, they are read as the UTF-8 that they usually are.
    """
    if not name.isascii():
        with contextlib.suppress(UnicodeError):
            name = name.encode(errors="surrogateescape").decode()
    return unicodedata.normalize("NFC", name)


def _record(path):
    return Path(path).with_suffix(".json")


def _read(path, root, labeled, numbers):
    """Return the paths, labels and other numbers of a list's lines."""
    paths, labels, values = [], array("q"), array("f")    # an array per line would take most of the memory and time
    relative = _Relative(root)
    for number, line in read_lines(Path(path)):
        text, *fields = line.rsplit(maxsplit=labeled + numbers)
        try:
            coordinates = array("f", map(float, fields[labeled:]))
            label = int(fields[0]) if labeled else 0
            if len(fields) != labeled + numbers or "\t" in text or not 0 <= label < 2**31 \
                    or not all(map(math.isfinite, coordinates)):
                raise ValueError
            paths.append(relative(text))
        except (ValueError, IndexError):
            expected = ", ".join(["a path", *["a label from 0"] * labeled, *["ten finite numbers"] * (numbers > 0)])
            raise InputError(f"{path}, line {number}: expected {expected}; correct the line.") from None
        except InputError as error:
            raise InputError(f"{path}, line {number}: {error}") from None
        labels.append(label)
        values += coordinates
    if not paths:
        raise InputError(f"{path} is an empty list.")
    if len(set(paths)) != len(paths):
        seen = set()
        duplicate = next(p for p in paths if p in seen or seen.add(p))
        raise InputError(f"{path} lists {duplicate} twice; remove one of the lines.")
    return paths, labels, values


class _Relative:
    """Turns the paths of a list into relative ones with forward slashes, and refuses those outside the folder `root`.

    Absolute paths may name the folder, or a link to a person's folder in it, in any way: identities are compared.
    """

    def __init__(self, root):
        links = [] if root is None or not os.path.isdir(root) else [root, *filter(os.path.islink, Path(root).iterdir())]
        self.known = {_identity(link): PurePath(link).relative_to(root) for link in links}
        self.folders = {}    # from the text of a folder to its path below `root`

    def __call__(self, text):
        name = text.lstrip(" \t").replace("\\", "/")
        if name.startswith("./"):
            name = name[2:]
        if name.startswith("/") or os.path.splitdrive(name)[0]:
            folder, _, file = name.rpartition("/")
            if folder not in self.folders:
                self.folders[folder] = self._locate(PurePath(folder))
            return f"{self.folders[folder]}{file}"
        if ".." in name and ".." in name.split("/"):
            raise InputError(OUTSIDE.format(name))
        return name

    def _locate(self, folder):
        for parent in (folder, *folder.parents):
            below = self.known.get(_identity(parent))
            if below is not None:
                inner = (below / folder.relative_to(parent)).as_posix()
                return "" if inner == "." else f"{inner}/"
        raise InputError(OUTSIDE.format(str(folder)))


def _identity(file):
    try:
        status = os.stat(file)
        return status.st_dev, status.st_ino
    except OSError:
        return file    # nothing that exists
