"""Read InsightFace's training sets without mxnet: a folder of train.rec, train.idx and property, with 112x112 faces.

train.rec is in dmlc's RecordIO format, with little-endian numbers. A record consists of the magic number (uint32),
kind << 29 | length (uint32), `length` bytes of data, and zeros up to a multiple of 4. If the data contain the magic
number at a multiple of 4, those four bytes are omitted and the data continue in another part: kinds 1, 2 and 3 are the
first, a middle and the last part; kind 0 is a record in one part.

The data consist of flag (uint32), label (float32), id and id2 (uint64), `flag` float32 labels that replace `label`, and
the image file.

train.idx has one tab-separated line `key offset` per record. If the record with key 0 has two labels, (first, end), and
no image, it is a table of contents: keys 1 to first - 1 are images, and keys `first` to end - 1 are records about
identities, which repeat the labels of the images and are not read. Otherwise every key is an image.

property is an optional file of one line, `classes,height,width`.
"""
import itertools
import os
import struct
import threading
import warnings
import weakref
from pathlib import Path

import numpy as np
from tqdm import tqdm

from faces.files import InputError
from faces.images import MAX_BYTES, UnreadableImage
from faces.landmarks import read_lines

MAGIC = 0xCED7230A
WHOLE, FIRST, MIDDLE, LAST = range(4)
PART = struct.Struct("<II")                                              # magic, kind << 29 | length
PREFIX = struct.Struct("<IfQQ")                                          # flag, label, id, id2
HEADER = np.dtype([("magic", "<u4"), ("word", "<u4"), ("flag", "<u4"), ("label", "<f4"), ("id", "<u8", 2),
                   ("first_label", "<f4")])                              # PART, PREFIX, and the first label if flag > 0
MAX_PARTS = 1000                                                         # of a record; a second one is rare
CHUNK = 65536                                                            # headers to read and check at a time


