"""Read the pairs of a verification set: the files of LFW's view 1 and view 2, or your own in the same format.

The image folder contains `Name/Name_0001.jpg`. View 2 is for reporting: pairs.txt starts with `10 300` (number of
folds, and pairs of each kind per fold) or with `300` alone. Each following line is one pair, `Name i j` (genuine) or
`Name1 i Name2 j` (impostor), and the folds follow one another. View 1 is for development: the threshold is chosen on
pairsDevTrain.txt, and accuracy is measured on pairsDevTest.txt. Each of these files starts with a number N, followed
by N genuine and N impostor pairs.
"""
import io
import itertools
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from faces.data.sources import Folder, Zip, open_source
from faces.files import InputError, folder
from faces.images import UnreadableImage
from faces.landmarks import normal_form, read_lines
from faces.text import count_of, shorten

VIEW_1_FILES = ("pairsDevTrain.txt", "pairsDevTest.txt")
MAX_PAIRS = 1_000_000    # LFW has 6,000
TRAINING_ONLY = -1   # fold number of the pairs that are used only to choose the threshold


class Pairs(NamedTuple):
    """P pairs of N distinct images, in the order of the pairs file.

    paths: N paths relative to the folder, with forward slashes; those of the pairs come first.
    pairs: int64 (P, 2), indices into paths.
    same: bool (P,), true for a genuine pair.
    folds: int64 (P,), 0 .. K-1; fold k is the k-th run of 2 x 300 lines, or of the size that the header gives. -1 for
        the pairs of view 1 that are used only to choose the threshold.
    identities: int64 (N,), 0, 1, 2, ..., the person in each image.
    named: whether each identity corresponds to a person's name. If not, an identity is a group of images linked by
        genuine pairs, and one person may have several.
    """
    paths: list
    pairs: np.ndarray
    same: np.ndarray
    folds: np.ndarray
    identities: np.ndarray
    named: bool = True

    def people_with_several(self):
        """Return how many people have two images or more; identification needs at least two of them."""
        return int((np.bincount(self.identities) >= 2).sum())

    def judged(self):
        """Return the Pairs on which accuracy is measured; paths and identities are unchanged."""
        keep = self.folds != TRAINING_ONLY
        return self._replace(pairs=self.pairs[keep], same=self.same[keep], folds=self.folds[keep])


def read_pairs(root, file=None, view=None, identification=False):
    """Read the pairs and find their images.

    Args:
        root: folder or zip of `Name/Name_0001.jpg`; every extension in faces.images works, and .jpg takes precedence.
        file: pairs.txt, or one of the two files of view 1; None searches `root` and its parent folder.
        view: view of LFW, 1 or 2; None determines it from the names of the files, and prefers view 2.
        identification: add all other images of everyone in `root` who has two images or more.

    Returns:
        Pairs.

    Raises:
        InputError: the folder or a file is missing, a line is malformed, the number of lines differs from the header,
            or images are missing.
    """
    source = open_images(root)
    file = None if file is None else Path(file)
    if (view or _detect_view(source, file)) == 1:
        lists, named_pairs, same, folds = _read_view_1(source, file)
    else:
        lists = file or _find(source, "pairs.txt")
        named_pairs, same, folds = _read_view_2(lists)
    path_of = {}
    for path in sorted(source.names(), key=lambda path: not path.endswith(".jpg")):
        path_of.setdefault(normal_form(path.rpartition(".")[0]), path)
    names = sorted({name for pair in named_pairs for name in pair})
    missing = [name for name in names if name not in path_of]
    if missing:
        raise InputError(f"{source} lacks {len(missing)} of the {len(names)} images named in {lists} "
                         f"({shorten(missing)}); pass the complete folder of Name/Name_0001.jpg.")
    index = {name: i for i, name in enumerate(names)}
    if identification:
        names += sorted(set(_of_people_with_several(path_of)) - set(names))
    pairs = np.array([(index[a], index[b]) for a, b in named_pairs])
    _, identities = np.unique([_person(name) for name in names], return_inverse=True)
    return Pairs([path_of[name] for name in names], pairs, same, folds, identities)


def open_images(root):
    """Return the faces.data.sources.Folder or Zip of a verification set; raise InputError if there is none."""
    root = Path(root).expanduser()
    return open_source(root if root.is_file() else folder(root, "LFW images as Name/Name_0001.jpg"))


def _person(name):
    return name.partition("/")[0]


def _of_people_with_several(names):
    """Return those of some image names, such as Name/Name_0001, whose person has two images or more."""
    names = [name for name in names if name.count("/") == 1]
    count = Counter(map(_person, names))
    return [name for name in names if count[_person(name)] > 1]


class _Member(NamedTuple):
    """A text file in a zip, with the methods of a Path that read_lines() needs."""
    source: Zip
    name: str

    def __str__(self):
        return f"{self.source}/{self.name}"

    def is_file(self):
        return self.name in self.source.members

    exists = is_file

    def open(self, _):
        try:
            return io.BytesIO(self.source.open(self.name))
        except UnreadableImage as error:
            raise OSError(0, str(error)) from None


def _detect_view(source, file):
    if file is not None:
        return 1 if file.name in VIEW_1_FILES else 2
    return 1 if _search(source, VIEW_1_FILES[0]) and not _search(source, "pairs.txt") else 2


