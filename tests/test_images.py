"""read_image() returns every image as uint8 RGB, or raises UnreadableImage with the reason."""
import io

import numpy as np
import pytest
from PIL import Image

from faces import images
from faces.images import MAX_PIXELS, UnreadableImage, read_image

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


def test_gray_and_sixteen_bits():
    gray = np.tile(np.arange(0, 256, 8, np.uint8), (20, 1))
    assert np.array_equal(read_image(encoded(Image.fromarray(gray), "PNG")), np.repeat(gray[..., None], 3, 2))
    deep = read_image(encoded(Image.fromarray(gray.astype(np.uint16) * 257), "PNG"))
    assert deep.dtype == np.uint8 and abs(deep[..., 0].astype(int) - gray).max() <= 1


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6                                          # viewers must rotate the image clockwise by 90 degrees
    image = read_image(encoded(Image.fromarray(RGB), "JPEG", exif=exif))
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
    assert images._jpeg_size(data) == (30, 40)
    large = bytearray(data)
    position = max(data.find(b"\xff\xc0\x00\x11"), data.find(b"\xff\xc2\x00\x11"))
    large[position + 5:position + 9] = b"\xff\xdc\xff\xdc"         # claims 65,500 x 65,500 pixels
    with pytest.raises(UnreadableImage, match="megapixels"):
        read_image(bytes(large))
    assert images._jpeg_size(data[:position]) is None and images._jpeg_size(data[:position] + b"junk" * 9) is None
