"""Embedder and embed.py: from photos to embeddings, one at a time, in lists, and in folders of any size."""
import shutil

import numpy as np
import pytest
from conftest import write_image
from helpers import call, write_model, write_photos

from cosFace.net import NETS
from faces.align import align
from faces.files import InputError
from faces.images import read_image
from faces.verification.embed import embed
from faces.verification.weights import load_weights
from mtcnn.detector import Detector, Faces
from tools import embed as embed_tool
from tools.embedder import NO_FACE, Embedder, find_faces


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
    ("face.png", True, "can't embed .*face.png: an image of 200 rows and 260 columns is not an aligned face"),
])
def test_what_cannot_be_embedded_is_named(embedder, photos, photo, aligned, message):
    with pytest.raises(InputError, match=message):
        embedder(photos / photo, aligned)
    with pytest.raises(InputError, match="can't embed photo 2 of 2: .*uint8"):
        embedder([read_image(photos / "face.png"), np.zeros((112, 96, 3))], aligned=False)


def test_a_photo_whose_face_can_not_be_aligned_does_not_end_the_run(photos):
    """A screenshot too tall for OpenCV; and a face of which only the black frame around the photo has anything."""
    points = np.array([(30, 50), (65, 50), (48, 70), (33, 92), (62, 92)], np.float32)

    class FindsAFace:
        def detect(self, images, thresholds):
            return [Faces(np.array([[20, 30, 80, 110]], np.float32), np.ones(1, np.float32),
                          points[None] + np.array((0, 0 if len(image) > 1000 else 400))) for image in images]
    tall, small = np.zeros((33_000, 100, 3), np.uint8), np.zeros((120, 100, 3), np.uint8)
    reasons = find_faces([tall, small], FindsAFace())
    assert reasons == ["an image of 100 x 33000 pixels is too large to align", NO_FACE]


@pytest.mark.parametrize("wrong, message", [
    (None, "can't embed None; pass a photo"), ([None], "photo 1 of 1: an image must be .* not NoneType"),
    (3, "can't embed 3; pass a photo"), (np.zeros((200, 200)), r"photo 1 of 1: .* not float64 \(200, 200\)"),
    ([], "nothing to embed"), (b"image", "photo 1 of 5: .* not int"), (np.zeros((1, 1, 9, 9, 3), np.uint8), "uint8"),
])
def test_what_is_no_photo_is_one_sentence(embedder, wrong, message):
    for aligned in (False, True):
        with pytest.raises(InputError, match=message):
            embedder(wrong, aligned)


@pytest.fixture
def run(model, tmp_path, monkeypatch, capsys):
    """Return a function that runs embed.py with parts of two photos: (exit status, stdout, stderr)."""
    def run_embed(*options):
        status = call(embed_tool, "--model", model, "--device", "cpu", "--workers", 0, *options)
        return status, *capsys.readouterr()

    monkeypatch.setattr(embed_tool, "PART", 2)
    return run_embed


def test_a_folder_becomes_one_file_and_what_is_skipped_is_named(run, embedder, photos, tmp_path):
    folder, output = tmp_path / "photos", tmp_path / "out" / "faces.npz"
    shutil.copytree(photos, folder)
    (folder / "damaged.jpg").write_bytes(b"no image")
    status, out, err = run(folder, folder / "two.png", photos / "two.png", "--output", output)
    assert status == 0
    assert f"skipped {folder / 'coffee.png'}: no face was found" in err
    assert f"skipped {folder / 'damaged.jpg'}: not an image" in err
    assert "4 embeddings of 1024 values; 2 of 6 photos skipped" in out
    faces = np.load(output)
    expected = [folder / "brighter.png", folder / "face.png", folder / "two.png", photos / "two.png"]
    assert faces["names"].tolist() == list(map(str, expected))
    np.testing.assert_allclose(faces["embeddings"], embedder(expected), atol=1e-3)
    assert faces["embeddings"].dtype == faces["boxes"].dtype == faces["landmarks"].dtype == np.float32
    two, = find_faces(expected[2:3], embedder.detector)
    np.testing.assert_allclose(faces["boxes"][2], two.box, atol=1e-2)
    np.testing.assert_allclose(faces["landmarks"][2], two.landmarks, atol=1e-2)
    assert (faces["faces"].tolist(), faces["chosen"].tolist()) == ([1, 1, 2, 2], [0, 0, 1, 1])
    assert str(faces["model"]) == embedder.loaded["fingerprint"]
    assert [path.name for path in output.parent.iterdir() if not path.name.endswith(".lock")] == ["faces.npz"]


