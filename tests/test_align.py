"""Alignment: transforms are compared with scikit-image's, and aligned landmarks with the template."""
import numpy as np
import pytest
from conftest import draw_face
from skimage.transform import SimilarityTransform, estimate_transform

from faces.align import TEMPLATE, align, similarity_transform


@pytest.mark.parametrize("seed", range(5))
def test_transform_matches_scikit_image(seed):
    turned = SimilarityTransform(scale=0.5 + seed, rotation=1.5 * seed, translation=(100, 50))(TEMPLATE)
    points = turned + np.random.default_rng(seed).normal(0, 4, (5, 2))
    expected = estimate_transform("similarity", points, TEMPLATE).params[:2]
    np.testing.assert_allclose(similarity_transform(points), expected, atol=1e-9)


@pytest.mark.parametrize("points, reason", [
    (TEMPLATE * (-1, 1) + (96, 0), "mirrored"), (np.ones((5, 2)), "coincide"),
    (np.where(TEMPLATE > 92.3, np.nan, TEMPLATE), "not finite"),
    (TEMPLATE / 40, "less than two pixels apart"), (TEMPLATE[[2, 0, 1, 3, 4]] * (1, 0.2), "not arranged like"),
    (TEMPLATE + 150, "5 of 5 landmarks are outside the image")])
def test_invalid_landmarks_raise_value_error(points, reason):
    with pytest.raises(ValueError, match=reason):
        align(np.zeros((150, 150, 3), np.uint8), points)


def test_aligned_landmarks_are_on_the_template():
    image, points = draw_face(person=3, photo=5)
    assert align(image, points - (50, 0)).any()               # only the image-left eye and corner are outside
    image[:] = 0
    for x, y in points:                                       # draw a 3x3 dot on each landmark
        image[round(y) - 1:round(y) + 2, round(x) - 1:round(x) + 2] = 255
    bright = align(image, points)[..., 0] > 60
    for x, y in TEMPLATE:
        rows, columns = np.nonzero(bright[int(y) - 4:int(y) + 6, int(x) - 4:int(x) + 6])
        assert abs(rows.mean() - 4 - y % 1) < 1 and abs(columns.mean() - 4 - x % 1) < 1


@pytest.mark.parametrize("shape, offset", [((150, 40_000), (39_700, 0)), ((40_000, 150), (0, 38_000))])
def test_a_face_in_a_huge_photo_is_aligned_from_its_part(shape, offset):
    image, points = draw_face(1, 1)
    photo = np.zeros((*shape, 3), np.uint8)
    photo[offset[1]:offset[1] + 150, offset[0]:offset[0] + 150] = image
    assert abs(align(photo, points + offset).astype(int) - align(image, points)).max() <= 1    # level of gray
