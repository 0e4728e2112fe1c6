"""read_image() returns every image as uint8 RGB, or raises UnreadableImage with the reason."""
import io
import os
import re
import struct
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image, features

from faces import images, jpeg
from faces.images import MAX_PIXELS, UnreadableImage, list_images, read_image, scan_images

RGB = np.zeros((40, 30, 3), np.uint8)
RGB[:20] = (250, 10, 20)          # red above blue
RGB[20:] = (10, 20, 250)


def encoded(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


@pytest.mark.parametrize("format, mode", [("JPEG", "RGB"), ("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "P"),
                                          ("BMP", "RGB"), ("GIF", "P"), ("JPEG", "CMYK"), ("WEBP", "RGB"),
                                          ("TIFF", "RGB")])
def test_formats_and_modes(format, mode):
    image = read_image(encoded(Image.fromarray(RGB).convert(mode), format))
    assert image.dtype == np.uint8 and image.shape == (40, 30, 3)
    # The channels are in RGB order. The limits are loose, because CMYK and JPEG change colors a little.
    assert image[5, 15, 0] > 180 and image[5, 15, 2] < 90 and image[35, 15, 2] > 150 and image[35, 15, 0] < 90


def test_every_extension_that_the_docs_name_is_found_and_read(tmp_path):
    text = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    named = re.findall(r"`(\.\w+)`", re.search(r"Images are read by.*?Convert", text, re.S)[0])
    assert set(named) == images.EXTENSIONS
    readable = [extension for extension in named if extension != ".avif" or features.check("avif")]
    for extension in readable:
        mode = {".pbm": "1", ".pgm": "L"}.get(extension, "RGB")
        format = {".jpe": "JPEG", ".jfif": "JPEG", ".pbm": "PPM", ".pgm": "PPM", ".ppm": "PPM", ".pnm": "PPM"}
        Image.fromarray(RGB).convert(mode).save(tmp_path / f"a{extension}", format.get(extension))
    assert list_images(tmp_path) == sorted(f"a{extension}" for extension in readable)
    assert all(read_image(tmp_path / name).shape == (40, 30, 3) for name in list_images(tmp_path))


def test_gray_and_sixteen_bits():
    gray = np.tile(np.arange(0, 256, 8, np.uint8), (20, 1))
    assert np.array_equal(read_image(encoded(Image.fromarray(gray), "PNG")), np.repeat(gray[..., None], 3, 2))
    deep = read_image(encoded(Image.fromarray(gray.astype(np.uint16) * 257), "PNG"))
    assert deep.dtype == np.uint8 and abs(deep[..., 0].astype(int) - gray).max() <= 1


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_exif_orientation_is_applied(format):
    exif = Image.Exif()
    exif[0x0112] = 6                                          # viewers must rotate the image clockwise by 90 degrees
    try:
        data = encoded(Image.fromarray(RGB), format, exif=exif)
    except KeyError:
        pytest.skip(f"this Pillow has no {format}")
    image = read_image(data)
    assert image.shape == (30, 40, 3) and image[15, 35, 0] > 180 and image[15, 5, 2] > 180


def test_unusable_files_raise_the_reason(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 80, 3), np.uint8))
    cases = [("empty", b""), ("not an image", b"hello" * 100)]
    cases += [("truncated", encoded(noise, format)[:-300]) for format in ("JPEG", "PNG", "BMP", "TIFF")]
    for reason, data in cases:
        with pytest.raises(UnreadableImage, match=reason):
            read_image(data)
    with pytest.raises(UnreadableImage, match="No such file"):
        read_image(tmp_path / "absent.jpg")


def test_size_is_checked_before_memory_is_allocated():
    bomb = encoded(Image.new("1", (40_000, MAX_PIXELS // 40_000 + 1)), "PNG")   # over 128 megapixels in under 100 kB
    assert len(bomb) < 100_000
    with pytest.raises(UnreadableImage, match="megapixels"):
        read_image(bomb)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"exif": Image.Exif(), "comment": b"hello"},
                                     {"quality": 100, "subsampling": 0, "icc_profile": b"x" * 70_000}])
def test_size_of_a_jpeg_is_read_from_its_header(options):
    data = encoded(Image.fromarray(RGB), "JPEG", **options)
    assert jpeg.read_header(data)[:2] == (30, 40)
    large = bytearray(data)
    position = max(data.find(b"\xff\xc0\x00\x11"), data.find(b"\xff\xc2\x00\x11"))
    large[position + 5:position + 9] = b"\xff\xdc\xff\xdc"         # claims 65,500 x 65,500 pixels
    with pytest.raises(UnreadableImage, match="megapixels"):
        read_image(bytes(large))
    assert jpeg.read_header(data[:position]) is None and jpeg.read_header(data[:position] + b"junk" * 9) is None


def noise(format, size=120, **options):
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    return encoded(Image.fromarray(pixels), format, **options)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 1}])
def test_what_follows_the_end_marker_does_not_matter(options):
    """Motion photos append a film, in which any marker may occur."""
    data = noise("JPEG", **options)
    film = np.random.default_rng(1).bytes(300_000) + b"\xff\xda" * 20_000
    expected = read_image(data)
    for trailer in (film, film + b"\xff\xd9\0", b"\0" * 1000, b"\xff\xda\0"):
        assert np.array_equal(read_image(data + trailer), expected)
    *_, scans, whole = jpeg.read_header(data + film)
    assert whole and scans == jpeg.read_header(data)[3] == (10 if "progressive" in options else 1)
    assert not jpeg.read_header(data[:-2] + b"\0" * 1000)[4] and not jpeg.read_header(data[:-2])[4]


