"""read_image() returns every image as uint8 RGB, or raises UnreadableImage with the reason."""
import io
import os
import re

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image, ImageOps, features

from faces import images
from faces.images import MAX_PIXELS, UnreadableImage, is_image, read_image, scan_images

RGB = np.zeros((40, 30, 3), np.uint8)
RGB[:20] = (250, 10, 20)          # red above blue
RGB[20:] = (10, 20, 250)
JPEGS = {"baseline": {}, "progressive": {"progressive": True}, "restarts": {"restart_marker_blocks": 4},
         "gray": {"mode": "L"}, "cmyk": {"mode": "CMYK"}}


def encoded(image, format, mode=None, **options):
    file = io.BytesIO()
    image.convert(mode or image.mode).save(file, format, **options)
    return file.getvalue()


def photo(format="JPEG", size=(120, 150), **options):
    small = np.random.default_rng(0).integers(0, 256, (15, 12, 3), np.uint8)
    return encoded(Image.fromarray(cv2.resize(small, size, interpolation=cv2.INTER_CUBIC)), format, **options)


def reason(source):
    """Return why an image is unreadable, or None."""
    try:
        read_image(source)
    except UnreadableImage as error:
        return str(error)


def test_every_extension_that_the_docs_name_is_found_and_read(tmp_path):
    named = set(re.findall(r"`(\.\w+)`", (ROOT / "docs/data.md").read_text(encoding="utf-8")))
    assert images.EXTENSIONS <= named
    readable = [extension for extension in images.EXTENSIONS if extension != ".avif" or features.check("avif")]
    for extension in readable:
        format = {".jpe": "JPEG", ".jfif": "JPEG"}.get(extension, "PPM" if extension[:2] == ".p" != ".png" else None)
        Image.fromarray(RGB).save(tmp_path / f"a{extension}", None if extension == ".png" else format)
    assert scan_images(tmp_path).paths == sorted(f"a{extension}" for extension in readable)
    for image in (*map(read_image, tmp_path.iterdir()), *(read_image(encoded(Image.fromarray(RGB), *mode))
                  for mode in (("PNG", "RGBA"), ("PNG", "P"), ("JPEG", "CMYK")))):
        # The channels are in RGB order. The limits are loose, because CMYK and JPEG change colors a little.
        assert image.dtype == np.uint8 and image.shape == (40, 30, 3)
        assert image[5, 15, 0] > 180 and image[5, 15, 2] < 90 and image[35, 15, 2] > 150 and image[35, 15, 0] < 90


@pytest.mark.parametrize("kind", JPEGS)
def test_padding_and_unknown_bytes_are_no_damage(kind):
    data = photo(**JPEGS[kind])
    expected, start, end = read_image(data), data.index(b"\xff\xdb"), data[:-2]    # before the tables
    assert np.array_equal(expected, cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB))
    film = np.random.default_rng(1).bytes(30_000) + b"\xff\xda" * 2000
    changed = [end + bytes(1000) + b"\xff\xd9", end + b"\xff" * 9 + b"\xff\xd9", end + b"webcam" + b"\xff\xd9",
               data + film, data + bytes(1000), data + b"\xff\xda\0",
               *(data[:start] + extra + data[start:] for extra in (bytes(9), b"junk\xff\0junk", b"\xff\xf2\0\4ab",
                                                                   b"\xff\x05", b"\xff\xe5\0\4ab", b"\xff\xee\0\4ab")),
               re.sub(rb"(?=\xff[\xd0-\xd7\xda\xc4])", bytes(5), data), data.replace(b"JFIF\0\1", b"JFIF\0\7")]
    for i, variant in enumerate([*changed, changed[0].replace(b"JFIF\0\1", b"JFIF\0\7")]):
        assert np.array_equal(read_image(variant), expected), i
    assert reason(end) == ("truncated JPEG" if kind == "progressive" else None)    # further scans may be missing


@pytest.mark.parametrize("kind", JPEGS)
def test_data_that_are_cut_missing_or_do_not_fit_are_damage(kind):
    data = photo(**JPEGS[kind])
    middle, end = len(data) // 2, b"\xff\xd9"
    for i, damaged in enumerate((data[:middle], data[:middle] + end, data[:-12] + end, data[:-12],
                                 data[:middle] + bytes(len(data) - middle), data[:middle] + bytes(99_999) + end,
                                 data[:middle] + data[middle + 900:], data[:middle] + bytes(500) + data[middle + 500:],
                                 data[:middle] + bytes(500) + data[middle + 500:-2] + bytes(99) + end,
                                 data[:20] + b"junk" + data[20:middle] + end, data[:data.index(b"\xff\xda") + 3])):
        assert reason(damaged), i


