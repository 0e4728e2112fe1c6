"""Load verification sets: Labeled Faces in the Wild, folders like it, and InsightFace's .bin files."""
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from faces.align import align_all, check_positions
from faces.data.sources import PARTS, open_photos
from faces.files import InputError, count_of, existing_folder, path, shorten
from faces.images import summarize
from faces.landmarks import found_list, normal_form, read_landmarks
from faces.verification.binset import read_bin
from faces.verification.pairs import CONTENT, Pairs, read_pairs

# In the order in which papers give them.
ORDER = {name: i for i, name in enumerate(("lfw", "cfp_fp", "agedb_30", "calfw", "cplfw"))}


class Lfw(NamedTuple):
    """A verification set in memory."""
    pairs: Pairs
    faces: np.ndarray    # uint8 (N, HEIGHT, WIDTH, 3), RGB, aligned; one per path of `pairs`
    landmarks: str       # where the landmarks came from, in words
    source: str          # path of the set


def set_name(file) -> str:
    """Return the name of the set at a path: the path's last part, without its extension."""
    name = Path(file).absolute().name
    return name.partition(".bin")[0] if is_bin(file) else name.removesuffix(".zip")


def is_bin(file) -> bool:
    """Return whether a path is named like one of InsightFace's sets: lfw.bin, or lfw.bin.xz."""
    return Path(file).name.lower().endswith((".bin", ".bin.xz"))


def find_sets(roots: list) -> list[Path]:
    """Return the paths of the sets at some paths, at each of which there must be something: a folder of .bin files
    stands for these, in the order of ORDER."""
    sets = []
    for root in map(path, roots):
        if not root.is_file():
            existing_folder(root, f"{CONTENT}, or .bin sets")
        inside = [] if root.is_file() or (root / "pairs.txt").exists() else list(filter(is_bin, root.iterdir()))
        sets += sorted(inside, key=lambda file: (ORDER.get(set_name(file), len(ORDER)), file.name)) or [root]
    return sets


def load_sets(sets: list[Path], pairs: list = (), landmarks: list = (), **options) -> Iterator[Lfw]:
    """Load one set of find_sets() after the other, with further arguments of load_lfw(). Lists of pairs and landmarks:
    none, or one for each of the sets that are no .bin files, in their order."""
    takers = [len(sets) == 1 or not is_bin(file) for file in sets]
    for files, kind in ((pairs, "list~ of pairs"), (landmarks, "landmark list~")):
        if sets and len(files) not in (0, sum(takers)):
            raise InputError(f"{count_of(len(files), kind)} for {count_of(sum(takers), 'set~')} of images; pass one "
                             "for each set, in their order (.bin sets need none).")
    pairs, landmarks = iter(pairs), iter(landmarks)
    for file, takes in zip(sets, takers):
        own = (next(pairs, None), next(landmarks, None)) if takes else (None, None)
        yield load_lfw(file, *own, **options)


def load_lfw(root, file=None, landmarks=None, aligned: bool = False, view: int | None = None, find_landmarks=None,
             device="cpu", identification: bool = False) -> Lfw:
    """Read the pairs of LFW, or of a similar set, and align the images that they name.

    `root` is a folder or zip of `Name/Name_0001.jpg`, or InsightFace's lfw.bin or the like. For `file`, `view` and
    `identification` see read_pairs(). The landmarks are those of a list, by default the one in the folder or of
    mtcnn/lfw_landmark.py, or else of `find_landmarks`, such as mtcnn.landmark_lists.find_landmarks, on `device`; images
    that are `aligned`, 112x96 or 112x112, need none. Raises InputError if anything is missing, malformed or unreadable;
    no pair is ever left out.
    """
    root = path(root)
    if root.is_file() and root.suffix.lower() not in (".zip", *PARTS):
        if file or landmarks or view:
            raise InputError(f"{root} contains its pairs and aligned faces; leave out --pairs, --landmarks and --view.")
        pairs, images = read_bin(root)
        return Lfw(pairs, load_faces(images, pairs.paths), f"none, the faces in {root.name} are aligned", str(root))
    source, points, found = open_photos(root, CONTENT), None, "none, the images are aligned"
    pairs = read_pairs(source, file, view, identification)
    listed = None if aligned else path(landmarks) if landmarks else found_list(source, "lfw_landmark.txt")
    if listed:
        points, found = _landmarks_of(listed, pairs.paths, source), str(listed)
    elif not aligned:
        points, found = _detect_landmarks(source, pairs.paths, find_landmarks, device)
    return Lfw(pairs, load_faces(source, pairs.paths, points), found, str(root))


def _detect_landmarks(source, paths, find_landmarks, device):
    if source.root.is_file() or find_landmarks is None:
        find = "unpack it" if source.root.is_file() else f"run `python mtcnn/lfw_landmark.py --lfw {source}`"
        raise InputError(f"there is no landmark list for {source}; {find} first, pass a list with --landmarks, or "
                         "--aligned if the faces are aligned.")
    images = count_of(len(paths), "image~")
    print(f"there is no landmark list for {source}; detecting landmarks in {images} now (mtcnn/lfw_landmark.py would "
          "save them)", file=sys.stderr)
    points, missed = find_landmarks(source.root, paths, device=device)
    found = f"MTCNN, for this run; no face in {missed:,} of {images}{', which got the median landmarks' * bool(missed)}"
    print(found, file=sys.stderr)
    return points, found


def load_faces(source, paths: list, points: np.ndarray | None = None) -> np.ndarray:
    """Return the faces of the images with N names in a source, see align_all(), which all have to be usable."""
    faces, centers, bad = align_all(source, paths, points, progress=True)
    if bad:
        raise InputError(f"{len(bad):,} of {count_of(len(paths), 'image~')} in {source} can't be used "
                         f"({summarize([(paths[row], reason) for row, reason in bad])}); replace them, because a "
                         "verification set must be complete.")
    check_positions(centers, source)
    return faces


def _landmarks_of(file, paths, source):
    """Return the landmarks of images from a list without labels, float32 (N, 5, 2)."""
    listed = read_landmarks(file, labeled=False, root=source.root)
    row = {normal_form(name).removeprefix(source.wrapper): i for i, name in enumerate(listed.paths)}
    absent = [name for name in paths if normal_form(name) not in row]
    if absent:
        raise InputError(f"{file} lacks {len(absent)} of the {len(paths)} images that are needed ({shorten(absent)}); "
                         "replace those that can't be read, and write the list again with mtcnn/lfw_landmark.py.")
    return listed.points[[row[normal_form(name)] for name in paths]]
