"""Read image files as uint8 RGB (H, W, 3), or raise UnreadableImage with the reason.

All code of the project reads images with this module, so detection, training and evaluation see the same pixels. Photos
are rotated according to their EXIF orientation.
"""
import contextlib
import io
import os
import warnings
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".pgm", ".ppm", ".webp", ".tif", ".tiff", ".gif"})
MAX_PIXELS = 128_000_000   # 384 MB decoded; checked in the header, before memory is allocated
MAX_BYTES = 512_000_000
# OpenCV stays silent, because our own messages name the file. 4.13 moved the function that 4.12 had.
(cv2.setLogLevel if hasattr(cv2, "setLogLevel") else cv2.utils.logging.setLogLevel)(0)


class UnreadableImage(Exception):
    """The file can't be used as an image. The message is the reason, without the file's name."""


def read_image(source):
    """Read one image.

    Args:
        source: path of a file, or the file's bytes.

    Returns:
        uint8 (H, W, 3), RGB. Gray images are repeated, transparency is dropped, and 16 bits are reduced to 8.

    Raises:
        UnreadableImage: the file is missing, empty, truncated, over MAX_PIXELS, or not an image.
    """
    data = source if isinstance(source, bytes) else _read_bytes(source)
    _check_header(data)
    _check_complete(data)
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)  # applies the EXIF orientation
    return _decode_with_pillow(data) if image is None else image  # a format that OpenCV can't decode


@contextlib.contextmanager
def one_opencv_thread():
    """Context in which OpenCV uses only the calling thread."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(threads)


def list_images(root):
    """Return the relative paths of all images in `root` and its subfolders, sorted, with forward slashes."""
    root = Path(root)
    return sorted(p.relative_to(root).as_posix() for p in root.rglob("*")
                  if p.suffix.lower() in EXTENSIONS and p.is_file() and not p.name.startswith("."))


def _read_bytes(path):
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_BYTES:
                raise UnreadableImage(f"over {MAX_BYTES // 10**6} MB")
            return file.read(size)
    except OSError as error:
        raise UnreadableImage(error.strerror or str(error)) from None


def _check_header(data):
    if not data:
        raise UnreadableImage("empty file")
    width, height = _jpeg_size(data) or _size_by_pillow(data)
    if width * height > MAX_PIXELS:
        raise UnreadableImage(f"{width} x {height} is over {MAX_PIXELS // 10**6} megapixels")


def _jpeg_size(data):
    """Return (width, height) of a JPEG with an ordinary header, else None; Pillow takes ten times as long."""
    place = 2 if data[:2] == b"\xff\xd8" else len(data)
    while place + 9 <= len(data) and data[place] == 0xff:
        marker, length = data[place + 1], int.from_bytes(data[place + 2:place + 4], "big")
        if marker in (0xc0, 0xc1, 0xc2):  # start of frame: baseline, extended, progressive
            return int.from_bytes(data[place + 7:place + 9], "big"), int.from_bytes(data[place + 5:place + 7], "big")
        if marker not in (0xc4, 0xdb, 0xdd, 0xfe, *range(0xe0, 0xf0)) or length < 2:  # tables, comments, apps
            return None
        place += 2 + length
    return None


def _size_by_pillow(data):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about sizes that read_image() refuses
            with Image.open(io.BytesIO(data)) as image:
                return image.size
    except Image.DecompressionBombError:
        raise UnreadableImage(f"over {MAX_PIXELS // 10**6} megapixels") from None
    except Exception as error:  # Pillow's plugins raise any exception on hostile bytes
        raise UnreadableImage("not an image") from error


def _check_complete(data):
    # OpenCV silently fills the missing part of a truncated JPEG with gray. In a complete file, the end marker follows
    # the last start of scan; neither of these two-byte values can occur inside the compressed data. Almost all files
    # end with the end marker, so it is checked first.
    if data[:2] == b"\xff\xd8" and data[-2:] != b"\xff\xd9" and data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda"):
        raise UnreadableImage("truncated JPEG")


def _decode_with_pillow(data):
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except Exception as error:
        raise UnreadableImage(f"can't be decoded ({error})") from error