def overwrite(data, start, replacement):
    return data[:start] + replacement + data[start + len(replacement):]


def reason(source):
    """Return why an image is unreadable, or None."""
    try:
        read_image(source)
    except UnreadableImage as error:
        return str(error)


@pytest.mark.parametrize("format, options", [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}),
                                             ("TIFF", {"compression": "tiff_deflate"})])
def test_damaged_pixels_are_not_decoded(format, options):
    data = noise(format, **options)
    assert reason(data) is None
    assert reason(overwrite(data, len(data) // 2, bytes(64)))                  # zeros in the middle
    assert reason(data[:len(data) // 2] + b"\xff\xd9")                         # for a JPEG, cut but with an end marker


def test_the_checksum_of_a_png_decides():
    """A PNG whose compressed data are whole, but whose checksum says that they are not those that were written."""
    data = noise("PNG")
    position = data.rfind(b"IEND") - 8                                         # the checksum of the last IDAT chunk
    assert reason(overwrite(data, position, bytes([data[position] ^ 1]))) == "damaged PNG"


def test_a_corrupt_jpeg_is_told_from_those_decoded_at_the_same_time(capfd):
    whole = noise("JPEG")
    corrupt = overwrite(whole, len(whole) // 2, bytes(64))
    with jpeg.watched_stderr(), ThreadPoolExecutor(4) as pool:
        print("progress", file=sys.stderr)
        reasons = list(pool.map(reason, [corrupt if i % 5 == 0 else whole for i in range(200)]))
        os.write(2, b"a message of another library\n")
    assert [i for i, found in enumerate(reasons) if found] == list(range(0, 200, 5)) and "Corrupt JPEG" in reasons[0]
    assert capfd.readouterr().err.splitlines() == ["progress", "a message of another library"]


def png_chunk(kind, data, length=None):
    return (struct.pack(">I", len(data) if length is None else length) + kind + data
            + struct.pack(">I", zlib.crc32(kind + data)))


def test_hostile_files_are_refused_before_they_take_memory_or_time():
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 48, 40, 8, 6, 0, 0, 0))
    announced = b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(bytes(48 * 4 * 40 + 40)), 0xff000000)
    assert reason(announced) == "truncated PNG"
    progressive = encoded(Image.new("L", (3000, 3000)), "JPEG", progressive=True)
    scan = progressive[progressive.rfind(b"\xff\xda"):-2]
    assert "scans takes too long" in reason(progressive[:-2] + 200 * scan + b"\xff\xd9")
    assert "1 GB" in reason(encoded(Image.new("1", (9000, 9000)), "TIFF", compression="group4"))
    assert reason(encoded(Image.new("1", (2**20 + 1, 1)), "BMP")) == "can't be decoded by OpenCV"
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"        # for which Pillow would run Ghostscript
    assert reason(postscript) == "not an image"


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    assert reason(tmp_path / "pipe.jpg") == "not a regular file"
    assert reason(tmp_path) and reason("a\0b")


def test_a_scan_counts_what_it_leaves_out(tmp_path, monkeypatch):
    root, elsewhere = tmp_path / "set", tmp_path / "elsewhere"
    for name in ("a/1.jpg", "a/2.JFIF", "a/3.jpe", "a/4.heic", "a/noname", "a/._1.jpg", "a/Thumbs.db", "list.txt",
                 ".ipynb_checkpoints/1.jpg", "a/@eaDir/1.jpg", "__MACOSX/a/1.jpg", "locked/1.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    elsewhere.mkdir()
    (elsewhere / "5.png").write_bytes(b"")
    (root / "b").symlink_to(elsewhere)
    (root / "again").symlink_to(root / "a")
    (root / "a/loop").symlink_to(root)
    (root / "a/6.jpg").symlink_to(elsewhere / "5.png")
    (root / "a/7.jpg").symlink_to(elsewhere / "absent.png")
    (root / "a/8.jpg").symlink_to(root / "a/8.jpg")
    os.mkfifo(root / "a/9.jpg")
    monkeypatch.setattr(images.os, "scandir", deny_locked(os.scandir))
    scan = scan_images(root)
    assert scan.paths == ["a/1.jpg", "a/2.JFIF", "a/3.jpe", "a/6.jpg", "b/5.png"] == list_images(root)
    assert scan.ignored == {"hidden or system file~": 5, ".txt file~": 1, "link~ to a folder that is read anyway": 2}
    assert scan.lost == {".heic file~": 1, "file~ without extension": 1, "broken link~": 2,
                         "special file~ such as a pipe": 1, "folder~ that can't be read": 1}
    assert "1 .heic file" in scan.left_out() and "2 broken links" in scan.left_out()


def deny_locked(scandir):
    """Return os.scandir() as it is for a user who may not read folders named `locked`."""
    def denied(path):
        if str(path).endswith("locked"):
            raise PermissionError
        return scandir(path)
    return denied
