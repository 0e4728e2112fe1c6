"""Embedder and embed.py: from photos to embeddings, one at a time, in lists, and in folders of any size."""
import io
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import write_image, write_model
from PIL import Image

from cosFace.net import NETS
from faces.align import align
from faces.files import InputError
from faces.images import read_image
from faces.verification.embed import embed
from faces.verification.weights import load_net
from mtcnn.detector import Detector
from tools import embed as embed_tool
from tools.embedder import Embedder, find_faces


@pytest.fixture(scope="module")
def embedder(model):
    return Embedder(model, "cpu")


def test_a_photo_in_any_form_becomes_the_embedding_of_its_aligned_face(embedder, model, photos, monkeypatch):
    net, _ = load_net(model, NETS)
    image, data = read_image(photos / "face.png"), (photos / "face.png").read_bytes()
    crop = align(image, Detector(device="cpu").detect(image).landmarks[0])
    expected, = embed(net, crop[None], "cpu", progress=False)
    monkeypatch.setenv("HOME", str(photos))
    for photo in ("~/face.png", data, io.BytesIO(data), Image.open(photos / "face.png"), image, torch.tensor(image)):
        np.testing.assert_allclose(embedder(photo), expected, atol=1e-5)
    for aligned in (crop, np.pad(crop, ((0, 0), (8, 8), (0, 0)))):
        np.testing.assert_allclose(embedder(aligned, aligned=True), expected, atol=1e-5)
    batch = embedder([data, photos / "brighter.png"])
    assert batch.shape == (2, 1024) and batch.dtype == np.float32
    np.testing.assert_allclose(batch[0], expected, atol=1e-3)    # rounding in the detector moves a few pixels by 1
    np.testing.assert_allclose(Embedder(net, "cpu", flip="none")(crop, aligned=True), expected[:512], atol=1e-5)


def test_the_largest_face_is_used_or_all_faces(embedder, photos):
    (only,), (largest,) = find_faces([photos / "face.png", photos / "two.png"], embedder.detector)
    assert (only.count, largest.count) == (1, 2)
    np.testing.assert_allclose(largest.landmarks, only.landmarks, atol=3)
    found, = find_faces([photos / "two.png"], embedder.detector, all_faces=True)
    np.testing.assert_array_equal(found[largest.chosen].box, largest.box)
    assert [face.chosen for face in found] == [0, 1] and found[0].score > found[1].score
    one, none, two = embedder([photos / f"{name}.png" for name in ("face", "coffee", "two")], all_faces=True)
    assert (one.shape, none.shape, two.shape) == ((1, 1024), (0, 1024), (2, 1024))
    np.testing.assert_allclose(two, embedder.embed(np.stack([face.crop for face in found])), atol=1e-4)


@pytest.mark.parametrize("wrong, aligned, message", [
    ("coffee.png", False, "coffee.png: no face was found"), ("missing.png", False, "missing.png: No such file"),
    ("face.png", True, "face.png: an image of 200 rows and 260 columns is not an aligned face"),
    (np.zeros((200, 200)), False, r"photo 1 of 1: .* not float64 \(200, 200\)")])
def test_what_can_not_be_embedded_is_named(embedder, photos, wrong, aligned, message):
    with pytest.raises(InputError, match=message):
        embedder(photos / wrong if isinstance(wrong, str) else wrong, aligned)


@pytest.fixture
def run(model, call, monkeypatch):
    """Return a function that runs embed.py with parts of three photos; see call() in conftest.py."""
    monkeypatch.setattr(embed_tool, "PART", 3)
    monkeypatch.setattr(embed_tool, "__doc__", None)    # as with python -OO
    return lambda *options, run=call: run(embed_tool, "--model", model, "--device", "cpu", "--workers", 0, *options)


