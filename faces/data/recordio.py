"""InsightFace's training sets, read without mxnet: a folder with train.rec, train.idx and property, faces of 112x112.

train.rec is dmlc's RecordIO; its numbers are little-endian. A record is the magic number (uint32), kind << 29 | length
(uint32), `length` bytes of data, and zeros up to a multiple of 4. Where the data itself has the magic number at a
multiple of 4, those four bytes are left out and the data goes on in another part: kinds 1, 2 and 3 are the first, a
middle and the last part; kind 0 is a record in one part.

The data are flag (uint32), label (float32), id and id2 (uint64), then `flag` float32 labels that replace `label`, and
the image file. train.idx has a line `key offset`, tab separated, for each record. A record of key 0 that has two
labels, (first, end), and no image is a table of contents: the images have the keys from 1 to below `first`; from there
to below `end` are records about the identities, which repeat what the images' own labels say and are not read. In a
set without it, every key is an image. property is one line, `classes,height,width`, and may be absent.
"""
import os
import struct
import warnings
import weakref
from pathlib import Path

import numpy as np
from tqdm import tqdm

from faces.files import InputError
from faces.images import MAX_BYTES, UnreadableImage

MAGIC = 0xCED7230A
WHOLE, FIRST, MIDDLE, LAST = range(4)
PART = struct.Struct("<II")                                              # magic, kind << 29 | length
PREFIX = struct.Struct("<IfQQ")                                          # flag, label, id, id2
HEADER = np.dtype([("magic", "<u4"), ("word", "<u4"), ("flag", "<u4"), ("label", "<f4"), ("id", "<u8", 2),
                   ("first", "<f4")])                                    # all that comes before a label is known
CHUNK = 65536                                                            # headers in memory at a time


class Records:
    """The images of a RecordIO folder, in the order in which they lie in the file.

    Every header, label and length is checked once, when the object is made: a record that lies can't be opened later.

    Attributes:
        path: train.rec.
        keys, offsets: int64 (N,), of the images' records in train.idx.
        labels: int64 (N,), at least 0; below the number of classes that property names.

    Raises:
        InputError: a file that is absent, damaged or hostile.
    """

    def __init__(self, root):
        self.root, self.path = Path(root), Path(root) / "train.rec"
        try:
            self.file = open(self.path, "rb", buffering=0)
            weakref.finalize(self, self.file.close)
            self.size = os.fstat(self.file.fileno()).st_size
            self.keys, self.offsets = self._images(*_read_index(self.root / "train.idx", self.size))
            self.labels = self._read_labels(_read_classes(self.root / "property"))
        except OSError as error:
            raise InputError(f"can't read {self.path}: {error.strerror}; check its permissions and the disk.") from None

    def __str__(self):
        return str(self.root)

    def names(self):
        """What the images are called, as `key@offset`; the offsets tell apart two sets with the same keys."""
        return [f"{key}@{offset}" for key, offset in zip(self.keys.tolist(), self.offsets.tolist())]

    def open(self, name):
        """The bytes of the image `name`. Threads may call this at the same time.

        Raises:
            UnreadableImage: the disk fails, or the file was changed since it was checked.
        """
        try:
            return _unpack(self._record(int(name.partition("@")[2])))[1]
        except (OSError, ValueError) as error:
            raise UnreadableImage(f"record {error}") from None

    def _record(self, offset):
        """The data of the record at a byte offset, its parts joined; a ValueError says what is wrong with it."""
        data, kinds = bytearray(), (WHOLE, FIRST)
        while True:
            magic, word = PART.unpack(self._read(offset, PART.size))
            kind, length = _kind_and_length(word)
            if magic != MAGIC or kind not in kinds or kind in (FIRST, MIDDLE) and length % 4:
                raise ValueError("is not framed as a record")
            if len(data) + length > MAX_BYTES:
                raise ValueError(f"is over {MAX_BYTES // 10**6} MB")
            data += self._read(offset + PART.size, length)
            if kind in (WHOLE, LAST):
                return bytes(data)
            data += struct.pack("<I", MAGIC)
            offset, kinds = offset + PART.size + length, (MIDDLE, LAST)

    def _read(self, offset, length):
        if offset + length > self.size:
            raise ValueError("reaches beyond the end of the file")
        data = os.pread(self.file.fileno(), length, offset)
        if len(data) != length:
            raise ValueError("can't be read to its end")
        return data

    def _images(self, keys, offsets):
        """Of all records, those that are images: (keys, offsets)."""
        try:
            contents = self._record(int(offsets[keys == 0][0])) if (keys == 0).any() else b""
        except ValueError as error:
            raise InputError(self._complaint(0, error)) from None
        if len(contents) != PREFIX.size + 8 or PREFIX.unpack_from(contents)[0] != 2:
            return keys, offsets
        first, end = struct.unpack_from("<ff", contents, PREFIX.size)
        images = (keys > 0) & (keys < first)
        if not 1 < first <= end < np.inf or images.sum() != first - 1:
            raise InputError(self._complaint(0, f"says that the images have the keys from 1 to below {first:g}, of "
                                                f"which train.idx lists {images.sum()}"))
        return keys[images], offsets[images]

    def _read_labels(self, classes):
        labels = np.empty(len(self.keys), np.int64)
        with tqdm(total=len(labels), desc=f"reading labels in {self.path.name}", unit="image", unit_scale=True,
                  dynamic_ncols=True, delay=2, leave=False) as bar:
            for start in range(0, len(labels), CHUNK):
                chunk = slice(start, start + CHUNK)
                labels[chunk] = self._labels_of(self.keys[chunk], self.offsets[chunk])
                bar.update(len(labels[chunk]))
        if classes is not None and labels.max() >= classes:
            row = labels.argmax()
            raise InputError(self._complaint(self.keys[row], f"has the label {labels[row]}, but property names "
                                                             f"{classes} classes"))
        return labels

    def _labels_of(self, keys, offsets):
        raw = b"".join(os.pread(self.file.fileno(), HEADER.itemsize, offset).ljust(HEADER.itemsize, b"\0")
                       for offset in offsets.tolist())
        header = np.frombuffer(raw, HEADER)
        kind, length = _kind_and_length(header["word"].astype(np.int64))
        flag = header["flag"].astype(np.int64)
        self._refuse(keys, (header["magic"] != MAGIC) | (kind > FIRST), "is not framed as a record")
        self._refuse(keys, offsets + PART.size + length > self.size, "reaches beyond the end of the file")
        self._refuse(keys, length > MAX_BYTES, f"is over {MAX_BYTES // 10**6} MB")
        self._refuse(keys, (kind == WHOLE) & (length < PREFIX.size + 4 * flag), "is too short for its labels")
        labels = np.where(flag > 0, header["first"], header["label"])
        for row in np.flatnonzero(kind == FIRST):  # one image in millions: the magic number came up by chance
            try:
                labels[row] = _unpack(self._record(int(offsets[row])))[0]
            except ValueError as error:
                raise InputError(self._complaint(keys[row], error)) from None
        # From 2**24 on, float32 has no fractions, and so can't tell a whole number from a rounded one.
        self._refuse(keys, ~((labels >= 0) & (labels == np.floor(labels)) & (labels < 2**24)),
                     "has a label that is no whole number from 0 to 16,777,215")
        return labels.astype(np.int64)

    def _refuse(self, keys, bad, what):
        if bad.any():
            raise InputError(self._complaint(keys[bad.argmax()], what))

    def _complaint(self, key, what):
        return (f"{self.path}: record {key} {what}; the file is damaged, or train.idx or property is another set's: "
                "copy the set anew.")