def _search(source, name):
    """Return a text file in the folder or zip of images, or else beside it; or None."""
    root = Path(str(source))
    candidates = root / name if isinstance(source, Folder) else _Member(source, name), root.resolve().parent / name
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _find(source, name):
    """Return the path that _search() finds; raise InputError if it finds nothing."""
    path = _search(source, name)
    if path is None:
        raise InputError(f"there is no {name} in {source} or its parent folder; download it into one of these "
                         "(lfw_eval.py also takes --pairs FILE).")
    return path


def _read_view_1(source, file):
    """Return a description of the files of view 1, followed by what _read_view_2() returns for their pairs.

    The pairs of pairsDevTrain.txt have the fold TRAINING_ONLY.
    """
    if file is not None and file.name not in VIEW_1_FILES:
        raise InputError(f"{file} does not belong to view 1, which consists of {' and '.join(VIEW_1_FILES)}; pass one "
                         "of them with --pairs, or use --view 2.")
    files = [_find(source, name) if file is None else file.with_name(name) for name in VIEW_1_FILES]
    (train, train_same), (test, test_same) = (_read_view_1_file(file) for file in files)
    folds = np.repeat((TRAINING_ONLY, 0), (len(train), len(test)))
    return f"view 1 ({', '.join(map(str, files))})", train + test, np.concatenate((train_same, test_same)), folds


def _read_view_1_file(file):
    """Return the P pairs of a file of view 1 as image names, and whether they are genuine, bool (P,)."""
    header, *lines = _read_fields(file) or [(1, [])]
    if len(header[1]) != 1 or not _is_positive_integer(header[1][0]):
        raise InputError(f"{file} does not start with the number of genuine pairs; pass a file like LFW's {file.name}.")
    size = int(header[1][0])
    named_pairs = [_image_names(file, number, fields) for number, fields in lines]
    same = np.array([len(fields) == 3 for _, fields in lines], bool)
    if len(named_pairs) != 2 * size or same.sum() != size:
        raise InputError(f"{file} declares {size} genuine and {size} impostor pairs but contains {same.sum()} and "
                         f"{(~same).sum()}; complete it or correct its first line.")
    return named_pairs, same


def _read_fields(file):
    """Return a list of (line number, fields), counted from 1, without blank lines."""
    try:
        lines = list(itertools.islice(read_lines(file), MAX_PAIRS + 2))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise InputError(f"can't read the pairs in {file}: {reason}; pass a text file of pairs, like "
                         "LFW's pairs.txt.") from None
    if len(lines) > MAX_PAIRS + 1:
        raise InputError(f"{file} has over {MAX_PAIRS:,} lines; pass a file like LFW's pairs.txt.")
    lines = ((number, line.split("\t" if "\t" in line else None)) for number, line in lines)
    return [(number, [field.strip() for field in fields]) for number, fields in lines if any(fields)]


def _read_view_2(file):
    """Return the P pairs of pairs.txt.

    Returns:
        list of P pairs of image names without extension; whether they are genuine, bool (P,); folds, int64 (P,).
    """
    lines = _read_fields(file)
    header = lines[0][1] if lines else []
    if not 1 <= len(header) <= 2 or not all(_is_positive_integer(field) for field in header):
        raise InputError(f"{file} does not start with LFW's header, `10 300` or `300`; "
                         "pass a file like LFW's pairs.txt.")
    fold_size = 2 * int(header[-1])
    named_pairs = [_image_names(file, number, fields) for number, fields in lines[1:]]
    folds = int(header[0]) if len(header) == 2 else max(1, len(named_pairs) // fold_size)
    if len(named_pairs) != folds * fold_size:
        raise InputError(f"{file} declares {folds:,} x {fold_size:,} = {folds * fold_size:,} pairs but contains "
                         f"{len(named_pairs):,}; complete it or correct its first line.")
    same = np.array([len(fields) == 3 for _, fields in lines[1:]])
    if folds < 2 or same.all() or not same.any():
        raise InputError(f"{file} has {count_of(folds, 'fold~')}, {count_of(same.sum(), 'genuine pair~')} and "
                         f"{count_of((~same).sum(), 'impostor pair~')}, but "
                         "the protocol needs at least two folds and pairs of both kinds; add what is missing.")
    return named_pairs, same, np.arange(len(named_pairs)) // fold_size


def _image_names(file, number, fields):
    """Return the names of both images on a line, without extension."""
    if len(fields) == 3:
        fields = [fields[0], fields[1], fields[0], fields[2]]
    elif len(fields) == 4 and fields[0] == fields[2]:
        raise InputError(f"{file}, line {number}: the impostor pair names the same person twice ({fields[0]}); correct "
                         "the line.")
    if len(fields) != 4 or not all(fields) or not _is_integer(fields[1]) or not _is_integer(fields[3]):
        raise InputError(f"{file}, line {number}: expected `Name i j` or `Name1 i Name2 j`; correct the line.")
    return tuple(normal_form(f"{name}/{name}_{int(i):04d}") for name, i in (fields[:2], fields[2:]))


def _is_integer(field):
    return field.isascii() and field.isdigit() and len(field) <= 9


def _is_positive_integer(field):
    return _is_integer(field) and int(field) > 0
