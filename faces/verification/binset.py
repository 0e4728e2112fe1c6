"""InsightFace's verification sets (lfw.bin, agedb_30.bin, cfp_fp.bin, calfw.bin, cplfw.bin): their pairs and images.

Such a file is a pickle of (images, issame): 2 P encoded images of faces aligned to 112x112, as bytes or one-dimensional
numpy arrays, and P booleans. Images 2i and 2i + 1 are pair i. The pairs form ten folds in their order; if ten does not
divide their number, the first folds have one pair more.
"""
import io
import pickle
import re
import struct
from pathlib import Path

import numpy as np

from faces.files import InputError, read_bytes
from faces.text import count_of
from faces.verification.pairs import Pairs

FOLDS = 10
MAX_BYTES = 300 * 10**6   # the largest known files are about 100 MB
MAX_IMAGES = 30_000       # 1 GB once decoded; the largest known files have 14,000
MAX_READS = 2_000_000     # by the unpickler, about two per instruction; the largest known files have half a million


class Refused(Exception):
    """The file must not be used. The message is the reason, without the file's name."""


def read_bin(file):
    """Read a .bin set.

    An image that occurs in several pairs is one image, identified by its bytes. The file has no names: images that are
    linked by genuine pairs count as one identity.

    Args:
        file: the file.

    Returns:
        (Pairs, images): images is a list of N encoded images as bytes, one per path of Pairs. A path looks like
        `lfw.bin#12`, with the position at which the image occurs first.

    Raises:
        InputError: the file can't be read, is too large, or holds anything but what it should.
    """
    file = Path(file)
    try:
        images, same = _check(unpickle(_read(file)))
    except Refused as error:
        raise InputError(f"{file} is refused as an InsightFace .bin set: {error}; pass lfw.bin or a similar file, or a "
                         "folder of images.") from None
    index = {}
    rows = np.array([index.setdefault(image, len(index)) for image in images])
    _, places = np.unique(rows, return_index=True)
    sizes = [len(part) for part in np.array_split(same, FOLDS)]
    pairs = rows.reshape(-1, 2)
    return Pairs([f"{file.name}#{place}" for place in places], pairs, same, np.repeat(np.arange(FOLDS), sizes),
                 _linked(len(index), pairs[same]), named=False), list(index)


def unpickle(data):
    """Return what a pickle of plain data holds: lists, tuples, bytes, text, numbers, booleans and numpy arrays.

    Strings of Python 2 become bytes. No code of the file is run, and memory grows only with the bytes that are there.

    Raises:
        Refused: damaged, not a pickle, too many instructions, or anything that is not plain data.
    """
    try:
        return _Unpickler(data).load()
    except Refused:
        raise
    except Exception:  # a damaged pickle raises nearly any exception
        raise Refused("it is damaged or not a pickle") from None


class _Unpickler(pickle._Unpickler):
    """Python's unpickler, reduced to plain data.

    The version written in Python, because the C version allocates the memo for the largest index that a file names,
    which can be 32 GB. A file can't reach anything but the methods that find_class() returns.
    """

    KEPT = """MARK STOP PROTO INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT NONE NEWTRUE NEWFALSE UNICODE
        SHORT_BINUNICODE BINUNICODE BINUNICODE8 BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 EMPTY_LIST
        EMPTY_TUPLE LIST TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND APPENDS PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET
        GLOBAL STACK_GLOBAL REDUCE BUILD""".split()
    dispatch = {getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in KEPT}

    def __init__(self, data):
        super().__init__(_CountedReads(data), encoding="bytes")
        self.budget = 2 * len(data) + 1000    # bytes to decode and to fill arrays with; an array's may be both

    def load_frame(self):
        self.read(8)    # frames are a hint for reading ahead, which would bypass _CountedReads

    def load_bytearray(self):
        size, = struct.unpack("<Q", self.read(8))
        self.append(self.read(size))    # as bytes, and without allocating the size that the file claims

    def load_build(self):
        if type(self.stack[-2]) not in (_Dtype, _Array):    # of anything else, BUILD would set attributes
            raise ValueError
        self._spend(self.stack[-1])
        super().load_build()

    dispatch |= {pickle.FRAME[0]: load_frame, pickle.BYTEARRAY8[0]: load_bytearray, pickle.BUILD[0]: load_build}

    def find_class(self, module, name):
        builders = {"_codecs.encode": self._encode, "numpy.ndarray": self._uncallable, "numpy.dtype": _Dtype.of}
        for core in ("numpy.core", "numpy._core"):
            builders |= {f"{core}.multiarray._reconstruct": _Array.empty, f"{core}.multiarray.scalar": self._scalar,
                         f"{core}.numeric._frombuffer": self._array}
        if f"{module}.{name}" not in builders:
            raise Refused(f"it asks for {ascii(f'{module}.{name}'[:60])[1:-1]}")
        return self._limited(builders[f"{module}.{name}"])

    def _limited(self, builder):
        def build(*arguments):
            self._spend(arguments)
            return builder(*arguments)
        return build

    def _spend(self, values):
        # One long string can be passed on a million times, and is copied each time.
        self.budget -= sum(len(value) for value in values if isinstance(value, (bytes, str)))
        if self.budget < 0:
            raise Refused("it unfolds to many times its size")

    @staticmethod
    def _encode(text, encoding):
        """Build bytes, as Python 3 writes them in the protocols of Python 2."""
        if _text(encoding) not in ("latin1", "latin-1"):
            raise ValueError
        return text.encode("latin-1")

    @staticmethod
    def _uncallable(*_):
        raise Refused("it makes an array that has no data")

    @staticmethod
    def _array(data, dtype, shape, order):
        return np.frombuffer(data, dtype.value).reshape(shape, order=_text(order))

    @staticmethod
    def _scalar(dtype, data):
        if len(data) != dtype.value.itemsize:
            raise ValueError
        return np.frombuffer(data, dtype.value)[0].item()


