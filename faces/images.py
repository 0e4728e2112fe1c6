"""Read image files as uint8 RGB (H, W, 3), or raise UnreadableImage with the reason.

The whole project reads images through this module, so detection, training and evaluation see the same pixels. Photos
are rotated according to their EXIF orientation. A file that is damaged as far as its format tells is not an image.
"""
import contextlib
import functools
import io
import os
import warnings
import zlib
from collections import Counter
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageOps

from faces import jpeg
from faces.files import read_bytes
from faces.text import count_of, printable

EXTENSIONS = frozenset(""".jpg .jpeg .jpe .jfif .png .bmp .pbm .pgm .ppm .pnm .webp .tif .tiff .gif .avif
    .jp2""".split())
# Files that belong to the system or another program, and files beside photos that can't be photos.
SYSTEM = frozenset("thumbs.db ehthumbs.db desktop.ini __macosx @eadir #recycle $recycle.bin lost+found".split())
NO_PHOTOS = frozenset(""".txt .csv .tsv .json .jsonl .xml .md .html .htm .yaml .yml .log .pdf .py .ipynb .sh .npy .npz
    .mat .pts .pkl .pickle .h5 .hdf5 .db .lst .list .idx .rec .bin .zip .tar .gz .tgz .7z .rar .url .lnk""".split())
LISTS = frozenset("casia_landmark.txt lfw_landmark.txt pairs.txt pairsDevTrain.txt pairsDevTest.txt".split())
FORMATS = "JPEG", "MPO", "PNG", "BMP", "DIB", "PPM", "WEBP", "TIFF", "GIF", "AVIF", "JPEG2000"     # Pillow's names
# The header is checked against these before memory is allocated.
MAX_PIXELS = 128_000_000
MAX_BYTES = 384_000_000      # an uncompressed file of that many pixels
MAX_MEMORY = 1_000_000_000   # for the file, the image, and whatever else the decoder needs
MAX_SCAN_PIXELS = 850_000_000    # in all scans of a progressive JPEG, which usually has ten scans
# Bytes per pixel: 3 for the image, 3 for a rotated copy, and the decoder's own.
LEAN, JPEG_WITH_SCANS, GREEDY = 6, 12, 17
# OpenCV's warnings are turned off, because our own messages name the file. OpenCV 4.13 moved the function.
(cv2.setLogLevel if hasattr(cv2, "setLogLevel") else cv2.utils.logging.setLogLevel)(0)


class UnreadableImage(Exception):
    """The file can't be used as an image. The message is the reason, without the file's name."""


class Scan(NamedTuple):
    """What was found below a folder.

    paths: relative paths of all images, sorted, with forward slashes.
    ignored: Counter of what is left out because it is no photo, by its kind, see count_of().
    lost: Counter of what is left out although it may be a photo.
    """
    paths: list
    ignored: Counter
    lost: Counter

    def left_out(self):
        """Return the counts in words, such as "2 .heic files, 1 broken link", or an empty string."""
        return ", ".join(count_of(number, kind) for kind, number in (*self.lost.items(), *self.ignored.items()))


def read_image(source):
    """Read one image.

    Args:
        source: path of a file, or the file's bytes.

    Returns:
        uint8 (H, W, 3), RGB. Gray is repeated in all channels, transparency is dropped, and 16 bits are reduced to 8.

    Raises:
        UnreadableImage: the file is missing, empty, damaged, not a regular file, not an image, or would need more than
            MAX_MEMORY.
    """
    data = source if isinstance(source, bytes) else _read_bytes(source)
    if not data:
        raise UnreadableImage("empty file")
    try:
        header = jpeg.read_header(data)
        if header:
            return _decode_jpeg(data, *header)
        with jpeg.watched_stderr():    # decoders print messages about damaged files
            return _decode_other(data)
    except cv2.error:            # for instance, more than 2**20 columns or rows
        raise UnreadableImage("can't be decoded by OpenCV") from None
    except MemoryError:
        raise UnreadableImage("out of memory") from None


def summarize(failures, count=3):
    """Return the most frequent reasons in words, with one image of each.

    Args:
        failures: list of (name, reason).
        count: maximum number of reasons.
    """
    names, reasons = {}, Counter()
    for name, reason in failures:
        names.setdefault(reason, name)
        reasons[reason] += 1
    shown = [f"{names[reason]}: {reason}" + (f" (and {number - 1:,} like it)" if number > 1 else "")
             for reason, number in reasons.most_common(count)]
    return "; ".join(shown) + ("; ..." if len(reasons) > count else "")


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
    """Return the relative paths of all images below `root`, sorted, with forward slashes; see scan_images()."""
    return scan_images(root).paths


def scan_images(root):
    """Return the Scan of a folder.

    Links to folders are followed, but no folder is read twice. Hidden files and folders are left out.
    """
    scan, seen = Scan([], Counter(), Counter()), set()
    folders, links = [""], []
    while folders or links:
        name = folders.pop() if folders else links.pop(0)
        path = os.path.join(root, name)
        try:
            status = os.stat(path)
            repeated = (status.st_dev, status.st_ino) in seen
            entries = [] if repeated else sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError:
            scan.lost["folder~ that can't be read"] += 1
            continue
        if repeated:
            scan.ignored["link~ to a folder that is read anyway"] += 1
        seen.add((status.st_dev, status.st_ino))
        for entry in entries:
            relative = f"{name}/{entry.name}" if name else entry.name
            if is_system_name(entry.name):
                scan.ignored["hidden or system file~"] += 1
            elif _is(entry.is_dir):
                (links if entry.is_symlink() else folders).append(relative)
            elif _is(entry.is_file):
                sort_in(relative, scan)
            else:
                scan.lost["broken link~" if entry.is_symlink() else "special file~ such as a pipe"] += 1
    scan.paths.sort()
    return scan


