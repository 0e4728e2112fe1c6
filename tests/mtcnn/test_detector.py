"""The detector on its own, and against the results of a literal implementation."""
import cv2
import numpy as np
import pytest
import skimage.data
from conftest import ASTRONAUT

from faces.images import UnreadableImage
from mtcnn.detector import Detector


@pytest.fixture(scope="module")
def photo():
    return skimage.data.astronaut()


@pytest.fixture(scope="module")
def detector():
    return Detector(device="cpu")


def test_landmarks_of_a_whole_face_and_one_that_the_border_cuts(detector, photo):
    for top, bottom, left, right in ((0, 200, 0, 512), (88, 512, 0, 512), (0, 512, 188, 512), (0, 512, 0, 258),
                                     (0, 156, 0, 512)):
        faces = detector.detect(photo[top:bottom, left:right])
        assert len(faces.boxes) == len(faces.scores) == len(faces.landmarks) >= 1 and faces.scores[0] > 0.9
        np.testing.assert_allclose(faces.landmarks[0] + (left, top), ASTRONAUT, atol=4)


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


def test_an_unreadable_file_is_named(detector, photo, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"<html>")
    with pytest.raises(UnreadableImage, match="bad.jpg: not an image"):
        detector.detect([photo[:200], tmp_path / "bad.jpg"])


def test_batches_and_strips_give_the_same_as_single_images(detector, photo):
    right, by_strip = np.ascontiguousarray(photo[:, 100:]), Detector(device="cpu")
    by_strip.max_pixels = 4000
    images = [photo, np.zeros_like(photo), right, np.fliplr(photo), photo[:150, 150:300], np.zeros((5, 5), np.uint8)]
    alone = [detector.detect(image) for image in images]
    for results in (detector.detect(images), by_strip.detect(images)):
        for one, two in zip(results, alone, strict=True):
            for a, b in zip(one, two):
                np.testing.assert_allclose(a, b, atol=0.02)    # rounding depends on the batch
    batches = detector.batches([np.zeros((4000, 3000, 3), np.uint8)])
    assert max(batch[..., 0].size for _, _, batch in batches) <= detector.max_pixels


def test_results_are_those_of_a_literal_implementation(detector, photo):
    """It searched one level and one crop at a time. Of the two faces, the border cuts one."""
    image = photo[:220, :255].copy()
    image[60:180, 10:130] = cv2.resize(photo[20:220, 120:320], (120, 120), interpolation=cv2.INTER_AREA)
    faces = detector.detect(image)
    np.testing.assert_allclose(faces.boxes, [(178.5, 63.9, 260.4, 171.8), (45.9, 86.6, 97.1, 151.6)], atol=0.5)
    np.testing.assert_allclose(faces.landmarks.reshape(2, 10), [
        (204.0, 101.3, 244.3, 102.6, 226.0, 127.4, 201.0, 138.6, 244.0, 140.1),
        (59.7, 108.3, 85.6, 109.4, 72.3, 125.0, 58.5, 131.5, 84.7, 132.4)], atol=0.3)
