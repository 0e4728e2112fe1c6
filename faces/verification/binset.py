"""InsightFace's verification sets (lfw.bin, agedb_30.bin, cfp_fp.bin, calfw.bin, cplfw.bin): their pairs and images.

Such a file is a pickle of (images, issame): 2 P encoded images of faces aligned to 112x112, as bytes or one-dimensional
numpy arrays, and P booleans. Images 2i and 2i + 1 are pair i, and the pairs form ten folds, see ten_folds() in
pairs.py. It may be compressed with xz.
"""
import io
import lzma
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
FUNCTIONS = {"_codecs.encode", "numpy.dtype", "numpy.ndarray", "numpy.core.multiarray._reconstruct",
             "numpy.core.multiarray.scalar", "numpy.core.numeric._frombuffer"}


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
    """Read a .bin set. No code in the file is run, and memory is a small multiple of its size.

    The N images differ in their bytes. A path looks like `lfw.bin#12`, with the position at which the image occurs
    first. Images that are linked by genuine pairs count as one identity. Raises InputError if the file can't be read,
    is too large, or holds anything but what it should.
    """
    file = path(file)
    with reading(file, "verification set in InsightFace's format", "pass lfw.bin or the like, or a folder of images"):
        images, same = _unpickle(_uncompressed(read_bytes(file, MAX_BYTES)))
        same = _array(same) if isinstance(same, Call) else [
            _array(flag)[0] if isinstance(flag, Call) else flag for flag in same]
        if len(images) != 2 * len(same) or len(images) > MAX_IMAGES or not all(flag in (0, 1) for flag in same):
            raise ValueError(f"it has {count_of(len(images), 'image~')} for {count_of(len(same), 'pair~')}, or a pair "
                             "that is marked neither true nor false")
        same = np.array(same, bool)
        if len(same) < FOLDS or same.all() or not same.any():
            raise ValueError(f"it has {count_of(len(same), 'pair~')}, {same.sum()} of them genuine, and {FOLDS} folds "
                             "need both kinds")
        index = {}
        rows = np.array([index.setdefault(_bytes(image), len(index)) for image in images])
    _, places = np.unique(rows, return_index=True)
    pairs, paths = rows.reshape(-1, 2), [f"{file.name}#{place}" for place in places]
    return (Pairs(paths, pairs, same, ten_folds(same), linked(len(index), pairs[same]), None, str(file)),
            Images(file, dict(zip(paths, index))))


class Call:
    """A function that a pickle calls, one of FUNCTIONS. It is not called, only recorded."""

    __match_args__ = ("name", "arguments", "state")

    def __init__(self, name, arguments):
        self.name, self.arguments, self.state = name.rpartition(".")[2], arguments, None

    def __setstate__(self, state):
        self.state = state


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        name = f"{module}.{name}".replace("numpy._core.", "numpy.core.")
        if name not in FUNCTIONS:
            raise ValueError(f"it asks for {ascii(name[:60])}")
        return lambda *arguments: Call(name, arguments)


def _uncompressed(data):
    if not data.startswith(b"\xfd7zXZ"):
        return data
    reader = lzma.LZMADecompressor(memlimit=MAX_BYTES)    # xz -9 needs 65 MB
    data = reader.decompress(data, MAX_BYTES)
    if not reader.eof:
        raise ValueError(f"it ends early, or has over {MAX_BYTES // 10**6} MB uncompressed")
    return data


def _unpickle(data):
    """Return the plain data and Calls in a pickle. Strings of Python 2 become bytes."""
    for count, (instruction, argument, _) in enumerate(pickletools.genops(data)):
        # The unpickler allocates a table up to the index of a PUT.
        if instruction.name in HASHED or count == MAX_INSTRUCTIONS or "PUT" in instruction.name and argument > count:
            raise ValueError("it holds more than plain data")
    return _Unpickler(io.BytesIO(data), encoding="bytes").load()


def _bytes(value) -> bytes:
    match value:
        case bytes() | bytearray():
            return bytes(value)
        case Call("encode", (str(text), "latin1" | "latin-1")):    # bytes in the protocols of Python 2
            return text.encode("latin-1")
        case Call() if (array := _array(value)).dtype == np.uint8:
            return array.tobytes()
    raise ValueError("its images are not the bytes of image files")


def _array(value: Call) -> np.ndarray:
    """Return the numpy array or scalar that a pickle makes, (size,)."""
    match value:
        case Call("_reconstruct", _, (_, _, dtype, _, data)) | Call("_frombuffer", (data, dtype, *_)) \
                | Call("scalar", (dtype, data)):
            name, order = dtype.arguments[0], dtype.state[1]
            name, order = (text.decode() if isinstance(text, bytes) else text for text in (name, order))
            if not re.fullmatch(r"b1|[iu][1248]|f[248]", name):
                raise ValueError(f"it has an array of the type {ascii(name[:40])}")
            return np.frombuffer(_bytes(data), np.dtype(name).newbyteorder(order))
    raise ValueError("it holds more than arrays of numbers")
