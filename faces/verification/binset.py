"""InsightFace's verification sets (lfw.bin, agedb_30.bin, cfp_fp.bin, calfw.bin, cplfw.bin): their pairs and images.

Such a file is a pickle of (images, issame): 2 P encoded images of faces aligned to 112x112, as bytes or one-dimensional
numpy arrays, and P booleans. Images 2i and 2i + 1 are pair i, and the pairs form ten folds in their order.
"""
import io
import pickle
import pickletools
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from faces.files import count_of, path, read_bytes, reading
from faces.verification.pairs import FOLDS, Pairs, linked, ten_folds

MAX_BYTES = 300 * 10**6   # the largest known files are about 100 MB
MAX_IMAGES = 30_000       # 1 GB once decoded; the largest known files have 14,000
MAX_INSTRUCTIONS = 10**6  # of the pickle, each of which can take 100 bytes; the largest known files have 300,000
HASHED = {"EMPTY_DICT", "DICT", "EMPTY_SET", "FROZENSET"}    # hashing deeply nested values crashes Python


class Images(NamedTuple):
    """The images of a .bin set: encoded[path] is one, as bytes."""
    file: Path
    encoded: dict

    def __str__(self):
        return str(self.file)

    def open(self, name: str) -> bytes:
        """Return an image, to pass to read_image()."""
        return self.encoded[name]


def read_bin(file) -> tuple[Pairs, Images]:
    """Read a .bin set.

    An image that occurs in several pairs is one image, identified by its bytes. The file has no names: images that are
    linked by genuine pairs count as one identity.

    Returns:
        (Pairs, Images), of N distinct images. A path looks like `lfw.bin#12`, with the position at which the image
        occurs first.

    Raises:
        InputError: the file can't be read, is too large, or holds anything but what it should.
    """
    file = path(file)
    with reading(file, "verification set in InsightFace's format", "pass lfw.bin or the like, or a folder of images"):
        images, same = _check(unpickle(read_bytes(file, MAX_BYTES)))
        index = {}
        rows = np.array([index.setdefault(image, len(index)) for image in images])
    _, places = np.unique(rows, return_index=True)
    pairs, paths = rows.reshape(-1, 2), [f"{file.name}#{place}" for place in places]
    return (Pairs(paths, pairs, same, ten_folds(len(same)), linked(len(index), pairs[same]), named=False),
            Images(file, dict(zip(paths, index))))


def unpickle(data: bytes):
    """Return what a pickle of plain data holds: lists, tuples, bytes, text, numbers, booleans; numpy arrays as Array.

    Strings of Python 2 become bytes. No code of the file is run, and memory is a small multiple of the file's size.

    Raises:
        Exception: of any type, if the file is damaged or holds anything else.
    """
    for count, (instruction, argument, _) in enumerate(pickletools.genops(data)):
        if instruction.name in HASHED or count == MAX_INSTRUCTIONS:
            raise ValueError("it holds more than plain data")
        if "PUT" in instruction.name and argument > count:    # the unpickler allocates a table up to this index
            raise ValueError("it names an index that is out of range")
    return _Unpickler(data).load()


class Array:
    """A numpy array of numbers in a pickle: its bytes `data`, and `values`, a one-dimensional numpy array of them."""

    __slots__ = ("data", "values")

    def __setstate__(self, state):
        _, shape, dtype, _, self.data = state    # frombuffer() raises an exception for an array of objects
        self.values = np.frombuffer(self.data, dtype.value).reshape(shape).ravel()


class _Dtype:
    """A numpy dtype of numbers; its byte order follows."""

    __slots__ = ("value",)

    def __init__(self, name, *_):
        if not re.fullmatch(r"b1|[iu][1248]|f[248]", _text(name)):
            raise ValueError(f"it has an array of the type {ascii(_text(name)[:40])}")
        self.value = np.dtype(_text(name))

    def __setstate__(self, state):
        self.value = self.value.newbyteorder(_text(state[1]))


class _Unpickler(pickle.Unpickler):
    """Python's unpickler, which can reach nothing but the functions below: they stand for those of numpy."""

    def __init__(self, data):
        super().__init__(io.BytesIO(data), encoding="bytes")
        self.budget = 2 * len(data) + 1000    # characters to encode; one long text can be passed on a million times

    def find_class(self, module, name):
        name = f"{module}.{name}".replace("numpy._core.", "numpy.core.")
        builders = {"_codecs.encode": self._encode, "numpy.dtype": _Dtype, "numpy.ndarray": None,
                    "numpy.core.multiarray._reconstruct": lambda *_: Array(),
                    "numpy.core.multiarray.scalar": lambda dtype, data: _array(data, dtype).values[0].item(),
                    "numpy.core.numeric._frombuffer": _array}
        if name not in builders:
            raise ValueError(f"it asks for {ascii(name[:60])}")
        return builders[name]

    def _encode(self, text, encoding):
        """Build bytes, as Python 3 writes them in the protocols of Python 2."""
        self.budget -= len(text)
        if self.budget < 0 or _text(encoding) not in ("latin1", "latin-1"):
            raise ValueError("it unfolds to many times its size, or has an unknown encoding")
        return text.encode("latin-1")


def _array(data, dtype, shape=(-1,), _="C"):
    array = Array()
    array.__setstate__((1, shape, dtype, False, data))
    return array


def _text(value):
    return value.decode("ascii") if isinstance(value, bytes) else str.__str__(value)


def _check(value):
    """Return the images, a list of bytes, and bool (P,)."""
    images, same = value
    same = same.values.tolist() if isinstance(same, Array) else same
    if not (isinstance(images, (list, tuple)) and isinstance(same, (list, tuple))):
        raise ValueError("it does not hold two lists")
    if len(images) != 2 * len(same) or len(images) > MAX_IMAGES:
        raise ValueError(f"it has {count_of(len(images), 'image~')} for {count_of(len(same), 'pair~')}")
    if not all(isinstance(flag, (bool, int)) and flag in (0, 1) for flag in same):
        raise ValueError("a pair is marked neither true nor false")
    same = np.array(same, bool)
    if len(same) < FOLDS or same.all() or not same.any():
        raise ValueError(f"it has {count_of(len(same), 'pair~')}, {same.sum()} of them genuine, and {FOLDS} folds need "
                         "both kinds")
    images = [image.data if isinstance(image, Array) and image.values.dtype == np.uint8 else image for image in images]
    if not all(isinstance(image, (bytes, bytearray)) for image in images) or sum(map(len, images)) > 10**9:
        raise ValueError("its images are not the bytes of image files")
    return list(map(bytes, images)), same