def test_worker_processes_give_the_same_file(run, photos, tmp_path):
    assert run(photos, "--output", tmp_path / "one.npz")[0] == 0
    assert run(photos, "--output", tmp_path / "two.npz", "--workers", 2)[0] == 0
    one, two = np.load(tmp_path / "one.npz"), np.load(tmp_path / "two.npz")
    assert one["names"].tolist() == two["names"].tolist()
    for name in ("embeddings", "boxes", "landmarks"):
        np.testing.assert_allclose(one[name], two[name], atol=1e-3)


def test_an_interrupted_run_continues_to_the_same_file(run, photos, tmp_path, monkeypatch):
    assert run(photos, photos / "two.png", "--output", tmp_path / "whole.npz")[0] == 0
    original, embedded = Embedder.embed, []

    def embed_one_part(self, crops):
        if embedded:
            raise KeyboardInterrupt
        embedded.append(len(crops))
        return original(self, crops)

    monkeypatch.setattr(Embedder, "embed", embed_one_part)
    output = tmp_path / "faces.npz"
    assert run(photos, "--output", output)[0] == 130 and not output.exists()
    monkeypatch.setattr(Embedder, "embed", lambda self, crops: embedded.append(len(crops)) or original(self, crops))
    assert run(photos, "--output", output)[0] == 0
    assert embedded == [1, 2] and output.read_bytes() == (tmp_path / "whole.npz").read_bytes()
    monkeypatch.setattr(Embedder, "embed", embed_one_part)
    run(photos, "--output", output, "--mirror", "none")
    assert output.read_bytes() == (tmp_path / "whole.npz").read_bytes()    # a failed run leaves what was there
    monkeypatch.setattr(Embedder, "embed", original)
    status, out, _ = run(photos, "--output", output, "--mirror", "none", "--select", "score")
    assert status == 0 and np.load(output)["embeddings"].shape == (3, 512)


def test_aligned_faces_and_names_that_are_not_utf8(run, embedder, tmp_path):
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (3, 112, 96, 3), np.uint8)
    for i, image in enumerate(images):
        write_image(tmp_path / "faces" / f"{i}.png", image)
    latin1 = tmp_path / "faces" / b"Jos\xe9.png".decode(errors="surrogateescape")
    try:
        (tmp_path / "faces" / "2.png").rename(latin1)
    except OSError:
        pytest.skip("this file system takes only UTF-8")
    write_image(tmp_path / "faces" / "large.png", np.zeros((250, 250, 3), np.uint8))
    status, _, err = run(tmp_path / "faces", "--aligned", "--output", tmp_path / "faces.npz")
    assert status == 0 and "large.png: an image of 250 rows and 250 columns is not an aligned face" in err
    faces = np.load(tmp_path / "faces.npz")
    assert set(faces) == {"names", "embeddings", "model"} and str(latin1) in faces["names"]
    rows = [faces["names"].tolist().index(str(path)) for path in (tmp_path / "faces" / "0.png", latin1)]
    np.testing.assert_allclose(faces["embeddings"][rows], embedder(images[[0, 2]], aligned=True), atol=1e-5)


@pytest.mark.parametrize("photo, output, message", [
    ("missing", "faces.npz", "missing does not exist"), (".", "faces.npz", "contains no images"),
    ("coffee.png", "faces.npz", "no face that can be used in 1 photo;"),
    ("face.png", "faces.csv", "does not end in .npz"),
])
def test_mistakes_are_one_sentence_errors(run, photos, tmp_path, photo, output, message):
    status, _, err = run((tmp_path if photo == "." else photos) / photo, "--output", tmp_path / output)
    assert status == 2 and message in err and not (tmp_path / output).exists()
