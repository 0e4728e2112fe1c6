"""Read image files as uint8 RGB (H, W, 3), or raise UnreadableImage with the reason.

The whole project reads images through this module, so detection, training and evaluation see the same pixels. Photos
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
MAX_PIXELS = 128_000_000   # 384 MB when decoded; the header is checked before memory is allocated
MAX_BYTES = 512_000_000
# OpenCV's warnings are turned off, because our own messages name the file. OpenCV 4.13 moved the function.
(cv2.setLogLevel if hasattr(cv2, "setLogLevel") else cv2.utils.logging.setLogLevel)(0)


class UnreadableImage(Exception):
    """The file can't be used as an image. The message is the reason, without the file's name."""


def read_image(source):
    """Read one image.

    Args:
        source: path of a file, or the file's bytes.

    Returns:
        uint8 (H, W, 3), RGB. Gray is repeated in all channels, transparency is dropped, and 16 bits are reduced to 8.

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
    """Restrict OpenCV to the calling thread inside a `with` block."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(threads)


def list_images(root):
    """Return the relative paths of all images below `root`, sorted, with forward slashes; hidden files are ignored."""
    root = Path(root)
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*")
                  if path.suffix.lower() in EXTENSIONS and path.is_file() and not path.name.startswith("."))


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
    width, height = _jpeg_size(data) or _size_from_pillow(data)
    if width * height > MAX_PIXELS:
        raise UnreadableImage(f"{width} x {height} is over {MAX_PIXELS // 10**6} megapixels")


def _jpeg_size(data):
    """Return (width, height) of a JPEG with an ordinary header, or else None. This is ten times as fast as Pillow."""
    position = 2 if data[:2] == b"\xff\xd8" else len(data)
    while position + 9 <= len(data) and data[position] == 0xff:
        marker, length = data[position + 1], int.from_bytes(data[position + 2:position + 4], "big")
        if marker in (0xc0, 0xc1, 0xc2):  # start of frame: baseline, extended or progressive
            height, width = data[position + 5:position + 7], data[position + 7:position + 9]
            return int.from_bytes(width, "big"), int.from_bytes(height, "big")
        if marker not in (0xc4, 0xdb, 0xdd, 0xfe, *range(0xe0, 0xf0)) or length < 2:  # not metadata or a table
            return None
        position += 2 + length
    return None


def _size_from_pillow(data):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about sizes that are refused here anyway
            with Image.open(io.BytesIO(data)) as image:
                return image.size
    except Image.DecompressionBombError:
        raise UnreadableImage(f"over {MAX_PIXELS // 10**6} megapixels") from None
    except Exception as error:  # Pillow's plugins can raise any exception on malformed data
        raise UnreadableImage("not an image") from error


def _check_complete(data):
    # OpenCV silently fills the missing part of a truncated JPEG with gray, so look for the end marker. In a complete
    # file it follows the last start of scan, and neither of these two-byte values can occur inside the compressed data.
    # Almost every file ends with the end marker, so that is checked first.
    if data[:2] == b"\xff\xd8" and data[-2:] != b"\xff\xd9" and data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda"):
        raise UnreadableImage("truncated JPEG")


def _decode_with_pillow(data):
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except Exception as error:
        raise UnreadableImage(f"can't be decoded ({error})") from error
