"""Read the pairs of a verification set, in the formats in which they are published.

LFW's pairs.txt (view 2, for reporting) starts with `10 300`, folds and pairs of each kind per fold, or with `300`
alone. Each following line is a pair, `Name i j` (genuine) or `Name1 i Name2 j` (impostor). View 1, for development,
chooses the threshold on pairsDevTrain.txt and measures accuracy on pairsDevTest.txt. Without a header, as in Kaggle's
pairs.csv, the pairs form ten folds, see ten_folds(). So do lists with lines of `path path 0|1` or `0|1 path path`, or
with two lines per pair, `path 0` (impostor) or `path fold` (genuine), as for CALFW and CPLFW.
"""
import io
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from faces.data.sources import Folder, Zip, open_photos
from faces.files import InputError, count_of, path, reading, shorten
from faces.landmarks import normal_form, read_lines

VIEW_1_FILES = ("pairsDevTrain.txt", "pairsDevTest.txt")
VIEW_2_FILES = ("pairs.txt", "pairs.csv")
CONTENT = "LFW images as Name/Name_0001.jpg"    # of a folder that is a set
FOLDS = 10
TRAINING_ONLY = -1   # fold number of the pairs that are used only to choose the threshold


class Pairs(NamedTuple):
    """P pairs of N distinct images, in the order of the file."""
    paths: list               # N paths relative to the folder, with forward slashes; those in pairs come first
    pairs: np.ndarray         # int64 (P, 2), indices into paths
    same: np.ndarray          # bool (P,), true for a genuine pair
    folds: np.ndarray         # int64 (P,), 0 .. K-1, or TRAINING_ONLY
    identities: np.ndarray    # int64 (N,), 0, 1, 2, ..., the person in each image
    names: list | None        # of the people in the images, N; None if they are just images linked by genuine pairs
    lists: str = ""           # where the pairs are from, in words

    def identifiable(self) -> bool:
        """Return whether people are named, and two of them have two images or more, as identification needs."""
        return self.names is not None and int((np.bincount(self.identities) >= 2).sum()) > 1

    def people(self, unnamed: str) -> np.ndarray:
        """Return the names of the people on both images of each pair, str (P, 2), or else `unnamed` and a number."""
        return np.array(self.names or [f"{unnamed} {number:06d}" for number in self.identities])[self.pairs]

    def judged(self) -> "Pairs":
        """Return the Pairs on which accuracy is measured; paths and identities are unchanged."""
        keep = self.folds != TRAINING_ONLY
        return self._replace(pairs=self.pairs[keep], same=self.same[keep], folds=self.folds[keep])


def read_pairs(source, file=None, view: int | None = None, identification: bool = False) -> Pairs:
    """Read the pairs of a source, the path of a folder or zip of images or what open_photos() made of it, and find
    their images. Raises InputError if a file or an image is missing, or a line is malformed.

    `file` is the list, for view 1 one of its two; None searches in the folder or zip and beside it. `view` is 1 or 2;
    None determines it from the names of the files, and prefers 2. With `identification`, all other images of everyone
    who has two images or more are added.
    """
    source, file = source if isinstance(source, (Folder, Zip)) else open_photos(source, CONTENT), file and path(file)
    view_2 = (*VIEW_2_FILES, f"{source.root.name}_pairs.txt")    # the last one is RFW's
    if view is None:
        found = file or _find(source, view_2) or _find(source, VIEW_1_FILES)
        view = 1 if found and found.name in VIEW_1_FILES else 2
    if view == 1 and file and file.name not in VIEW_1_FILES:
        raise InputError(f"{file} does not belong to view 1, which consists of {' and '.join(VIEW_1_FILES)}; pass one "
                         "of them with --pairs, or use --view 2.")
    files = []
    for names in [[name] for name in VIEW_1_FILES] if view == 1 else [view_2]:
        files.append((file.with_name(names[0]) if view == 1 else file) if file else _find(source, names))
        if files[-1] is None:
            raise InputError(f"there is no {names[0]} in {source} or its parent folder; download it into one of these "
                             "(lfw_eval.py also takes --pairs FILE).")
    parts = [read_list(part) for part in files]
    named_pairs, same = sum((part[0] for part in parts), []), np.concatenate([part[1] for part in parts])
    folds = np.repeat((TRAINING_ONLY, 0), [len(part[0]) for part in parts]) if view == 1 else parts[0][2]
    genuine, count = int(same[folds >= 0].sum()), int((folds >= 0).sum())
    if view == 2 and not folds.any() or genuine in (0, count):
        raise InputError(f"{files[-1]} has {count_of(folds.max() + 1, 'fold~')}, {count_of(genuine, 'genuine pair~')} "
                         f"and {count_of(count - genuine, 'impostor pair~')}, but the protocol needs at least two "
                         "folds and pairs of both kinds; add what is missing.")
    return _with_images(source, shorten(files, " and "), named_pairs, same, folds, identification)


