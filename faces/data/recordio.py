"""Read InsightFace's training sets without mxnet: a folder of train.rec and train.idx, with 112x112 faces.

train.rec is dmlc's RecordIO, little-endian: a record is the magic number (uint32), kind << 29 | length (uint32),
`length` bytes of data, and zeros up to a multiple of 4. Where the data contain the magic number at a multiple of 4, it
is omitted and they continue in another part: kinds 1, 2 and 3 are the first, a middle and the last part, kind 0 is
whole. The data are flag (uint32), label (float32), id and id2 (uint64), `flag` float32 labels that replace `label`, and
the image file.

train.idx has a line `key<TAB>offset` per record. If the record with key 0 has two labels, (first, end), and no image,
only keys 1 to first - 1 are images; the others repeat the labels by identity and are not read.

DCFace's files are file.rec, file.idx and list.txt. The labels in file.rec are all 0; list.txt has a line `key
identity/name.jpg`, with a tab, per record (src/visualizations/record.py in mk-minchul/dcface).
"""
import contextlib
import os
import struct
import threading
from pathlib import Path

import numpy as np

from faces.files import InputError, count_of, progress_bar, reading
from faces.images import MAX_BYTES, UnreadableImage
from faces.landmarks import read_lines

MAGIC = 0xCED7230A
WHOLE, FIRST, MIDDLE, LAST = range(4)
PART = struct.Struct("<II")                                              # magic, kind << 29 | length
PREFIX = struct.Struct("<IfQQ")                                          # flag, label, id, id2
HEADER = struct.Struct("<IIIfQQf")                                       # both, and the first label if flag > 0
MAX_LENGTH = (1 << 29) - 1
RECORDS = "train.rec", "file.rec"                                        # InsightFace's name, and DCFace's
LISTS = ".txt", ".lst", ".tsv", ".list"                                  # what may be a list beside the records
ADVICE = "copy the set again; its .rec and .idx must be of one set"


