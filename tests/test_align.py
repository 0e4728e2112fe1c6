"""Alignment: transforms are compared with scikit-image's, and aligned landmarks with the template."""
import numpy as np
import pytest
from conftest import draw_face
from skimage.transform import estimate_transform

from faces.align import TEMPLATE, align, crop_aligned, similarity_transform


@pytest.mark.parametrize("seed", range(5))
def test_transform_matches_scikit_image(seed):
    random = np.random.default_rng(seed)
    points = TEMPLATE @ random.normal(size=(2, 2)) * 3 + random.normal(0, 4, (5, 2)) + 100
    try:
        ours = similarity_transform(points)
    except ValueError:  # the random map contains a reflection, which mirroring the points undoes
        points = points * (-1, 1)
        ours = similarity_transform(points)
    np.testing.assert_allclose(ours, estimate_transform("similarity", points, TEMPLATE).params[:2], atol=1e-9)


def test_identity_and_a_known_rotation():
    np.testing.assert_allclose(similarity_transform(TEMPLATE), [[1, 0, 0], [0, 1, 0]], atol=1e-12)
    rotated = TEMPLATE @ [[0, 2], [-2, 0]] + (7, 9)          # by 90 degrees, and twice as large
    back = similarity_transform(rotated)
    np.testing.assert_allclose(rotated @ back[:, :2].T + back[:, 2], TEMPLATE, atol=1e-9)
    assert np.linalg.det(back[:, :2]) == pytest.approx(0.25)  # positive, so not a reflection


@pytest.mark.parametrize("points, reason", [(TEMPLATE * (-1, 1), "mirrored"), (np.ones((5, 2)), "coincide"),
                                         (TEMPLATE * np.nan, "not finite")])
def test_invalid_landmarks_raise_value_error(points, reason):
    with pytest.raises(ValueError, match=reason):
        similarity_transform(points)


def test_aligned_landmarks_are_on_the_template():
    image, points = draw_face(person=3, photo=5)
    image[:] = 0
    for x, y in points:                                       # draw a 3x3 dot on each landmark
        image[round(y) - 1:round(y) + 2, round(x) - 1:round(x) + 2] = 255
    bright = align(image, points)[..., 0] > 60
    for x, y in TEMPLATE:
        rows, columns = np.nonzero(bright[int(y) - 4:int(y) + 6, int(x) - 4:int(x) + 6])
        assert abs(rows.mean() - 4 - y % 1) < 1 and abs(columns.mean() - 4 - x % 1) < 1


def test_square_faces_are_eight_pixels_wider_on_each_side():
    image, points = draw_face(1, 1)
    square = np.zeros((112, 112, 3), np.uint8)
    square[:, 8:104] = align(image, points)
    assert np.array_equal(crop_aligned(square), align(image, points))
    with pytest.raises(ValueError, match="landmarks are needed"):
        crop_aligned(image)


def test_faces_that_can_not_be_aligned_raise_value_error():
    image, points = draw_face(1, 1)
    assert align(image, points - (50, 0)).any()               # only the image-left eye and corner are outside
    with pytest.raises(ValueError, match="5 of 5 landmarks are outside the image"):
        align(image, points + 150)
    with pytest.raises(ValueError, match="less than two pixels apart"):
        similarity_transform(TEMPLATE / 40)
    with pytest.raises(ValueError, match="not arranged like those of a face"):
        similarity_transform(TEMPLATE[[2, 0, 1, 3, 4]] * (1, 0.2))


@pytest.mark.parametrize("shape, offset", [((150, 40_000), (39_700, 0)), ((40_000, 150), (0, 38_000))])
def test_a_face_in_a_huge_photo_is_aligned_from_its_part(shape, offset):
    image, points = draw_face(1, 1)
    photo = np.zeros((*shape, 3), np.uint8)
    photo[offset[1]:offset[1] + 150, offset[0]:offset[0] + 150] = image
    assert abs(align(photo, points + offset).astype(int) - align(image, points)).max() <= 1    # level of gray
