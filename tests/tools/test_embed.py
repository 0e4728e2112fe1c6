"""Embedder and embed.py: from photos to embeddings, one at a time, in lists, and in folders of any size."""
import numpy as np
import pytest
from helpers import write_model, write_photos

from cosFace.net import NETS
from faces.align import align
from faces.files import InputError
from faces.images import read_image
from faces.verification.embed import embed
from faces.verification.weights import load_weights
from mtcnn.detector import Detector
from tools.embedder import Embedder, find_faces


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "checkpoint.pt")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def embedder(model):
    return Embedder(model, "cpu")


def test_an_embedding_is_that_of_the_aligned_face(embedder, model, photos):
    net = NETS["faceNet"]()
    load_weights(net, model)
    image = read_image(photos / "face.png")
    crop = align(image, Detector(device="cpu").detect(image).landmarks[0])
    expected, = embed(net, crop[None], "cpu", progress=False)
    assert expected.shape == (1024,)
    square = np.pad(crop, ((0, 0), (8, 8), (0, 0)))
    for photo, aligned in ((photos / "face.png", False), (image, False), (crop, True), (square, True)):
        np.testing.assert_allclose(embedder(photo, aligned), expected, atol=1e-5)
    batch = embedder([str(photos / "brighter.png"), image])
    assert batch.shape == (2, 1024) and batch.dtype == np.float32
    np.testing.assert_allclose(batch[1], expected, atol=1e-3)    # rounding in the detector moves a few pixels by 1
    np.testing.assert_array_equal(embedder(crop[None], aligned=True)[0], embedder(crop, aligned=True))
    np.testing.assert_allclose(Embedder(net, "cpu", mirror="none")(crop, aligned=True), expected[:512], atol=1e-5)


def test_the_largest_face_is_used_and_the_number_of_faces_is_returned(embedder, photos):
    only, in_two = find_faces([photos / "face.png", photos / "two.png"], embedder.detector)
    assert (only.count, in_two.count) == (1, 2)
    assert abs(only.crop.astype(int) - in_two.crop).mean() < 8
    np.testing.assert_allclose(in_two.landmarks, only.landmarks, atol=3)
    found = embedder.detector.detect(photos / "two.png")
    np.testing.assert_array_equal(found.boxes[in_two.chosen], in_two.box)
    smaller, = find_faces([photos / "two.png"], embedder.detector, "score")
    assert smaller.chosen == 0 and smaller.box[0] > in_two.box[0]


def test_a_face_at_the_border_is_found_in_the_photos_own_coordinates(embedder, photos):
    image = read_image(photos / "face.png")
    whole, = find_faces([image], embedder.detector)
    x1, y1, x2, y2 = whole.box.astype(int) + (8, 8, -8, -8)
    cut, = find_faces([image[y1:y2, x1:x2]], embedder.detector)
    np.testing.assert_allclose(cut.landmarks + (x1, y1), whole.landmarks, atol=8)
    np.testing.assert_allclose((cut.box[:2] + cut.box[2:]) / 2 + (x1, y1), (whole.box[:2] + whole.box[2:]) / 2, atol=12)


@pytest.mark.parametrize("photo, aligned, message", [
    ("coffee.png", False, "can't embed .*coffee.png: no face was found"),
    ("missing.png", False, "can't embed .*missing.png: No such file"),
    ("face.png", True, "can't embed .*face.png: 260x200 pixels is not the size of an aligned face"),
])
def test_what_cannot_be_embedded_is_named(embedder, photos, photo, aligned, message):
    with pytest.raises(InputError, match=message):
        embedder(photos / photo, aligned)
    with pytest.raises(InputError, match="can't embed photo 2 of 2: .*uint8"):
        embedder([read_image(photos / "face.png"), np.zeros((112, 96, 3))], aligned=False)
