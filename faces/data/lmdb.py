"""Read HSFace and VFace, the LMDB sets of Vec2Face, without lmdb, whose C code crashes on damaged files, and msgpack.

The format is that of LMDB 0.9 on 64-bit machines (MDB_meta, MDB_page and MDB_node in OpenLDAP's mdb.c), little-endian.
Pages 0 and 1 are meta pages; the one with the higher transaction number has the root of a tree. A page is its number,
flags, and positions of nodes. A node of a branch has the number of a page; a node of a leaf a key and a value, or the
page at which a long value starts, after 16 bytes. Keys are 0 to N - 1 in decimal, values (image file, label) in
msgpack; keys that begin with __ are not read (utils/imagelist2lmdb.py in HaiyuWu/SOTA-Face-Recognition-Train-and-Test).
"""
import contextlib
import struct

import numpy as np

from faces.data.recordio import Records
from faces.files import progress_bar, reading
from faces.images import MAX_BYTES, UnreadableImage

DATA = "data.mdb"                                    # name of the file if the LMDB is a folder
META = struct.Struct("<16xII16xI84xQ8xQ")            # magic, version, page size, root, transaction
PAGE, NODE = struct.Struct("<Q2xHH2x"), struct.Struct("<HHHH")
BRANCH, LONG_VALUE = 1, 1                            # flags of a page, and of a node in a leaf
NUMBERS = {0xc4: ">B", 0xc5: ">H", 0xc6: ">I", 0xcc: ">B", 0xcd: ">H", 0xce: ">I", 0xcf: ">Q"}    # of msgpack


class Lmdb(Records):
    """The images of an LMDB, a file or a folder with data.mdb, in the order of their keys; otherwise as Records."""

    def __init__(self, root):
        self.root, self.path, self.notes = root, root / DATA if root.is_dir() else root, ()
        with reading(self.path, "Vec2Face LMDB", "copy the set again"):
            self._open_file()
            values = np.fromiter(self._walk(), np.dtype((np.int64, 3)))
            values = values[values[:, 0].argsort()]
            self.keys, self.offsets, _ = values.T
            rows = progress_bar(values, f"reading labels in {self.path.name}", delay=2, leave=False)
            self.labels = np.fromiter((self._label(*row.tolist()) for row in rows), np.int64)

    def open(self, name: str) -> bytes:
        """Return the bytes of the image `name`, in any thread; raise UnreadableImage if they can't be read."""
        try:
            offset = int(name.partition("@")[2])
            length, start = _number(self._read(offset, PAGE.size), 1)
            return self._read(offset + start, length)
        except (OSError, ValueError) as error:
            raise UnreadableImage(f"value {error}") from None

    def _label(self, key, offset, size):
        """Return the label in a value, with which it must end."""
        value = self._read(offset, size) if size <= MAX_BYTES else b""
        with contextlib.suppress(IndexError, KeyError, struct.error):
            length, start = _number(value, 1)
            label, end = _number(value, start + length)
            if value[0] == 0x92 and end == size:    # an array of two, and nothing else
                return label
        raise ValueError(f"the value of key {key} is not (image, label) in msgpack")

    def _walk(self):
        """Yield (key, byte offset of the value, its size) of all images, in the order of the tree."""
        magic, version, page_size, *first = META.unpack(self._read(0, META.size))
        if (magic, version) != (0xBEEFC0DE, 1) or page_size > 1 << 15:
            raise ValueError("it does not begin with a meta page")
        second = META.unpack(self._read(page_size, META.size))[3:]
        pages, seen = [max(first, second, key=lambda meta: meta[1])[0]], set()
        while pages:
            number = pages.pop()
            page = self._read(number * page_size, page_size)
            own_number, flags, end = PAGE.unpack_from(page)
            if own_number != number or number in seen:
                raise ValueError(f"page {number} is damaged")
            seen.add(number)
            for position in struct.unpack_from(f"<{(end - PAGE.size) // 2}H", page, PAGE.size):
                low, high, kind, key_size = NODE.unpack_from(page, position)
                start = position + NODE.size + key_size
                if flags & BRANCH:
                    pages.append(low | high << 16 | kind << 32)
                elif not (key := page[start - key_size:start]).startswith(b"__"):
                    offset = number * page_size + start
                    if kind & LONG_VALUE:
                        offset = struct.unpack_from("<Q", page, start)[0] * page_size + PAGE.size
                    yield int(key), offset, low | high << 16


def _number(data, position):
    """Return the length or integer at a position of msgpack data, not negative, and the position after it."""
    if data[position] < 0x80:
        return data[position], position + 1
    form = NUMBERS[data[position]]
    return struct.unpack_from(form, data, position + 1)[0], position + 1 + struct.calcsize(form)
