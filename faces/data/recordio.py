"""Read InsightFace's training sets without mxnet: a folder of train.rec, train.idx and property, with 112x112 faces.

train.rec is in dmlc's RecordIO format, with little-endian numbers. A record consists of the magic number (uint32), kind
<< 29 | length (uint32), `length` bytes of data, and zeros up to a multiple of 4. If the data contain the magic number
at a multiple of 4, those four bytes are omitted and the data continue in another part: kinds 1, 2 and 3 are the first,
a middle and the last part; kind 0 is a record in one part.

The data consist of flag (uint32), label (float32), id and id2 (uint64), `flag` float32 labels that replace `label`, and
the image file. train.idx has a tab-separated line `key offset` per record. If the record of key 0 has two labels,
(first, end),
and no image, it is a table of contents: images have the keys 1 to first - 1, and keys from `first` to end - 1 are
    records
about identities, which repeat the labels of the images and are not read. Otherwise every key is an image. property is
one line, `classes,height,width`, and is optional.
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
                   ("first", "<f4")])                                    # everything before the label is known
CHUNK = 65536                                                            # headers that are read at a time


class Records:
    """The images of a RecordIO folder, in the order of the file.

    All headers, labels and lengths are checked when the object is created.

    Attributes:
        path: train.rec.
        keys, offsets: int64 (N,), of the images in train.idx.
        labels: int64 (N,), from 0 to below the number of classes in property.

    Raises:
        InputError: a file is missing, damaged or malicious.
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
        """Return names for the images, `key@offset`; the offsets distinguish two sets with the same keys."""
        return [f"{key}@{offset}" for key, offset in zip(self.keys.tolist(), self.offsets.tolist())]

    def open(self, name):
        """Return the bytes of the image `name`; several threads may call this at once.

        Raises:
            UnreadableImage: the disk failed, or the file has changed since it was checked.
        """
        try:
            return _unpack(self._record(int(name.partition("@")[2])))[1]
        except (OSError, ValueError) as error:
            raise UnreadableImage(f"record {error}") from None

    def _record(self, offset):
        """Return the data of the record at a byte offset, with its parts joined; raise ValueError if it is damaged."""
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
        """Return the keys and offsets of the records that are images."""
        try:
            contents = self._record(int(offsets[keys == 0][0])) if (keys == 0).any() else b""
        except ValueError as error:
            raise InputError(self._complaint(0, error)) from None
        if len(contents) != PREFIX.size + 8 or PREFIX.unpack_from(contents)[0] != 2:
            return keys, offsets
        first, end = struct.unpack_from("<ff", contents, PREFIX.size)
        images = (keys > 0) & (keys < first)
        if not 1 < first <= end < np.inf or images.sum() != first - 1:
            raise InputError(self._complaint(0, f"says that the images have the keys 1 to {first - 1:g}, but "
                                                f"train.idx lists {images.sum()} of these"))
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
            raise InputError(self._complaint(self.keys[row], f"has the label {labels[row]}, but property gives "
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
        for row in np.flatnonzero(kind == FIRST):  # one image in millions contains the magic number by chance
            try:
                labels[row] = _unpack(self._record(int(offsets[row])))[0]
            except ValueError as error:
                raise InputError(self._complaint(keys[row], error)) from None
        # From 2**24 on, float32 can't distinguish whole numbers from rounded ones.
        self._refuse(keys, ~((labels >= 0) & (labels == np.floor(labels)) & (labels < 2**24)),
                     "has a label that is no whole number from 0 to 16,777,215")
        return labels.astype(np.int64)

    def _refuse(self, keys, bad, what):
        if bad.any():
            raise InputError(self._complaint(keys[bad.argmax()], what))

    def _complaint(self, key, what):
        return (f"{self.path}: record {key} {what}; the file is damaged, or train.idx or property belongs to another "
                "set; copy the set again.")


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
    """Return the keys and offsets in train.idx, int64 (N,) each, by increasing offset; train.rec has `size` bytes."""
    try:
        if path.stat().st_size > size:  # a line is shorter than any record
            raise ValueError("larger than train.rec")
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # numpy only warns about an empty file and about fractions
            keys, offsets = np.loadtxt(path, np.int64, comments=None, delimiter="\t", ndmin=2, encoding="ascii").T
    except OSError as error:
        raise InputError(f"can't read {path}: {error.strerror or error}; it must be beside train.rec.") from None
    except (ValueError, OverflowError, Warning) as error:
        raise InputError(f"{path} is not an index of tab-separated lines `key offset` ({error}); copy the set "
                         "again.") from None
    order = np.argsort(offsets, kind="stable")
    keys, offsets = keys[order], offsets[order]
    if keys.min() < 0 or len(np.unique(keys)) != len(keys) or (np.diff(offsets) == 0).any():
        raise InputError(f"{path} lists a record twice, or has a negative key; copy the set again.")
    wrong = (offsets < 0) | (offsets % 4 != 0) | (offsets > size - PART.size - PREFIX.size)
    if wrong.any():
        row = wrong.argmax()
        raise InputError(f"{path}: the offset {offsets[row]} of record {keys[row]} is not where a record of a "
                         f"train.rec of {size} bytes can start; copy the set again.")
    return keys, offsets


def _read_classes(path):
    """Return the number of classes in property, or None if there is no such file."""
    try:
        with open(path, "rb") as file:
            fields = file.read(100).split(b",")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"can't read {path}: {error.strerror}; check its permissions.") from None
    if len(fields) != 3 or not all(field.strip().isdigit() for field in fields):
        raise InputError(f"{path} must be one line such as 10572,112,112 (classes, height, width); copy it again.")
    return int(fields[0])
