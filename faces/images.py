"""Read images as uint8 RGB (H, W, 3), or raise UnreadableImage with the reason.

The whole project reads images through this module, so detection, training and evaluation see the same pixels. Photos
are rotated according to their EXIF orientation. A file that is damaged as far as its format tells is not an image.
"""
import contextlib
import io
import os
import re
from collections import Counter, deque
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
from PIL import Image, ImageOps

from faces.files import count_of, path, read_bytes

EXTENSIONS = frozenset(""".jpg .jpeg .jpe .jfif .png .bmp .pbm .pgm .ppm .pnm .webp .tif .tiff .gif .avif
    .jp2""".split())
SYSTEM = frozenset("thumbs.db ehthumbs.db desktop.ini __macosx @eadir #recycle $recycle.bin lost+found".split())
NO_PHOTOS = frozenset(""".txt .csv .tsv .json .jsonl .xml .md .html .htm .yaml .yml .log .pdf .py .ipynb .sh .npy .npz
    .mat .pts .pkl .pickle .h5 .hdf5 .db .lst .list .idx .rec .bin .zip .tar .gz .tgz .7z .rar .url .lnk""".split())
LISTS = frozenset("""casia_landmark.txt casia_landmark.json lfw_landmark.txt lfw_landmark.json pairs.txt
    pairsDevTrain.txt pairsDevTest.txt""".split())
FORMATS = "JPEG", "MPO", "PNG", "BMP", "DIB", "PPM", "WEBP", "TIFF", "GIF", "AVIF", "JPEG2000"     # Pillow's names
# Limits, checked before memory is allocated; MAX_MEMORY is for all that it takes to decode a file.
MAX_PIXELS, MAX_BYTES, MAX_MEMORY = 128_000_000, 384_000_000, 1_000_000_000
MAX_SCAN_PIXELS = 850_000_000                # in all scans of a progressive JPEG, which usually has ten scans
LEAN, JPEG_WITH_SCANS, GREEDY = 6, 12, 18    # bytes per pixel, with those of a rotated copy and of the decoder
ORIENTATION = 0x0112                         # EXIF tag
# Markers of JPEG. In compressed data, MARKER finds none but the one that ends them.
START_OF_FRAME = frozenset(range(0xc0, 0xd0)) - {0xc4, 0xc8, 0xcc}
SOI, EOI, SOS, APP1, APP14 = 0xd8, 0xd9, 0xda, 0xe1, 0xee
NEEDED = START_OF_FRAME | {0xc4, 0xcc, 0xdb, 0xdd, SOS, EOI}    # tables, frames and scans: what pixels depend on
MARKER = re.compile(rb"\xff[^\x00-\x01\xd0-\xd7\xff]")
MAX_SEGMENTS = 10_000        # an ordinary JPEG has a few dozen
# Zeros before a restart marker or at the end of a scan, but not the one that follows each ff in compressed data.
PADDING = re.compile(rb"(?:(?<![\x00\xff])|(?<=\xff\x00))\x00+(?=\xff+[\xd0-\xd7]|\Z)")
MAX_UNKNOWN = 16             # other bytes that may follow complete data; after damage, more of them are left over


class UnreadableImage(ValueError):
    """The file can't be used as an image. The message is the reason, without the file's name."""


class Scan(NamedTuple):
    """What was found below a folder."""
    paths: list         # relative paths of all images, sorted, with forward slashes
    ignored: Counter    # what is left out because it is no photo, by its kind, see count_of()
    lost: Counter       # what is left out although it may be a photo

    def left_out(self) -> str:
        """Return the counts in words, such as "2 .heic files, 1 broken link", or an empty string."""
        return ", ".join(count_of(number, kind) for kind, number in (*self.lost.items(), *self.ignored.items()))


def is_image(source) -> bool:
    """Return whether read_image() takes `source` for one image, rather than a list of them."""
    one = isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview, Image.Image, np.ndarray))
    return one or hasattr(source, "read") or _is_tensor(source)


def read_image(source) -> np.ndarray:
    """Return an image as uint8 (H, W, 3), RGB. `source` is the path of a file, its bytes, an open binary file, a PIL
    image, or a uint8 array or tensor, RGB (H, W, 3) or gray (H, W). Gray is repeated in all channels and transparency
    is dropped. Of more than 8 bits, those from the highest one used are kept. Raises UnreadableImage if it is missing,
    damaged, no image, or would need more than MAX_MEMORY."""
    try:
        if isinstance(source, Image.Image):
            _check_size(0, *source.size, LEAN)
            return _from_pillow(source)
        if isinstance(source, np.ndarray) or _is_tensor(source):
            return _from_array(source)
        data = _read(source)
        return _decode_jpeg(data) if data[:3] == b"\xff\xd8\xff" else _decode_other(data)
    except MemoryError:
        raise UnreadableImage("out of memory") from None