class _CountedReads(io.BytesIO):
    """The file, with a bound on the number of reads: an instruction of one byte can take 60 bytes of memory."""

    reads = 0

    def read(self, *size):
        self.reads += 1
        if self.reads > MAX_READS:
            raise Refused("it has too many instructions")
        return super().read(*size)


class _Dtype:
    """A numpy dtype of numbers; the byte order follows in __setstate__."""

    __slots__ = ("value",)

    @classmethod
    def of(cls, name, *_):
        if not re.fullmatch(r"b1|[iu][1248]|f[248]", _text(name)):
            raise Refused(f"it has an array of the type {ascii(_text(name)[:40])}")
        dtype = cls()
        dtype.value = np.dtype(_text(name))
        return dtype

    def __setstate__(self, state):
        if any(part is not None for part in state[2:5]):
            raise Refused("it has an array of a compound type")
        self.value = self.value.newbyteorder(_text(state[1]))


class _Array(np.ndarray):
    """A numpy array whose data follow in __setstate__."""

    @classmethod
    def empty(cls, *_):
        return np.empty(0, np.uint8).view(cls)

    def __setstate__(self, state):
        _, shape, dtype, fortran, data = state
        if type(data) is not bytes:  # a list of objects, for an array of type O
            raise ValueError
        super().__setstate__((1, shape, dtype.value, bool(fortran), data))  # checks that shape and data agree


def _text(value):
    value = value.decode("ascii") if type(value) is bytes else value
    if type(value) is not str:
        raise ValueError
    return value


def _read(file):
    try:
        return read_bytes(file, MAX_BYTES)
    except OSError as error:
        raise InputError(f"can't read {file}: {error.strerror or error}; pass a .bin set or a folder of "
                         "images.") from None


def _check(value):
    """Return the images, a list of bytes, and bool (P,)."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise Refused("it does not hold two lists")
    images, same = value
    if not isinstance(images, (list, tuple)) or not _is_row(same):
        raise Refused("it does not hold two lists")
    if len(images) != 2 * len(same):
        raise Refused(f"it has {count_of(len(images), 'image~')} for {count_of(len(same), 'pair~')}")
    if len(images) > MAX_IMAGES:
        raise Refused(f"it has over {MAX_IMAGES:,} images")
    same = same.tolist() if isinstance(same, np.ndarray) else same
    if not all(isinstance(flag, (bool, int)) and flag in (0, 1) for flag in same):
        raise Refused("a pair is marked neither true nor false")
    same = np.array(same, bool)
    if len(same) < FOLDS or same.all() or not same.any():
        raise Refused(f"it has {count_of(len(same), 'pair~')}, {same.sum()} of them genuine, and {FOLDS} folds need "
                      "both kinds")
    files = {}   # by object, so that an array that is listed a thousand times is copied once
    for i, image in enumerate(images):
        if id(image) not in files:
            files[id(image)] = _image_bytes(i, image)
    return [files[id(image)] for image in images], same


def _is_row(value):
    return isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.ndim == 1)


def _image_bytes(i, image):
    if isinstance(image, np.ndarray) and image.ndim == 1 and image.dtype == np.uint8:
        image = image.tobytes()
    if not isinstance(image, bytes):
        raise Refused(f"image {i} is not the bytes of an image file")
    return image


def _linked(count, links):
    """Return int64 (count,): the same number for items that are linked, directly or through others."""
    parent = list(range(count))

    def root(i):
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for a, b in links.tolist():
        parent[root(a)] = root(b)
    return np.unique([root(i) for i in range(count)], return_inverse=True)[1]