def read_list(file) -> tuple[list, np.ndarray, np.ndarray]:
    """Read a list of pairs in any of the formats above, which is recognized by its content: P pairs of image names,
    without extension in LFW's format; bool (P,), whether they are genuine; int64 (P,), their folds."""
    with reading(file, "list of pairs", "correct it, or pass a text file like LFW's pairs.txt"):
        lines = [(number, _split(line)) for number, line in read_lines(file)]
        if not lines:
            raise ValueError("it is empty")
        per_image = all(len(fields) == 2 for _, fields in lines)
        header = lines[0][1]
        sized = not per_image and 1 <= len(header) <= 2 and all(field.isdecimal() for field in header)
        if sized or not any(field.isdecimal() or "/" in field or "." in field for field in header):    # or column names
            del lines[0]
        if per_image:
            lines = [(number, [left, right, "10"[fold == "0"]] if fold == other else []) for (number, (left, fold)),
                     (_, (right, other)) in zip(lines[::2], lines[1::2], strict=True)]
        rows = [_pair(number, fields) for number, fields in lines]
        same = np.array([row[2] for row in rows], bool)
        size = 2 * int(header[-1]) if sized else 0
        count = int(header[0]) if sized and len(header) == 2 else max(1, len(rows) // max(1, size))
        if not rows or sized and len(rows) != count * size:
            raise ValueError(f"it declares {count:,} x {size:,} = {count * size:,} pairs but contains {len(rows):,}")
        return [row[:2] for row in rows], same, np.arange(len(rows)) // size if sized else ten_folds(same)


def _split(line):
    separator = "\t" if "\t" in line else "," if line.count(",") > 1 else None
    return [field.strip() for field in line.split(separator) if field.strip()]


def _pair(number, fields):
    """Return the names of both images on a line, and whether the pair is genuine."""
    match fields:
        case [name, i, j] if i.isdecimal() and j.isdecimal():
            names, same = (f"{name}/{name}_{int(i):04d}", f"{name}/{name}_{int(j):04d}"), True
        case [name, i, other, j] if i.isdecimal() and j.isdecimal() and name != other:
            names, same = (f"{name}/{name}_{int(i):04d}", f"{other}/{other}_{int(j):04d}"), False
        case [left, right, ("0" | "1") as same] | [("0" | "1") as same, left, right]:
            names, same = (left, right), same == "1"
        case _:
            raise ValueError(f"line {number}: expected `Name i j`, `Name1 i Name2 j`, `path path 0|1` or two "
                             "lines `path fold` with the same number")
    return *(normal_form(name.replace("\\", "/")) for name in names), same


def ten_folds(same: np.ndarray) -> np.ndarray:
    """Return the fold of each of P pairs, int64 (P,); `same`, bool (P,), is true for a genuine pair. In their order,
    both kinds are divided into ten equal parts, so that each fold has both, whatever the order of the list."""
    folds = np.empty(len(same), np.int64)
    for kind in (True, False):
        for fold, rows in enumerate(np.array_split(np.flatnonzero(same == kind), FOLDS)):
            folds[rows] = fold
    return folds


def linked(count: int, links: np.ndarray) -> np.ndarray:
    """Return int (count,): the same number for items that are linked, int (L, 2), directly or through others."""
    from scipy.sparse import coo_array, csgraph  # slow to import
    return csgraph.connected_components(coo_array((np.ones(len(links)), links.T), (count, count)), directed=False)[1]


def finder(source: Folder | Zip) -> Callable[[str], str | None]:
    """Return a function from an image's name in a list to its path in the source, None if there is no such image.

    A name may lack its extension, of which .jpg takes precedence, and outer folders, or have more of these.
    """
    names, ends = {}, {}
    for image in sorted(source.names(), key=lambda image: not image.endswith(".jpg")):
        whole = normal_form(image)
        for end in (whole, whole.rpartition(".")[0]):
            names.setdefault(end, image)
            while end := end.partition("/")[2]:
                if (ends.setdefault(end, image) or "").rpartition(".")[0] != image.rpartition(".")[0]:
                    ends[end] = None    # several images are named like this
    root = source.root
    prefixes = [*(f"{outer}/" for outer in (root.absolute().as_posix(), root.resolve().as_posix(), root.absolute().name,
                                            root.resolve().name)), source.wrapper]

    def find(name):
        known = [name, Path(name).resolve().as_posix()] if name.startswith("/") else [name]
        inner = [name.removeprefix(normal_form(prefix)) for name in known for prefix in ("", *prefixes)]
        return next((image for name in inner if (image := names.get(name) or ends.get(name))), None)
    return find


def _with_images(source, lists, named_pairs, same, folds, identification):
    """Return the Pairs of a source, given the names of their images."""
    find = finder(source)
    path_of = {name: find(name) for name in sorted({name for pair in named_pairs for name in pair})}
    missing = [name for name, image in path_of.items() if image is None]
    if missing:
        raise InputError(f"{source} lacks {len(missing)} of the {len(path_of)} images named in {lists} "
                         f"({shorten(missing)}); pass the complete folder of images.")
    paths = list(dict.fromkeys(path_of.values()))
    index = {image: i for i, image in enumerate(paths)}
    pairs = np.array([(index[path_of[a]], index[path_of[b]]) for a, b in named_pairs])
    for person in (_folder, _file):
        names = np.array([person(image) for image in paths])[pairs]
        if np.array_equal(names[:, 0] == names[:, 1], same):
            break
    else:
        return Pairs(paths, pairs, same, folds, linked(len(paths), pairs[same]), None, lists)
    if identification:
        images = {find(image.rpartition(".")[0]) for image in source.names() if person(image)} - {None}
        counts = Counter(map(person, images))
        paths += sorted({image for image in images if counts[person(image)] > 1} - set(paths))
    names = [person(image) for image in paths]
    return Pairs(paths, pairs, same, folds, np.unique(names, return_inverse=True)[1], names, lists)


def _folder(image):
    return normal_form(image.rpartition("/")[0])


def _file(image):
    """Return the name in that of a file such as Name_0001.jpg, as in the one folder of CALFW or CPLFW."""
    return re.sub(r"_?\d*$", "", normal_form(Path(image).stem))


class _Member(NamedTuple):
    """A list in the zip of the images, with what read_lines() needs of a Path."""
    source: Zip
    name: str

    def __str__(self):
        return f"{self.source}/{self.name}"

    def exists(self):
        return self.name in self.source.members

    is_file = exists

    def open(self, _):
        return io.BytesIO(self.source.open(self.name))


def _find(source, names):
    """Return the list in the folder or zip of images, or around it, or None."""
    root = source.root.absolute()
    inside = [_Member(source, name) for name in names] if root.is_file() else []
    outer = 0 if inside else max(source.wrapper.count("/"), root.name == root.parent.name)
    folders = (root, *root.parents[:1 + outer], root.resolve().parent, root.parent.parent / "txts" / root.name)
    return next((file for file in [*inside, *(folder / name for name in names for folder in folders)]
                 if file.is_file()), None)
