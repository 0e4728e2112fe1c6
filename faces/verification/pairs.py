"""Read the pairs of a verification set: LFW's files of view 2 and view 1, and your own sets in the same format.

The folder contains `Name/Name_0001.jpg`. View 2 is for reporting: pairs.txt starts with `10 300` (folds, and pairs of
each kind per fold) or with `300` alone. One pair per line follows, `Name i j` (genuine) or `Name1 i Name2 j`
(impostor), fold after fold. View 1 is for development: the threshold is chosen on pairsDevTrain.txt, and accuracy is
measured on pairsDevTest.txt. Each starts with a number N, followed by N genuine and N impostor pairs.
"""
from pathlib import Path
from typing import NamedTuple

import numpy as np

from faces.files import InputError, folder
from faces.images import list_images

DEVELOPMENT = ("pairsDevTrain.txt", "pairsDevTest.txt")
TRAINING_ONLY = -1   # the fold of a pair that is used only to choose the threshold


class Pairs(NamedTuple):
    """P pairs among N distinct images, in the order of their file.

    paths: N paths relative to the folder, with forward slashes.
    pairs: int64 (P, 2), indices into paths.
    same: bool (P,), true for a genuine pair.
    folds: int64 (P,), 0 .. K-1; fold k is the k-th run of 2 x 300 lines, or as the header says. -1 for the pairs of
        view 1 that are used only to choose the threshold.
    identities: int64 (N,), 0, 1, 2, ..., the person on each image.
    named: whether identities are people's names. Otherwise they are groups of images that genuine pairs link, and one
        person may have several.
    """
    paths: list
    pairs: np.ndarray
    same: np.ndarray
    folds: np.ndarray
    identities: np.ndarray
    named: bool = True

    def judged(self):
        """Return the Pairs on which accuracy is measured; the images are unchanged."""
        keep = self.folds != TRAINING_ONLY
        return self._replace(pairs=self.pairs[keep], same=self.same[keep], folds=self.folds[keep])


def read_pairs(root, file=None, view=None):
    """Read the pairs and find their images.

    Args:
        root: folder of `Name/Name_0001.jpg`; other extensions of faces.images work too, and .jpg takes precedence.
        file: pairs.txt, or one of the two files of view 1; None looks in `root` and beside it.
        view: view of LFW, 1 or 2; None decides by the name of the file, and prefers view 2.

    Raises:
        InputError: the folder or a file is missing, a line is malformed, the number of lines differs from the header,
            or images are missing.
    """
    root = folder(root, "LFW images as Name/Name_0001.jpg")
    file = None if file is None else Path(file)
    if (view or _view_of(root, file)) == 1:
        file, rows, same, folds = _development(root, file)
    else:
        file = file or _find(root, "pairs.txt")
        rows, same, folds = _parse(file, _lines(file))
    present = {}
    for path in sorted(list_images(root), key=lambda path: not path.endswith(".jpg")):
        present.setdefault(path.rpartition(".")[0], path)
    names = sorted({name for pair in rows for name in pair})
    absent = [name for name in names if name not in present]
    if absent:
        raise InputError(f"{file} names {len(names)} images of which {len(absent)} are not in {root} "
                         f"({shorten(absent)}); pass the complete folder of Name/Name_0001.jpg.")
    index = {name: i for i, name in enumerate(names)}
    pairs = np.array([(index[a], index[b]) for a, b in rows])
    _, identities = np.unique([name.partition("/")[0] for name in names], return_inverse=True)
    return Pairs([present[name] for name in names], pairs, same, folds, identities)


def shorten(items, separator=", ", count=3):
    """Return the first few items as text, with dots if there are more."""
    return separator.join(items[:count]) + (f"{separator}..." if len(items) > count else "")


def _view_of(root, file):
    if file is not None:
        return 1 if file.name in DEVELOPMENT else 2
    return 1 if _search(root, DEVELOPMENT[0]) and not _search(root, "pairs.txt") else 2