class Records:
    """The images of a RecordIO folder, `root`, in the order of its file, `path`: their `keys` and the byte `offsets` of
    their records, int64 (N,), from train.idx, and `labels`, int64 (N,), from the records, or from a list beside them,
    which `notes` then says. Raises InputError."""

    def __init__(self, root):
        self.root, self.notes = Path(root), ()
        self.path = next(filter(Path.is_file, map(self.root.joinpath, RECORDS)), self.root / RECORDS[0])
        with reading(self.path.with_suffix(".idx"), "RecordIO index", ADVICE):
            keys, offsets = _read_index(self.path.with_suffix(".idx"))
        with reading(self.path, "RecordIO file", ADVICE):
            self._open_file()
            self.keys, self.offsets = self._select_images(keys, offsets)
            self.labels = self._read_labels()
        self._prefer_list()

    def __str__(self) -> str:
        return str(self.root)

    def names(self) -> list[str]:
        """Return the names of the images, `key@offset`; the offset distinguishes sets that have the same keys."""
        return [f"{key}@{offset}" for key, offset in zip(self.keys.tolist(), self.offsets.tolist())]

    def versions(self, names: list[str]) -> np.ndarray:
        """Return int64 (N, 2), which changes when the file changes: its size and modification time."""
        return np.tile(np.array([(self.size, self.modified)], np.int64), (len(names), 1))

    def open(self, name: str) -> bytes:
        """Return the bytes of the image `name`, in any thread; raise UnreadableImage if the record is damaged."""
        try:
            return _unpack(self._record(int(name.partition("@")[2])))[1]
        except (OSError, ValueError, struct.error) as error:
            raise UnreadableImage(f"record {error}") from None

    def _open_file(self):
        self.file, self.lock = open(self.path, "rb", buffering=0), threading.Lock()
        status = os.fstat(self.file.fileno())
        self.size, self.modified = status.st_size, status.st_mtime_ns

    def _record(self, offset):
        """Return the data of the record at a byte offset, with its parts joined; raise ValueError if it is damaged."""
        data, kinds = bytearray(), (WHOLE, FIRST)
        while True:
            magic, word = PART.unpack(self._read(offset, PART.size))
            kind, length = word >> 29, word & MAX_LENGTH
            if magic != MAGIC or kind not in kinds:
                raise ValueError("has an invalid header")
            if len(data) + length > MAX_BYTES:
                raise ValueError(f"is over {MAX_BYTES // 10**6} MB")
            data += self._read(offset + PART.size, length)
            if kind in (WHOLE, LAST):
                return bytes(data)
            data += struct.pack("<I", MAGIC)
            offset, kinds = offset + PART.size + length, (MIDDLE, LAST)

    def _read(self, offset, length):
        if offset + length > self.size:    # before that much memory is allocated
            raise ValueError("extends past the end of the file")
        if hasattr(os, "pread"):
            return os.pread(self.file.fileno(), length, offset)
        with self.lock:    # Windows has no pread()
            self.file.seek(offset)
            return self.file.read(length)

    def _select_images(self, keys, offsets):
        """Return the keys and offsets of the records that are images."""
        contents = self._record(int(offsets[keys == 0][0])) if (keys == 0).any() else b""
        if len(contents) != PREFIX.size + 8 or PREFIX.unpack_from(contents)[0] != 2:
            return keys, offsets
        first, _ = struct.unpack_from("<ff", contents, PREFIX.size)
        images = (keys > 0) & (keys < first)
        if not images.any() or images.sum() != first - 1:
            raise ValueError(f"record 0 says that keys 1 to {first - 1:g} are images, but train.idx lists "
                             f"{images.sum()} of these")
        return keys[images], offsets[images]

    def _read_labels(self):
        labels = np.empty(len(self.keys), np.float32)
        bar = progress_bar(self.offsets.tolist(), f"reading labels in {self.path.name}", delay=2, leave=False)
        for row, offset in enumerate(bar):
            header = self._read(offset, min(HEADER.size, max(0, self.size - offset)))    # the last may be shorter
            magic, word, flag, label, _, _, first_label = HEADER.unpack(header.ljust(HEADER.size, b"\0"))
            if magic != MAGIC or word >> 29 > FIRST:
                raise ValueError(f"record {self.keys[row]} has an invalid header")
            if offset + PART.size + (word & MAX_LENGTH) > self.size:
                raise ValueError(f"record {self.keys[row]} extends past the end of the file")
            # One image in millions contains the magic number by chance, so that the label may be in another part.
            labels[row] = _unpack(self._record(offset))[0] if word >> 29 == FIRST else first_label if flag else label
        bad = ~((labels >= 0) & (labels == np.floor(labels)) & (labels < 2**24))    # all whole numbers of float32
        if bad.any():
            raise ValueError(f"record {self.keys[bad.argmax()]} has a label that is not a whole number below 2**24")
        return labels.astype(np.int64)

    def _prefer_list(self):
        """Take the labels from a list beside the records, if one has all images and divides them differently."""
        people, keys = len(np.unique(self.labels)), self.keys.tolist()
        for file in sorted(file for file in self.root.iterdir() if file.suffix.lower() in LISTS):
            listed = _read_list(file)
            if listed and listed.keys() >= set(keys):
                labels = np.array([listed[key] for key in keys])
                groups, both = len(np.unique(labels)), len(np.unique(labels << 24 | self.labels))
                if groups > 1 and not people == groups == both:
                    self.notes = (f"labels are from {file}; the records name {count_of(people, 'person')}",)
                    self.labels = labels
                    return
            elif listed and people == 1:
                raise InputError(f"{file} does not list all images of {self.path}; copy the set again.")


def _unpack(data):
    """Split a record's data into (label, bytes of the image)."""
    flag, label, _, _ = PREFIX.unpack_from(data)
    start = PREFIX.size + 4 * flag
    if len(data) < start:
        raise ValueError("is too short for its labels")
    if flag:
        label, = struct.unpack_from("<f", data, PREFIX.size)
    return label, data[start:]


def _read_index(file):
    """Return the keys and offsets in train.idx, int64 (N,) each, sorted by offset."""
    numbers = np.fromiter((number for _, line in read_lines(file) for number in map(int, line.split())), np.int64)
    keys, offsets = numbers.reshape(-1, 2)[np.argsort(numbers[1::2], kind="stable")].T
    if numbers.min() < 0 or len(np.unique(keys)) != len(keys) or (np.diff(offsets) == 0).any():
        raise ValueError("it lists a record twice or has negative numbers")
    return keys, offsets


def _read_list(file):
    """Return {key: identity from 0} of a text file with lines `key<TAB>identity/name.jpg`; empty if it is none."""
    labels, identities = {}, {}
    with contextlib.suppress(OSError, ValueError, IndexError):
        for _, line in read_lines(file):
            key, path = line.split("\t")
            labels[int(key)] = identities.setdefault(path.rsplit("/", 1)[-2], len(identities))
        return labels
    return {}