def summarize(failures: list[tuple[str, str]], count: int = 3) -> str:
    """Return the `count` most frequent reasons among failures, (name, reason), in words, with one image of each."""
    first, reasons = {reason: name for name, reason in reversed(failures)}, Counter(reason for _, reason in failures)
    shown = [f"{first[reason]}: {reason}" + (f" (and {number - 1:,} like it)" if number > 1 else "")
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


def scan_images(root) -> Scan:
    """Return the Scan of a folder. Links are followed, but no folder is read twice; hidden files are left out."""
    scan, seen, folders = Scan([], Counter(), Counter()), set(), deque([""])
    while folders:
        name = folders.popleft()
        folder = os.path.join(root, name)
        try:
            status = os.stat(folder)
            entries = list(os.scandir(folder))
        except OSError:
            scan.lost["folder~ that can't be read"] += 1
            continue
        if (status.st_dev, status.st_ino) in seen:
            scan.ignored["link~ to a folder that is read anyway"] += 1
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in sorted(entries, key=lambda entry: entry.name):
            relative, is_link = f"{name}/{entry.name}" if name else entry.name, entry.is_symlink()
            if is_system_name(entry.name):
                scan.ignored["hidden or system file~"] += 1
            elif os.path.isdir(entry) if is_link else entry.is_dir():    # entry.is_dir() raises for a link to itself
                (folders.append if is_link else folders.appendleft)(relative)    # links come last
            elif os.path.isfile(entry) if is_link else entry.is_file():
                sort_in(relative, scan)
            else:
                scan.lost["broken link~" if is_link else "special file~ such as a pipe"] += 1
    scan.paths.sort()
    return scan


def is_system_name(name: str) -> bool:
    """Return whether a file or folder is hidden, or belongs to the system and not to the data."""
    return name.startswith(".") or name.lower() in SYSTEM


def sort_in(name: str, scan: Scan):
    """Add the path of a file to the part of a Scan where its extension belongs."""
    extension = os.path.splitext(name)[1].lower()
    if extension in EXTENSIONS:
        scan.paths.append(name)
    elif name not in LISTS:
        kind = f"{extension} file~" if extension else "file~ without extension"
        (scan.ignored if extension in NO_PHOTOS else scan.lost)[kind] += 1


def _is_tensor(source):
    return type(source).__module__.partition(".")[0] == "torch" and hasattr(source, "numpy")


def _read(source):
    """Return the bytes of a path, of bytes, or of an open file."""
    try:
        if hasattr(source, "read"):
            getattr(source, "seek", int)(0)    # so that one file can be read twice
            data = source.read(MAX_BYTES + 1)
        elif isinstance(source, (str, os.PathLike)):
            data = read_bytes(path(source), MAX_BYTES)
        else:
            data = bytes(source) if is_image(source) else source
    except (OSError, ValueError) as error:    # a ValueError for a NUL character in the name, or a closed file
        raise UnreadableImage(getattr(error, "strerror", None) or str(error)) from None
    if not isinstance(data, bytes):
        raise UnreadableImage(f"{type(data).__name__} is not a path, bytes, a binary file, a PIL image, or an array")
    if not data or len(data) > MAX_BYTES:
        raise UnreadableImage(f"over {MAX_BYTES // 10**6} MB" if data else "empty file")
    return data


def _from_array(source):
    image = source.cpu().numpy() if _is_tensor(source) else source
    if image.dtype != np.uint8 or image.ndim < 2 or image.shape[2:] not in ((), (3,)) or not image.size:
        raise UnreadableImage(f"an array must be uint8 RGB (H, W, 3) or gray (H, W), not {source.dtype} "
                              f"{tuple(source.shape)}; scale floats to 0..255, drop alpha with image[..., :3], put "
                              "channels last, and pass a batch as a list")
    return _to_8_bits(image)


def _from_pillow(image):
    """Return the pixels of a PIL image, turned by its EXIF orientation."""
    try:
        image.load()
        if image.mode == "F":
            raise UnreadableImage("its pixels are floating-point numbers; save it with 8 bits per channel")
        image = ImageOps.exif_transpose(image)
        return _to_8_bits(np.asarray(image)) if image.mode[0] == "I" else np.array(image.convert("RGB"))
    except (UnreadableImage, MemoryError):
        raise
    except Exception as error:    # Pillow's plugins raise any exception on malformed data
        raise UnreadableImage(f"can't be decoded ({error})") from error


def _to_8_bits(image):
    """Return gray or RGB pixels as uint8 RGB; of 16 bits, which may hold the 12 of a sensor, the highest 8 in use."""
    if image.dtype != np.uint8:
        image = np.clip(image >> max(0, int(image.max()).bit_length() - 8), 0, 255).astype(np.uint8)
    return np.repeat(image[..., None], 3, axis=2) if image.ndim == 2 else image


def _check_size(size, width, height, bytes_per_pixel):
    if not width * height:
        raise UnreadableImage("no pixels")
    if width * height > MAX_PIXELS:
        raise UnreadableImage(f"{width} x {height} is over {MAX_PIXELS // 10**6} megapixels")
    if size + bytes_per_pixel * width * height > MAX_MEMORY:
        raise UnreadableImage(f"{width} x {height} needs over {MAX_MEMORY // 10**9} GB to decode in this format")


def _decode_jpeg(data):
    segments = _segments(data)
    kinds = [kind for kind, _, _ in segments]
    kind, frame = next(((kind, data[start:end]) for kind, start, end in segments if kind in START_OF_FRAME), (0, b""))
    if len(frame) < 9:
        raise UnreadableImage("truncated JPEG")
    height, width = (int.from_bytes(frame[i:i + 2], "big") for i in (5, 7))
    scans, progressive = kinds.count(SOS), kind & 3 == 2
    several = progressive or scans != 1    # then the decoder keeps all coefficients, of two bytes each
    _check_size(len(data), width, height, JPEG_WITH_SCANS if several else LEAN)
    if scans * width * height > MAX_SCAN_PIXELS:    # a scan of a few bytes can take a pass over the whole image
        raise UnreadableImage(f"{width} x {height} in {scans} scans takes too long to decode")
    if several and kinds[-1] != EOI:    # a single scan may be whole without an end marker
        raise UnreadableImage("truncated JPEG")
    try:
        image = simplejpeg.decode_jpeg(data if kinds[-1] == EOI else b"", "RGB")
    except ValueError:
        image = _decode_in_order(data, segments, progressive)
    return _turned(image, data) if APP1 in kinds else image


def _segments(data):
    """Return the (marker, start, end) of a JPEG's segments up to the end marker; a scan's include its compressed data.
    Bytes between them, or after the end marker, such as the film of a motion photo, are in none."""
    segments, position = [], 2
    while len(segments) < MAX_SEGMENTS and (found := MARKER.search(data, position)):
        start, kind = found.start(), data[found.start() + 1]
        position = start + 2
        if kind > 0xbf and kind not in (SOI, EOI):    # the others have no length
            position += int.from_bytes(data[position:position + 2], "big")
        if kind == SOS:
            position = after.start() if (after := MARKER.search(data, position)) else len(data)
        segments.append((kind, start, position))
        if kind == EOI:
            break
    return segments


def _decode_in_order(data, segments, progressive):
    """Decode a JPEG without padding, unknown bytes and segments, and values that do no harm but stop the decoder."""
    parts = [b"\xff\xd8"]
    for kind, start, end in segments:
        part = data[start:end]
        if kind == SOS:
            if not progressive and len(part) > 4:    # its range of coefficients is fixed, but some write another one
                part = part[:5 + 2 * part[4]] + b"\0\x3f\0" + part[8 + 2 * part[4]:]
            part = PADDING.sub(b"", part)
        if kind in NEEDED or kind == APP14 and part[4:9] == b"Adobe" and part[15:16] <= b"\2":
            parts.append(part)
    data = b"".join(parts) + (b"" if kind == EOI else b"\xff\xd9")
    try:
        return simplejpeg.decode_jpeg(data, "RGB")
    except ValueError as error:
        extra = re.search(r"(\d+) extraneous bytes before marker 0xd9", str(error))
        if "subsampling" in str(error):    # a rare ratio, which this decoder does not take
            return _from_pillow(_open(data))
        if not extra or int(extra[1]) > MAX_UNKNOWN:
            raise UnreadableImage(str(error)) from None
    return simplejpeg.decode_jpeg(data, "RGB", strict=False)


def _turned(image, data):
    """Return the array of a file's pixels, turned by its EXIF orientation, which is 1 to 8 if it is valid."""
    orientation = None
    with contextlib.suppress(Exception), Image.open(io.BytesIO(data)) as metadata:    # which may be damaged
        orientation = metadata.getexif().get(ORIENTATION)
    if orientation in (5, 6, 7, 8):
        image = image.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return np.ascontiguousarray(image)


def _open(data):
    """Return a PIL image whose pixels are not decoded yet."""
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]
    try:
        Image.open(io.BytesIO(data), formats=formats).verify()    # the checksums of a PNG
        return Image.open(io.BytesIO(data), formats=formats)
    except Image.DecompressionBombError:
        raise UnreadableImage(f"over {MAX_PIXELS // 10**6} megapixels") from None
    except Exception as error:    # Pillow's plugins raise any exception on malformed data
        raise UnreadableImage("not an image, or damaged") from error


def _decode_other(data):
    with _open(data) as image:
        deep = ";16" in str(image.tile)    # 16 bits per channel, of which Pillow keeps the 8 highest ones
        _check_size(len(data), *image.size, LEAN if image.format == "PNG" and not deep else GREEDY)
        if image.format != "PNG" and not deep:
            return _from_pillow(image)
    # With IMREAD_COLOR_RGB, OpenCV 5.0 returns what was in the memory for TIFFs of 16 bits.
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        pixels = _to_8_bits(cv2.imdecode(np.frombuffer(data, np.uint8), flags))
    except (cv2.error, AttributeError):    # an exception or None
        raise UnreadableImage(f"damaged {image.format}") from None
    return _turned(pixels[..., ::-1], data)
