"""InsightFace's verification sets, lfw.bin, agedb_30.bin, cfp_fp.bin, calfw.bin, cplfw.bin: their pairs and images.

Such a file is a pickle of (images, issame): 2 P image files of faces aligned to 112x112, as bytes or as one-dimensional
numpy arrays of them, and P booleans. Images 2i and 2i + 1 are pair i. It is read by faces.unpickle, which runs nothing.
The pairs make ten folds in their order, the first ones longer by a pair where ten doesn't divide their number.
"""
from pathlib import Path

import numpy as np

from faces.errors import InputError
from faces.pairs import Pairs
from faces.unpickle import Refused, load

FOLDS = 10
MAX_BYTES = 2 * 10**9     # the largest known are about 100 MB
MAX_IMAGES = 100_000      # 3.2 GB once decoded; the largest known have 14,000


def read_bin(file):
    """Read a .bin set.

    An image that comes in several pairs is one image, found by its bytes. The file has no names: images that genuine
    pairs link count as one identity.

    Args:
        file: the file.

    Returns:
        (Pairs, images): images is a list of N files as bytes, one per path of Pairs, which are `lfw.bin#12`, the
        place where the image comes first.

    Raises:
        InputError: can't be read, too large, or holds anything but what it should.
    """
    file = Path(file)
    try:
        images, same = _contents(load(_read(file)))
    except Refused as error:
        raise InputError(f"{file} is refused as an InsightFace .bin set: {error}; give lfw.bin or one like it, or a "
                         "folder of images.") from None
    index = {}
    rows = np.array([index.setdefault(image, len(index)) for image in images])
    _, places = np.unique(rows, return_index=True)
    sizes = [len(part) for part in np.array_split(same, FOLDS)]
    pairs = rows.reshape(-1, 2)
    return Pairs([f"{file.name}#{place}" for place in places], pairs, same, np.repeat(np.arange(FOLDS), sizes),
                 _linked(len(index), pairs[same]), named=False), list(index)


def _read(file):
    try:
        if file.stat().st_size > MAX_BYTES:
            raise Refused(f"it is over {MAX_BYTES // 10**9} GB")
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"can't read {file}: {error.strerror}; give a .bin set or a folder of images.") from None


def _contents(value):
    """Return the images, a list of bytes, and bool (P,)."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise Refused("it does not hold two lists")
    images, same = value
    if not isinstance(images, (list, tuple)) or not _is_row(same):
        raise Refused("it does not hold two lists")
    if len(images) != 2 * len(same):
        raise Refused(f"it has {len(images)} images for {len(same)} pairs")
    if len(images) > MAX_IMAGES:
        raise Refused(f"it has over {MAX_IMAGES:,} images")
    same = same.tolist() if isinstance(same, np.ndarray) else same
    if not all(isinstance(flag, (bool, int)) and flag in (0, 1) for flag in same):
        raise Refused("it says of a pair neither true nor false")
    same = np.array(same, bool)
    if len(same) < FOLDS or same.all() or not same.any():
        raise Refused(f"it has {len(same)} pairs, {same.sum()} of them genuine, and {FOLDS} folds need both kinds")
    files = {}   # by object: one array that is listed a thousand times is copied once
    for i, image in enumerate(images):
        if id(image) not in files:
            files[id(image)] = _image_bytes(i, image)
    return [files[id(image)] for image in images], same


def _is_row(value):
    return isinstance(value, (list, tuple)) or isinstance(value, np.ndarray) and value.ndim == 1


def _image_bytes(i, image):
    if isinstance(image, np.ndarray) and image.ndim == 1 and image.dtype == np.uint8:
        image = image.tobytes()
    if not isinstance(image, bytes):
        raise Refused(f"image {i} is not the bytes of an image file")
    return image


def _linked(count, links):
    """Return int64 (count,): the same number for things that are linked, directly or through others."""
    parent = list(range(count))

    def root(i):
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for a, b in links.tolist():
        parent[root(a)] = root(b)
    return np.unique([root(i) for i in range(count)], return_inverse=True)[1]