def is_system_name(name):
    """Return whether a file or folder is hidden, or belongs to the system and not to the data."""
    return name.startswith(".") or name.lower() in SYSTEM


def sort_in(path, scan):
    """Add the path of a file to the part of a Scan where its extension belongs."""
    extension = os.path.splitext(path)[1].lower()
    if extension in EXTENSIONS:
        scan.paths.append(path)
    elif path not in LISTS:
        kind = f"{printable(extension)} file~" if extension else "file~ without extension"
        (scan.ignored if extension in NO_PHOTOS else scan.lost)[kind] += 1


def _is(test):
    try:
        return test()
    except OSError:    # for example, a link to itself
        return False


def _read_bytes(path):
    try:
        return read_bytes(path, MAX_BYTES)
    except OSError as error:
        raise UnreadableImage(error.strerror or str(error)) from None
    except ValueError:           # a NUL character in the name
        raise UnreadableImage("not a file name") from None


def _decode_jpeg(data, width, height, progressive, scans, whole):
    # If a file has several scans, the decoder keeps all coefficients, of two bytes each.
    _check_size(data, width, height, JPEG_WITH_SCANS if progressive or scans > 1 else LEAN)
    if scans * width * height > MAX_SCAN_PIXELS:    # each scan of a few bytes can take a pass over the whole image
        raise UnreadableImage(f"{width} x {height} in {scans} scans takes too long to decode")
    if not whole:
        raise UnreadableImage("truncated JPEG")
    image, corruption = jpeg.decode(data)
    if corruption or image is None:
        raise UnreadableImage(corruption or "damaged JPEG")
    return image


def _decode_other(data):
    format, width, height = _header_from_pillow(data)
    if format in ("JPEG", "MPO"):    # with an unusual header
        whole = data.rfind(b"\xff\xd9") > data.rfind(b"\xff\xda")
        return _decode_jpeg(data, width, height, True, data.count(b"\xff\xda"), whole)
    _check_size(data, width, height, LEAN if format in ("PNG", "BMP", "PPM", "WEBP") else GREEDY)
    if format == "PNG":
        _check_png(data)
    if format == "TIFF":             # OpenCV decodes damaged ones without a word
        _decode_with_pillow(data)
    if format == "AVIF":             # OpenCV ignores its orientation
        return _decode_with_pillow(data)
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)    # applies the EXIF orientation
    if image is not None:
        ignores_orientation = format == "WEBP" and cv2.__version__ < "5"
        return _decode_with_pillow(data) if ignores_orientation else image
    if format in ("GIF", "WEBP") and _opencv_reads(format):    # Pillow would decode damaged ones
        raise UnreadableImage(f"damaged {format}")
    _check_size(data, width, height, GREEDY)
    return _decode_with_pillow(data)    # a format that OpenCV can't decode


def _check_size(data, width, height, bytes_per_pixel):
    if not width * height:
        raise UnreadableImage("no pixels")
    if width * height > MAX_PIXELS:
        raise UnreadableImage(f"{width} x {height} is over {MAX_PIXELS // 10**6} megapixels")
    if len(data) + bytes_per_pixel * width * height > MAX_MEMORY:
        raise UnreadableImage(f"{width} x {height} needs over {MAX_MEMORY // 10**9} GB to decode in this format")


@functools.cache
def _opencv_reads(format):
    """Return whether this build of OpenCV reads a format."""
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, format)
    return cv2.imdecode(np.frombuffer(file.getvalue(), np.uint8), cv2.IMREAD_COLOR_RGB) is not None


@functools.cache
def _formats():
    Image.init()
    return [format for format in FORMATS if format in Image.OPEN]


def _header_from_pillow(data):
    """Return (format, width, height)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about sizes that are refused here anyway
            with Image.open(io.BytesIO(data), formats=_formats()) as image:
                return image.format, *image.size
    except Image.DecompressionBombError:
        raise UnreadableImage(f"over {MAX_PIXELS // 10**6} megapixels") from None
    except Exception as error:  # Pillow's plugins can raise any exception on malformed data
        raise UnreadableImage("not an image") from error


def _check_png(data):
    """Check the lengths and the checksums of all chunks; decoders ignore some of them or allocate what they claim."""
    position, kind = 8, None
    while kind != b"IEND":
        length, kind = int.from_bytes(data[position:position + 4], "big"), data[position + 4:position + 8]
        end = position + 8 + length
        if end + 4 > len(data):
            raise UnreadableImage("truncated PNG")
        optional = kind[0] & 32
        if not optional and zlib.crc32(memoryview(data)[position + 4:end]) != int.from_bytes(data[end:end + 4], "big"):
            raise UnreadableImage("damaged PNG")
        position = end + 4


def _decode_with_pillow(data):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=_formats()) as image:
                return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except Exception as error:
        raise UnreadableImage(f"can't be decoded ({error})") from error