def test_damage_to_other_formats():
    for data in (photo("PNG"), photo("TIFF", compression="tiff_lzw")):
        assert reason(data) is None and reason(data[:-300])
        assert reason(data[:len(data) // 2] + bytes(64) + data[len(data) // 2 + 64:])
    data = photo("PNG")    # compressed data that are whole, but not those that were written
    position = data.rfind(b"IEND") - 8
    assert reason(data[:position] + bytes([data[position] ^ 1]) + data[position + 1:])


def test_gray_and_many_bits():
    gray = np.tile(np.arange(0, 256, 8, np.uint8), (20, 1))
    expected = np.repeat(gray[..., None], 3, 2)
    assert np.array_equal(read_image(encoded(Image.fromarray(gray), "PNG")), expected)
    for format in (".png", ".tiff"):
        for deep in (gray.astype(np.uint16) * 257, gray.astype(np.uint16) * 16 + gray // 16):    # 16 or 12 bits
            for pixels in (deep, np.repeat(deep[..., None], 3, 2)):
                assert np.array_equal(read_image(cv2.imencode(format, pixels)[1].tobytes()), expected)
    assert np.array_equal(read_image(Image.fromarray(gray.astype(np.uint16) * 16)), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_is_applied_to_files_and_pil_images_alike(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO(photo(format, exif=exif))
    expected = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
    for source in (file, Image.open(file), expected):                     # and no image is turned twice
        assert np.array_equal(read_image(source), np.asarray(expected))


def test_paths_bytes_files_and_arrays_are_images(tmp_path):
    (tmp_path / "a.png").write_bytes(photo("PNG"))
    expected, data = read_image(tmp_path / "a.png"), photo("PNG")
    with open(tmp_path / "a.png", "rb") as file, io.BytesIO(data) as memory:
        for source in (str(tmp_path / "a.png"), data, bytearray(data), memoryview(data), file, file, memory,
                       Image.open(tmp_path / "a.png"), expected, torch.from_numpy(expected)):
            assert is_image(source) and np.array_equal(read_image(source), expected)
    assert np.array_equal(read_image(expected[..., 0])[..., 2], expected[..., 0])
    assert not is_image([data]) and not is_image((data, data)) and not is_image(iter([data]))
    for source in (expected.astype(float), expected[None], np.zeros((9, 9, 4), np.uint8), 3, None,
                   Image.fromarray(expected[..., 0].astype("f4"))):
        assert reason(source)


def test_unusable_files_raise_the_reason(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"        # for which Pillow would run Ghostscript
    for source, message in ((b"", "empty file"), (b"hello" * 100, "not an image"), (tmp_path / "a.jpg", "No such file"),
                            (tmp_path / "pipe.jpg", "not a regular file"), ("a\0b", "null"), (tmp_path, "."),
                            (postscript, "not an image")):
        assert re.search(message, reason(source))


def test_hostile_files_are_refused_before_they_take_memory_or_time():
    assert "megapixels" in reason(encoded(Image.new("1", (40_000, MAX_PIXELS // 40_000 + 1)), "PNG"))
    data = photo()
    frame = data.index(b"\xff\xc0") + 5
    assert "megapixels" in reason(data[:frame] + b"\xff\xdc\xff\xdc" + data[frame + 4:])    # 65,500 x 65,500 pixels
    progressive = encoded(Image.new("L", (3000, 3000)), "JPEG", progressive=True)
    scan = progressive[progressive.rfind(b"\xff\xda"):-2]
    assert "scans takes too long" in reason(progressive[:-2] + 200 * scan + b"\xff\xd9")
    assert "1 GB" in reason(encoded(Image.new("1", (9000, 9000)), "TIFF", compression="group4"))


def test_a_scan_counts_what_it_leaves_out(tmp_path, monkeypatch):
    root, elsewhere = tmp_path / "set", tmp_path / "elsewhere"
    for name in ("a/1.jpg", "a/2.JFIF", "a/3.jpe", "a/4.heic", "a/noname", "a/._1.jpg", "a/Thumbs.db", "list.txt",
                 ".ipynb_checkpoints/1.jpg", "a/@eaDir/1.jpg", "__MACOSX/a/1.jpg", "locked/1.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    elsewhere.mkdir()
    (elsewhere / "5.png").touch()
    for link, target in (("b", elsewhere), ("again", root / "a"), ("a/loop", root), ("a/6.jpg", elsewhere / "5.png"),
                         ("a/7.jpg", elsewhere / "absent.png"), ("a/8.jpg", root / "a/8.jpg")):
        (root / link).symlink_to(target)
    os.mkfifo(root / "a/9.jpg")
    scandir = os.scandir

    def denied(path):
        if str(path).endswith("locked"):
            raise PermissionError
        return scandir(path)

    monkeypatch.setattr(images.os, "scandir", denied)
    scan = scan_images(root)
    assert scan.paths == ["a/1.jpg", "a/2.JFIF", "a/3.jpe", "a/6.jpg", "b/5.png"]
    assert scan.ignored == {"hidden or system file~": 5, ".txt file~": 1, "link~ to a folder that is read anyway": 2}
    assert scan.lost == {".heic file~": 1, "file~ without extension": 1, "broken link~": 2,
                         "special file~ such as a pipe": 1, "folder~ that can't be read": 1}
    assert "1 .heic file" in scan.left_out() and "2 broken links" in scan.left_out()