def test_a_folder_becomes_one_file_and_what_is_skipped_is_listed(run, embedder, photos, tmp_path):
    folder, output = tmp_path / "photos", tmp_path / "out" / "faces.npz"
    shutil.copytree(photos, folder)
    (folder / "damaged.jpg").write_bytes(b"no image")
    status, out, _ = run(folder, folder / "two.png", photos / "two.png", "--output", output)
    assert status == 0 and "4 embeddings of 1024 values; 2 of 6 photos skipped" in out
    skipped = [line.split("\t") for line in (output.parent / "faces.skipped.txt").read_text().splitlines()]
    assert skipped[0] == [str(folder / "coffee.png"), "no face was found"] and skipped[1][0].endswith("damaged.jpg")
    faces = np.load(output)
    expected = [folder / "brighter.png", folder / "face.png", folder / "two.png", photos / "two.png"]
    assert faces["names"].tolist() == list(map(str, expected))
    np.testing.assert_allclose(faces["embeddings"], embedder(expected), atol=1e-3)
    assert faces["embeddings"].dtype == faces["boxes"].dtype == faces["landmarks"].dtype == np.float32
    (two,), = find_faces(expected[2:3], embedder.detector)
    np.testing.assert_allclose(faces["landmarks"][2], two.landmarks, atol=1e-2)
    assert (faces["faces"].tolist(), faces["chosen"].tolist()) == ([1, 1, 2, 2], [0, 0, 1, 1])
    assert str(faces["model"]) == embedder.loaded["fingerprint"]

    assert run(folder, folder / "two.png", photos / "two.png", "--output", output, "--workers", 2)[0] == 0
    np.testing.assert_allclose(np.load(output)["embeddings"], faces["embeddings"], atol=1e-3)


def test_an_interrupted_run_continues_to_the_same_file(run, photos, tmp_path, monkeypatch):
    options = photos, "--all-faces", "--output"
    assert run(*options, tmp_path / "whole.npz")[0] == 0
    original, embedded, output = Embedder.embed, [], tmp_path / "faces.npz"

    def stop_in_the_second_part(self, crops):
        if len(embedded) == 1:
            raise KeyboardInterrupt
        embedded.append(len(crops))
        return original(self, crops)
    monkeypatch.setattr(Embedder, "embed", stop_in_the_second_part)
    assert run(*options, output)[0] == 130 and not output.exists()
    rows, = tmp_path.glob(".faces.npz.*.rows")
    with open(rows, "ab") as file:    # as if it had been killed while it wrote a row
        file.write(b"half a row")
    embedded.append("again")
    assert run(*options, output)[0] == 0 and not rows.exists()
    assert embedded == [2, "again", 3]    # the last photo might have had more faces, so it is done again
    whole, continued = np.load(tmp_path / "whole.npz"), np.load(output)
    for name in whole:
        np.testing.assert_array_equal(whole[name], continued[name])
    assert continued["names"].tolist() == [str(photos / f"{name}.png") for name in ("brighter", "face", "two", "two")]
    assert continued["chosen"].tolist() == [0, 0, 0, 1] and continued["faces"].tolist() == [1, 1, 2, 2]


@pytest.mark.skipif(sys.platform != "linux", reason="other file systems take only UTF-8")
def test_aligned_faces_and_names_that_are_not_utf8(run, embedder, tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (112, 96, 3), np.uint8)
    latin1 = tmp_path / os.fsdecode(b"Jos\xe9.png")
    write_image(tmp_path / "a.png", image)
    (tmp_path / "a.png").rename(latin1)
    assert run(tmp_path, "--aligned", "--flip", "none", "--output", tmp_path / "faces.npz")[0] == 0
    faces = np.load(tmp_path / "faces.npz")
    assert set(faces) == {"names", "embeddings", "model"} and faces["names"].tolist() == [str(latin1)]
    np.testing.assert_allclose(faces["embeddings"][0], embedder(image, aligned=True)[:512], atol=1e-5)


def test_mistakes_are_one_sentence_errors(run, photos, tmp_path, refusal):
    for photo, output, message in (("missing", "faces.npz", "missing does not exist"),
                                   ("coffee.png", "faces.npz", "no face that can be used"),
                                   ("face.png", "faces.csv", "is not the name of a .npz file")):
        assert message in run(photos / photo, "--output", tmp_path / output, run=refusal)
    nan = "--model", write_model(tmp_path / "nan.pt", nan=True), "--output", tmp_path / "faces.npz"
    assert "nan.pt is not finite or is zero" in run(photos / "face.png", *nan, run=refusal)
    assert not list(tmp_path.glob("faces.*"))