def _search(root, name):
    candidates = (root / name, root.resolve().parent / name)
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _find(root, name):
    found = _search(root, name)
    if found is None:
        raise InputError(f"there is no {name} in {root} or beside it; download it, or pass a file with --pairs.")
    return found


def _development(root, file):
    """Return a name for the files of view 1, and its pairs like _parse(); those of DevTrain are TRAINING_ONLY."""
    if file is not None and file.name not in DEVELOPMENT:
        raise InputError(f"{file} does not belong to view 1, which has {' and '.join(DEVELOPMENT)}; pass one of them "
                         "with --pairs, or use --view 2.")
    files = [_find(root, name) if file is None else file.with_name(name) for name in DEVELOPMENT]
    (train, train_same), (test, test_same) = (_parse_development(file) for file in files)
    folds = np.repeat((TRAINING_ONLY, 0), (len(train), len(test)))
    return f"view 1 ({', '.join(map(str, files))})", train + test, np.concatenate((train_same, test_same)), folds


def _parse_development(file):
    header, *lines = _lines(file) or [(1, [])]
    if len(header[1]) != 1 or not _is_count(header[1][0]):
        raise InputError(f"{file} does not start with the number of genuine pairs; pass a file like LFW's {file.name}.")
    size = int(header[1][0])
    rows = [_names(file, number, fields) for number, fields in lines]
    same = np.array([len(fields) == 3 for _, fields in lines], bool)
    if len(rows) != 2 * size or same.sum() != size:
        raise InputError(f"{file} announces {size} genuine and {size} impostor pairs but has {same.sum()} and "
                         f"{(~same).sum()}; complete it or correct its first line.")
    return rows, same


def _lines(file):
    """Return (number, fields) of the lines that are not blank, counted from 1."""
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not a text file"
        raise InputError(f"can't read the pairs {file}: {why}; pass a file like LFW's {Path(file).name}.") from None
    lines = ((number, line.split("\t" if "\t" in line else None)) for number, line in enumerate(text.splitlines(), 1))
    return [(number, [field.strip() for field in fields]) for number, fields in lines if any(fields)]


def _parse(file, lines):
    """Return P pairs of image names without extension, whether they are genuine, bool (P,), and folds, int64 (P,)."""
    header = lines[0][1] if lines else []
    if not 1 <= len(header) <= 2 or not all(_is_count(field) for field in header):
        raise InputError(f"{file} does not start with LFW's header, `10 300` or `300`; "
                         "pass a file like LFW's pairs.txt.")
    size = 2 * int(header[-1])
    rows = [_names(file, number, fields) for number, fields in lines[1:]]
    folds = int(header[0]) if len(header) == 2 else max(1, len(rows) // size)
    if len(rows) != folds * size:
        raise InputError(f"{file} announces {folds} x {size} = {folds * size} pairs but has {len(rows)}; "
                         "complete it or correct its first line.")
    same = np.array([len(fields) == 3 for _, fields in lines[1:]])
    if folds < 2 or same.all() or not same.any():
        raise InputError(f"{file} has {folds} fold(s), {same.sum()} genuine and {(~same).sum()} impostor pairs; "
                         "the protocol needs at least two folds and both kinds.")
    return rows, same, np.arange(len(rows)) // size


def _names(file, number, fields):
    if len(fields) == 3:
        fields = [fields[0], fields[1], fields[0], fields[2]]
    elif len(fields) == 4 and fields[0] == fields[2]:
        raise InputError(f"{file}, line {number}: an impostor pair of one person ({fields[0]}); correct the line.")
    if len(fields) != 4 or not all(fields) or not _is_count(fields[1]) or not _is_count(fields[3]):
        raise InputError(f"{file}, line {number}: expected `Name i j` or `Name1 i Name2 j`; correct the line.")
    return tuple(f"{name}/{name}_{int(i):04d}" for name, i in (fields[:2], fields[2:]))


def _is_count(field):
    return field.isascii() and field.isdigit() and len(field) <= 9 and int(field) > 0
