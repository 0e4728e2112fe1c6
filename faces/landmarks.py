"""Read and write lists of images.

A landmark list has lines of `path x1 y1 ... x5 y5` (LFW) or `path label x1 y1 ... x5 y5` (CASIA-WebFace), a list of
aligned faces lines of `path label`. Fields are separated by tabs or spaces and read from the right, so that a path may
contain spaces. Beside a list that our scripts made is a record of the photos that it was made from.
"""
import codecs
import functools
import hashlib
import io
import math
import os
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np

from faces.align import arrangement_problem
from faces.files import CACHE, InputError, atomic_write, read_json, reading, write_json

ADVICE = "create one with mtcnn/lfw_landmark.py or mtcnn/casia_landmark.py"
OUTSIDE = "the path {!r} leaves the folder of the images, {}; pass the folder that the list was made for."
MAX_LINE = 20_000    # characters; a path has at most 4,096 bytes


class LandmarkList(NamedTuple):
    """The images and faces of a landmark list."""
    paths: list                  # N relative paths
    labels: np.ndarray | None    # int64 (N,); None if the list has no labels
    points: np.ndarray           # float32 (N, 5, 2), landmarks in pixels of the whole image


def read_landmarks(path, labeled: bool, root=None) -> LandmarkList:
    """Read a landmark list of integers or decimals, with labels (CASIA) or without (LFW). Absolute paths below `root`,
    the folder of the images, become relative. Raises InputError if a line is not as above, or most landmarks can't be
    those of faces."""
    with reading(path, "landmark list", ADVICE):
        paths, labels, values = _read(path, root, labeled, 10)
    points = np.array(values, np.float32).reshape(-1, 5, 2)
    if problem := arrangement_problem(points):
        raise InputError(f"{path} is not a usable landmark list: {problem}; expected x1 y1 ... x5 y5 in pixels for "
                         f"the image-left eye, the other eye, the nose, and both corners of the mouth; {ADVICE}.")
    return LandmarkList(paths, np.array(labels, np.int64) if labeled else None, points)


def read_labels(path, root=None) -> tuple[list[str], np.ndarray]:
    """Return the N relative paths and the labels, int64 (N,), of a list of aligned faces; see read_landmarks()."""
    with reading(path, "list", "pass a text file with lines of `path label`"):
        paths, labels, _ = _read(path, root, True, 0)
    return paths, np.array(labels, np.int64)


def write_landmarks(path, rows: Iterable[tuple], made_from: str | None = None):
    """Write a landmark list of (path, points) or (path, label, points), points float (5, 2), of which two decimals are
    written, and beside it a record for found_list() of `made_from`, the photos_digest() of the set."""
    record = Path(path).with_suffix(".json")
    record.unlink(missing_ok=True)    # the old one does not describe the new list
    with atomic_write(path, "w") as file:
        for name, *label, points in rows:
            file.write("\t".join([name, *map(str, label), *(f"{v:.2f}" for v in np.ravel(points))]) + "\n")
    if made_from:
        write_json(record, {"photos": made_from})


def default_list(root, name: str) -> Path:
    """Return where our scripts write the list `name` for the images in `root`: in cache/; sets are often read-only."""
    root = Path(root).expanduser().resolve()
    return CACHE / f"{root.name}-{hashlib.sha256(os.fsencode(root)).hexdigest()[:8]}" / name


def photos_digest(source) -> str:
    """Return a digest of the names, sizes and times of the photos in a faces.data source."""
    names = source.names()
    listed = "\n".join(names).encode(errors="surrogateescape")    # names need not be UTF-8
    return hashlib.sha256(listed + source.versions(names).tobytes()).hexdigest()


def found_list(source, name: str) -> Path | None:
    """Return the list `name` of a faces.data source: in its own folder, or else where our scripts write it; or None. A
    list made for other photos than those that are there now is not used, and that is printed."""
    own = Path(source.root) / name
    for file in (own, default_list(source.root, name)):
        if not file.is_file():
            continue
        photos = read_json(file.with_suffix(".json")).get("photos")
        if photos == photos_digest(source) if photos else file == own:
            return file
        print(f"not using {file}: the photos in {source} have changed since it was made, or it has no record of them")
    return None


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, line) of each line of a text file that is not blank; ValueError if it is not text. It is in
    UTF-8, or in UTF-16 with a byte-order mark. Other bytes in names are kept, as os.fsdecode() does."""
    if path.exists() and not path.is_file():      # reading a named pipe would wait forever
        raise OSError(0, "not a regular file")
    with path.open("rb") as file:
        is_utf16 = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        file.seek(0)
        text = io.TextIOWrapper(file, "utf-16") if is_utf16 else io.TextIOWrapper(file, "utf-8-sig", "surrogateescape")
        for number, line in enumerate(iter(lambda: text.readline(MAX_LINE), ""), 1):
            if "\0" in line or len(line) == MAX_LINE:
                raise ValueError("not a text file")
            if line.strip():
                yield number, line


def normal_form(name: str) -> str:
    """Return a name for comparisons: macOS may store an accented letter as two characters, most lists have one."""
    return unicodedata.normalize("NFC", name)


def _read(path, root, labeled, numbers):
    """Return the paths, labels and other numbers of a list's lines."""
    paths, labels, values = [], array("q"), array("f")    # an array per line would take most of the memory and time
    relative = _relative_to(root)
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
            raise InputError(f"{path}, line {number}: expected {expected}, not {line.strip()[:80]!r}; correct the "
                             "line.") from None
        except InputError as error:
            raise InputError(f"{path}, line {number}: {error}") from None
        labels.append(label)
        values += coordinates
    if not paths:
        raise InputError(f"{path} is an empty list.")
    if len(set(paths)) != len(paths):
        raise InputError(f"{path} lists {Counter(paths).most_common(1)[0][0]} twice; remove one of the lines.")
    return paths, labels, values


def _relative_to(root):
    """Return a function that makes the path of a list relative, with forward slashes, or refuses it as outside `root`.
    Absolute paths may lead to the folder, or to a person's folder of which it has a link, through other links."""
    links = [] if root is None or not os.path.isdir(root) else [root, *filter(os.path.islink, Path(root).iterdir())]
    known = {os.path.realpath(link): PurePath(link).relative_to(root) for link in links}

    @functools.cache
    def below(text):
        folder = PurePath(text)
        for parent in (folder, *folder.parents):
            if (place := known.get(os.path.realpath(parent))) is not None:
                return (place / folder.relative_to(parent)).as_posix()
        raise InputError(OUTSIDE.format(text, root))

    def relative(text):
        name = text.lstrip(" \t").replace("\\", "/").removeprefix("./")
        if name.startswith("/") or os.path.splitdrive(name)[0]:
            folder, _, file = name.rpartition("/")
            return f"{below(folder or '/')}/{file}".removeprefix("./")
        if ".." in name and ".." in name.split("/"):
            raise InputError(OUTSIDE.format(name, root))
        return name
    return relative
