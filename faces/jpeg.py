"""Decode JPEG files, and notice when their data are corrupt.

Libjpeg decodes whatever it can of a damaged file, fills the rest with gray or noise, and reports success. It says so
only in a line such as "Corrupt JPEG data: premature end of data segment" on file descriptor 2, and no decoder for
Python passes that on. Therefore the descriptor is redirected to a temporary file while a JPEG is decoded.
"""
import atexit
import contextlib
import os
import re
import sys
import tempfile
import threading

import cv2
import numpy as np

FRAMES = {0xc0: False, 0xc1: False, 0xc2: True}      # start of frame: baseline, extended; and progressive
TABLES = frozenset({0xc4, 0xdb, 0xdd, 0xfe, *range(0xe0, 0xf0)})     # metadata and tables
MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")    # in compressed data, the others are no markers or have no length
MAX_SEGMENTS = 10_000                                # after the start of frame; an ordinary file has a few dozen
CORRUPT = re.compile(r"Corrupt JPEG data.*|Premature end of JPEG.*")
NOISE = re.compile(r"Corrupt JPEG|Premature end of JPEG|Inconsistent progression|Invalid SOS|Warning: unknown JFIF|"
                   r"libpng |tempfile\.tif|TIFF|LZW|MissingRequired")    # decoders' messages; ours name the file


def read_header(data):
    """Return (width, height, progressive, scans, whole) of a JPEG with an ordinary header, or None for any other file.

    The scans are counted after the header, so those of a thumbnail in the metadata don't count. `whole` says whether
    the end marker is there.
    """
    position = 2 if data[:2] == b"\xff\xd8" else len(data)
    while position + 9 <= len(data) and data[position] == 0xff:
        marker, length = data[position + 1], int.from_bytes(data[position + 2:position + 4], "big")
        if marker in FRAMES:
            height, width = (int.from_bytes(data[position + i:position + i + 2], "big") for i in (5, 7))
            return width, height, FRAMES[marker], *_scans(data, position)
        if marker not in TABLES or length < 2:
            return None
        position += 2 + length
    return None


def _scans(data, position):
    """Return the number of scans after the start of frame, and whether there is an end marker.

    Almost every file ends with the end marker, and no start of scan can occur inside the compressed data, so that all
    of them are counted. What comes after the end marker, such as the film of a motion photo, is not part of the image.
    """
    if data[-2:] == b"\xff\xd9":
        return data.count(b"\xff\xda", position), True
    scans = 0
    for _ in range(MAX_SEGMENTS):
        marker = MARKER.search(data, position)
        if marker is None:
            break
        kind, position = data[marker.start() + 1], marker.end()
        if kind == 0xd9:
            return scans, True
        scans += kind == 0xda
        position += int.from_bytes(data[position:position + 2], "big")
    return scans, False


def decode(data):
    """Return (uint8 (H, W, 3), RGB, or None if it can't be decoded; what libjpeg says about corrupt data, or None).

    The EXIF orientation is applied. Several threads may call this at once.
    """
    array = np.frombuffer(data, np.uint8)
    with _watch:
        with _watch.together:
            before = _watch.size()
            image = cv2.imdecode(array, cv2.IMREAD_COLOR_RGB)
            silent = _watch.size() == before
        if silent:
            return image, None
        # Another thread may have caused the message, so this image is decoded again while no other one is.
        with _watch.alone():
            before = _watch.size()
            image = cv2.imdecode(array, cv2.IMREAD_COLOR_RGB)
            found = CORRUPT.search(_watch.read(before))
    return image, found and found[0].strip()


def watched_stderr():
    """Return a context in which file descriptor 2 is redirected to a temporary file; several threads may be in it.

    Python's sys.stderr keeps writing to where it did, if it is looked up inside the block. What others wrote to the
    descriptor follows at the end of the block; the messages of decoders are dropped.
    """
    return _watch


class _Together:
    """A context for the threads that decode at the same time; a class, because it is entered for every image."""

    def __init__(self, watch):
        self.watch, self.threads = watch, 0

    def __enter__(self):
        with self.watch.changed:
            while self.watch.exclusive:
                self.watch.changed.wait()
            self.threads += 1

    def __exit__(self, *_):
        with self.watch.changed:
            self.threads -= 1
            if self.watch.exclusive:
                self.watch.changed.notify_all()


class _Watch:
    def __init__(self):
        self.changed = threading.Condition()
        self.together = _Together(self)
        self.users = 0                       # blocks of watched_stderr()
        self.exclusive = False
        self.log = None                      # None also if the descriptor can't be redirected; then nothing is noticed
        self.file = self.process = None

    def __enter__(self):
        with self.changed:
            self.users += 1
            if self.users > 1:
                return
            try:
                if self.process != os.getpid():      # processes must not share the file
                    self.file, self.process = tempfile.TemporaryFile(), os.getpid()
                    atexit.register(self.file.close)
                self.saved = os.dup(2)
            except OSError:                          # no descriptor 2, or no folder for temporary files
                return
            self.python, self.log = sys.stderr, self.file
            with contextlib.suppress(AttributeError, OSError, ValueError):
                self.python.flush()
                if self.python.fileno() == 2:
                    sys.stderr = open(self.saved, "w", encoding=self.python.encoding, errors=self.python.errors,
                                      buffering=1, closefd=False)
            os.dup2(self.log.fileno(), 2)

    def __exit__(self, *_):
        with self.changed:
            self.users -= 1
            if self.users or self.log is None:
                return
            if sys.stderr is not self.python:
                sys.stderr.flush()
                sys.stderr = self.python
            os.dup2(self.saved, 2)
            others = [line for line in self.read(0).splitlines(True) if not NOISE.match(line)]
            with contextlib.suppress(OSError):
                os.write(2, "".join(others).encode("latin-1"))
            os.close(self.saved)
            self.log.seek(0)
            self.log.truncate()
            self.log = None

    @contextlib.contextmanager
    def alone(self):
        """Wait until no other thread decodes, and keep them from it."""
        with self.changed:
            self.changed.wait_for(lambda: not self.exclusive)
            self.exclusive = True
        try:
            with self.changed:
                self.changed.wait_for(lambda: not self.together.threads)
            yield
        finally:
            with self.changed:
                self.exclusive = False
                self.changed.notify_all()

    def size(self):
        return 0 if self.log is None else os.fstat(self.log.fileno()).st_size

    def read(self, start):
        self.log.seek(start)
        return self.log.read().decode("latin-1")


_watch = _Watch()