def _kind_and_length(word):
    return word >> 29, word & (1 << 29) - 1


def _unpack(data):
    """Split a record's data into (label, bytes of the image)."""
    if len(data) < PREFIX.size:
        raise ValueError("is too short for its labels")
    flag, label, _, _ = PREFIX.unpack_from(data)
    start = PREFIX.size + 4 * flag
    if len(data) < start:
        raise ValueError("is too short for its labels")
    if flag:
        label, = struct.unpack_from("<f", data, PREFIX.size)
    return label, data[start:]


def _read_index(path, size):
    """Read train.idx, for a train.rec of `size` bytes: (keys, offsets), int64 (N,) each, by rising offset."""
    try:
        if path.stat().st_size > size:  # its lines are shorter than any record
            raise ValueError("larger than train.rec")
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # numpy only warns of an empty file, and of fractions
            keys, offsets = np.loadtxt(path, np.int64, comments=None, delimiter="\t", ndmin=2, encoding="ascii").T
    except OSError as error:
        raise InputError(f"can't read {path}: {error.strerror or error}; it belongs beside train.rec.") from None
    except (ValueError, OverflowError, Warning) as error:
        raise InputError(f"{path} is no index, lines `key offset` with a tab ({error}); copy the set anew.") from None
    order = np.argsort(offsets, kind="stable")
    keys, offsets = keys[order], offsets[order]
    if keys.min() < 0 or len(np.unique(keys)) != len(keys) or (np.diff(offsets) == 0).any():
        raise InputError(f"{path} lists a record twice, or one with a negative key; copy the set anew.")
    wrong = (offsets < 0) | (offsets % 4 != 0) | (offsets > size - PART.size - PREFIX.size)
    if wrong.any():
        row = wrong.argmax()
        raise InputError(f"{path}: the offset {offsets[row]} of record {keys[row]} is not where a record of a "
                         f"train.rec of {size} bytes can begin; copy the set anew.")
    return keys, offsets


def _read_classes(path):
    """The number of classes in property, or None where there is no such file."""
    try:
        with open(path, "rb") as file:
            fields = file.read(100).split(b",")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"can't read {path}: {error.strerror}; check its permissions.") from None
    if len(fields) != 3 or not all(field.strip().isdigit() for field in fields):
        raise InputError(f"{path} should be one line such as 10572,112,112: classes, height, width; copy it anew.")
    return int(fields[0])