class Records:
    """The images of a RecordIO folder, in the order of the file.

    All headers, labels and lengths are checked when the object is created.

    Attributes:
        path: path of train.rec.
        keys, offsets: int64 (N,), keys of the images and byte offsets of their records, from train.idx.
        labels: int64 (N,), not negative; no more different ones than the classes that property gives.

    Raises:
        InputError: a file is missing, damaged or malicious.
    """

    def __init__(self, root):
        self.root, self.path = Path(root), Path(root) / "train.rec"
        try:
            self.file, self.lock = open(self.path, "rb", buffering=0), threading.Lock()
            weakref.finalize(self, self.file.close)
            status = os.fstat(self.file.fileno())
            self.size, self.modified = status.st_size, status.st_mtime_ns
            self.keys, self.offsets = self._select_images(*_read_index(self.root / "train.idx", self.size))
            self.labels = self._read_labels(_read_classes(self.root / "property"))
        except OSError as error:
            raise InputError(f"can't read {self.path}: {error.strerror}; check its permissions and the disk.") from None

    def __str__(self):
        return str(self.root)

    def names(self):
        """Return the names of the images, `key@offset`; the offset distinguishes sets that have the same keys."""
        return [f"{key}@{offset}" for key, offset in zip(self.keys.tolist(), self.offsets.tolist())]

    def versions(self, names):
        """Return int64 (N, 2), which changes when train.rec changes: its size and modification time."""
        return np.tile(np.array([(self.size, self.modified)], np.int64), (len(names), 1))

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
        for _ in range(MAX_PARTS):
            magic, word = PART.unpack(self._read(offset, PART.size))
            kind, length = _kind_and_length(word)
            if magic != MAGIC or kind not in kinds or kind in (FIRST, MIDDLE) and length % 4:
                raise ValueError("has an invalid header")
            if len(data) + length > MAX_BYTES:
                raise ValueError(f"is over {MAX_BYTES // 10**6} MB")
            data += self._read(offset + PART.size, length)
            if kind in (WHOLE, LAST):
                return bytes(data)
            data += struct.pack("<I", MAGIC)
            offset, kinds = offset + PART.size + length, (MIDDLE, LAST)
        raise ValueError(f"has over {MAX_PARTS:,} parts")

    def _read(self, offset, length):
        if offset + length > self.size:
            raise ValueError("extends past the end of the file")
        data = self._read_at(offset, length)
        if len(data) != length:
            raise ValueError("can't be read completely")
        return data

    def _read_at(self, offset, length):
        if hasattr(os, "pread"):
            return os.pread(self.file.fileno(), length, offset)
        with self.lock:    # Windows has no pread()
            self.file.seek(offset)
            return self.file.read(length)

    def _select_images(self, keys, offsets):
        """Return the keys and offsets of the records that are images."""
        try:
            contents = self._record(int(offsets[keys == 0][0])) if (keys == 0).any() else b""
        except ValueError as error:
            raise InputError(self._damage_message(0, error)) from None
        if len(contents) != PREFIX.size + 8 or PREFIX.unpack_from(contents)[0] != 2:
            return keys, offsets
        first, end = struct.unpack_from("<ff", contents, PREFIX.size)
        images = (keys > 0) & (keys < first)
        if not 1 < first <= end < np.inf or images.sum() != first - 1:
            problem = f"says that keys 1 to {first - 1:g} are images, but train.idx lists {images.sum()} of these"
            raise InputError(self._damage_message(0, problem))
        return keys[images], offsets[images]

    def _read_labels(self, classes):
        labels = np.empty(len(self.keys), np.int64)
        with tqdm(total=len(labels), desc=f"reading labels in {self.path.name}", unit=" images", unit_scale=True,
                  dynamic_ncols=True, delay=2, leave=False) as bar:
            for start in range(0, len(labels), CHUNK):
                chunk = slice(start, start + CHUNK)
                labels[chunk] = self._read_chunk_labels(self.keys[chunk], self.offsets[chunk])
                bar.update(len(labels[chunk]))
        people = len(np.unique(labels))    # a selection of people may have gaps in its labels
        if classes is not None and people > classes:
            raise InputError(f"{self.path} has {people:,} people, but {self.root / 'property'} gives {classes:,} as "
                             "the number of classes; the files belong to different sets, so copy the set again.")
        return labels

    def _read_chunk_labels(self, keys, offsets):
        """Return the labels of up to CHUNK records, int64, after checking their headers."""
        raw = b"".join(self._read_at(offset, HEADER.itemsize).ljust(HEADER.itemsize, b"\0")
                       for offset in offsets.tolist())
        header = np.frombuffer(raw, HEADER)
        kind, length = _kind_and_length(header["word"].astype(np.int64))
        flag = header["flag"].astype(np.int64)
        self._reject(keys, (header["magic"] != MAGIC) | (kind > FIRST), "has an invalid header")
        self._reject(keys, offsets + PART.size + length > self.size, "extends past the end of the file")
        self._reject(keys, length > MAX_BYTES, f"is over {MAX_BYTES // 10**6} MB")
        self._reject(keys, (kind == WHOLE) & (length < PREFIX.size + 4 * flag), "is too short for its labels")
        labels = np.where(flag > 0, header["first_label"], header["label"])
        for row in np.flatnonzero(kind == FIRST):  # one image in millions contains the magic number by chance
            try:
                labels[row] = _unpack(self._record(int(offsets[row])))[0]
            except ValueError as error:
                raise InputError(self._damage_message(keys[row], error)) from None
        # From 2**24 on, float32 can't represent every whole number, so the label may have been rounded.
        self._reject(keys, ~((labels >= 0) & (labels == np.floor(labels)) & (labels < 2**24)),
                     "has a label that is not a whole number from 0 to 16,777,215")
        return labels.astype(np.int64)

    def _reject(self, keys, bad, problem):
        """Raise InputError about the first record for which the mask `bad` is set."""
        if bad.any():
            raise InputError(self._damage_message(keys[bad.argmax()], problem))

    def _damage_message(self, key, problem):
        return (f"{self.path}: record {key} {problem}; the file is damaged, or train.idx or property belongs to "
                "another set; copy the set again.")


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
    """Return the keys and offsets in train.idx, int64 (N,) each, sorted by offset.

    Args:
        path: train.idx.
        size: size of train.rec in bytes.
    """
    try:
        if path.stat().st_size > 2 * size:  # every line is shorter than the record it refers to
            raise ValueError("it is larger than train.rec")
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # numpy only warns about an empty file and about fractions
            lines = (line for _, line in read_lines(path))
            keys, offsets = np.loadtxt(lines, np.int64, comments=None, delimiter="\t", ndmin=2).T
    except OSError as error:
        raise InputError(f"can't read {path}: {error.strerror or error}; it must be next to train.rec.") from None
    except (ValueError, OverflowError, Warning) as error:
        raise InputError(f"{path} is not an index with tab-separated lines `key offset` ({str(error)[:200]}); copy "
                         "the set again.") from None
    order = np.argsort(offsets, kind="stable")
    keys, offsets = keys[order], offsets[order]
    if keys.min() < 0 or len(np.unique(keys)) != len(keys) or (np.diff(offsets) == 0).any():
        raise InputError(f"{path} lists a record twice or contains a negative key; copy the set again.")
    invalid = (offsets < 0) | (offsets % 4 != 0) | (offsets > size - PART.size - PREFIX.size)
    if invalid.any():
        row = invalid.argmax()
        raise InputError(f"{path}: the offset {offsets[row]} of record {keys[row]} is not a multiple of 4 that leaves "
                         f"room for a record in the {size} bytes of train.rec; copy the set again.")
    return keys, offsets


def _read_classes(path):
    """Return the number of classes given by property, or None if the file does not exist."""
    if not path.exists():
        return None
    try:
        fields = [field for _, line in itertools.islice(read_lines(path), 2) for field in line[:200].split(",")]
    except OSError as error:
        raise InputError(f"can't read {path}: {error.strerror}; copy the set again.") from None
    except ValueError:
        fields = []
    if len(fields) != 3 or not all(field.strip().isascii() and field.strip().isdigit() for field in fields):
        raise InputError(f"{path} must be one line such as 10572,112,112 (classes, height, width); copy it again.")
    return int(fields[0])
