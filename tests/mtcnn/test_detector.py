"""The detector on its own, and against the results of a literal implementation and of facenet-pytorch."""
import io

import cv2
import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from faces.images import UnreadableImage
from mtcnn.detector import Detector, groups
from mtcnn.nets import PooledConvolution, SeparableMaxPool
from mtcnn.pyramid import level_sizes

# Landmarks of the face in skimage.data.astronaut(), read off by eye.
LANDMARKS = np.array([(203.8, 101.6), (246.8, 104.6), (224.5, 130.3), (200.8, 139.0), (244.4, 141.7)])


@pytest.fixture(scope="module")
def photo():
    return skimage.data.astronaut()


@pytest.fixture(scope="module")
def detector():
    return Detector(device="cpu")


def assert_equal(one, two):
    """Assert that two Faces are equal but for rounding, which depends on the batch."""
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a, b, atol=0.02)


def test_landmarks_of_a_whole_face_and_one_that_the_border_cuts(detector, photo):
    for top, bottom, left, right in ((0, 200, 0, 512), (88, 512, 0, 512), (0, 512, 188, 512), (0, 512, 0, 258),
                                     (0, 156, 0, 512)):
        faces = detector.detect(photo[top:bottom, left:right])
        assert len(faces.boxes) == len(faces.scores) == len(faces.landmarks) >= 1 and faces.scores[0] > 0.9
        np.testing.assert_allclose(faces.landmarks[0] + (left, top), LANDMARKS, atol=4)


def test_flipped_photos_give_flipped_landmarks(detector, photo):
    """The networks were trained on flipped faces too, so a drift to one side would come from our arithmetic."""
    photos = [photo[y:y + 200, x:x + 200] for y in (15, 25, 35) for x in (115, 120, 125, 130)]
    drift = [a.landmarks[0, :, 0] - (199 - b.landmarks[0, [1, 0, 2, 4, 3], 0])
             for a, b in zip(detector.detect(photos), detector.detect([np.fliplr(p) for p in photos]))]
    assert abs(np.mean(drift) / 2) < 0.3


@pytest.mark.parametrize("shape", [(1, 1, 3), (12, 4000, 3), (11, 11), (300, 200)])
def test_without_a_face_all_arrays_are_empty(detector, shape):
    assert [a.shape for a in detector.detect(np.full(shape, 90, np.uint8))] == [(0, 4), (0,), (0, 5, 2)]
    assert detector.detect([]) == []


def test_what_is_taken_as_an_image(detector, photo):
    expected, data = detector.detect(photo), io.BytesIO()
    Image.fromarray(photo).save(data, "png")
    for faces in [*detector.detect([data, torch.tensor(photo), Image.open(data)]), detector.detect(data.getvalue())]:
        assert_equal(faces, expected)
    gray = detector.detect(cv2.cvtColor(photo, cv2.COLOR_RGB2GRAY))
    np.testing.assert_allclose(gray.landmarks[0], LANDMARKS, atol=4)
    for wrong in (np.zeros((2, 40, 40, 3), np.uint8), [7], 7):
        with pytest.raises((ValueError, TypeError)):
            detector.detect(wrong)


def test_an_unreadable_file_is_named(detector, photo, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"<html>")
    for workers in (0, 2):
        with pytest.raises(UnreadableImage, match="bad.jpg: not an image"):
            detector.detect([photo[:200], tmp_path / "bad.jpg"], workers=workers)


def test_batches_strips_and_worker_processes_give_the_same_as_single_images(detector, photo):
    right, by_strip = np.ascontiguousarray(photo[:, 100:]), Detector(device="cpu")
    by_strip.max_pixels = 4000
    images = [photo, np.zeros_like(photo), right, np.fliplr(photo), photo[:150, 150:300], np.zeros((5, 5), np.uint8)]
    alone = [detector.detect(image) for image in images]
    for results in (detector.detect(images), detector.detect(images, workers=2), by_strip.detect(images)):
        assert len(results) == len(images)
        for one, two in zip(results, alone):
            assert_equal(one, two)


def test_large_images_are_searched_in_strips_and_few_are_in_memory(detector):
    batches = detector.batches([np.zeros((4000, 3000, 3), np.uint8)])
    assert max(batch[..., 0].size for _, _, batch in batches) <= detector.max_pixels
    taken = []
    lists = groups((taken.append(size) or size for size in [5_000_000, 4_000_000, 30_000_000, 1, 1]), lambda size: size)
    assert next(lists) == [5_000_000, 4_000_000] and len(taken) == 2
    assert list(lists) == [[30_000_000], [1, 1]]


def test_fast_layers_equal_those_they_replace():
    convolution, prelu, x = torch.nn.Conv2d(3, 10, 3), torch.nn.PReLU(10), torch.randn(2, 3, 30, 44)
    torch.nn.init.normal_(prelu.weight)  # both signs, as in the release
    expected = torch.nn.functional.max_pool2d(prelu(convolution(x)), 2)
    torch.testing.assert_close(PooledConvolution(convolution, prelu)(x), expected)
    for size in ((22, 22), (46, 46), (2, 8)):
        x = torch.randn(3, 5, *size)
        assert torch.equal(SeparableMaxPool()(x), torch.nn.functional.max_pool2d(x, 3, 2, ceil_mode=True))


def test_sizes_of_pyramid_levels():
    sizes, first = level_sizes(250, 251, 20, 0.709)
    assert sizes[:3] == [(250, 251), (150, 152), (108, 108)] and first == 1 and sizes[-1] == (14, 14)
    sizes, first = level_sizes(1000, 600, 100, 0.709)  # halving leads to the first level that is searched
    assert sizes[:5] == [(1000, 600), (500, 300), (250, 150), (125, 75), (120, 72)] and first == 4
    assert level_sizes(19, 300, 20, 0.709) == ([(19, 300)], 1)


def test_results_are_those_of_a_literal_implementation(detector, photo):
    """It searched one level and one crop at a time. Of the two faces, the border cuts one."""
    image = photo[:220, :255].copy()
    image[60:180, 10:130] = cv2.resize(photo[20:220, 120:320], (120, 120), interpolation=cv2.INTER_AREA)
    faces = detector.detect(image)
    np.testing.assert_allclose(faces.boxes, [(178.5, 63.9, 260.4, 171.8), (45.9, 86.6, 97.1, 151.6)], atol=0.5)
    np.testing.assert_allclose(faces.landmarks.reshape(2, 10), [
        (204.0, 101.3, 244.3, 102.6, 226.0, 127.4, 201.0, 138.6, 244.0, 140.1),
        (59.7, 108.3, 85.6, 109.4, 72.3, 125.0, 58.5, 131.5, 84.7, 132.4)], atol=0.3)
