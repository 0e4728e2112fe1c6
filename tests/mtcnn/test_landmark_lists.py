"""The choice of a face, and the scripts that write landmark lists and drawings."""
import json
import os
import re
import shutil
import sys

import numpy as np
import pytest
import skimage.data
from conftest import ASTRONAUT, write_image

from faces.data.sources import Folder
from faces.images import read_image
from faces.landmarks import photos_digest, read_landmarks
from mtcnn import casia_landmark, detector, lfw_landmark
from mtcnn.detector import Faces
from mtcnn.search import choose

CPU = ("--device", "cpu")


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """Three people, seven images; two of the images have no face, and one of those is Bob's only image."""
    root, photo = tmp_path_factory.mktemp("people"), skimage.data.astronaut()
    blank = np.full((100, 200, 3), 128, np.uint8)
    images = {"Ann/Ann_0001.png": photo[:250, 100:350], "Ann/Ann_0002.png": photo[10:250, 110:350],
              "Ann/Ann_0003.png": blank, "Bob/Bob_0001.png": blank, "Zoe/Zoe_0001.png": photo[30:230, 110:330],
              "Zoe/Zoe_0002.png": np.fliplr(photo), "Zoe/Zoe_0003.png": photo[72:180, 183:263]}
    for name, image in images.items():
        write_image(root / name, image)
    return root


def test_select_rules():
    boxes = np.array([[0, 0, 50, 50], [80, 80, 110, 110], [10, 100, 40, 140]], np.float32)
    faces = Faces(boxes, np.array([0.8, 0.9, 0.99], np.float32), np.tile(ASTRONAUT.astype(np.float32) - 100, (3, 1, 1)))
    assert [choose(faces, (200, 200), rule)[0] for rule in ("center", "largest", "score")] == [1, 0, 2]
    faces.landmarks[1] = faces.landmarks[1, [1, 0, 2, 4, 3]]  # a flipped face can't be aligned
    assert choose(faces, (200, 200), "center") == [2, 0]
    assert choose(faces, (90, 90), "center") == []    # the landmarks are outside


def test_lfw_landmark(people, tmp_path, call):
    status, output, _ = call(lfw_landmark, "--lfw", people, "--output", tmp_path / "list.txt", *CPU)
    listed = read_landmarks(tmp_path / "list.txt", labeled=False)
    points = dict(zip(listed.paths, listed.points))
    assert status == 0 and listed.paths == sorted(points) and len(points) == 7
    np.testing.assert_allclose(points["Ann/Ann_0001.png"] + (100, 0), ASTRONAUT, atol=3)
    np.testing.assert_allclose(points["Zoe/Zoe_0003.png"] + (183, 72), ASTRONAUT, atol=4)
    sizes = {"Ann/Ann_0001.png": (250, 250), "Ann/Ann_0002.png": (240, 240), "Zoe/Zoe_0001.png": (220, 200),
             "Zoe/Zoe_0002.png": (512, 512), "Zoe/Zoe_0003.png": (80, 108)}
    median = np.median([points[name] / size for name, size in sizes.items()], axis=0) * (200, 100)
    np.testing.assert_allclose(points["Bob/Bob_0001.png"], median, atol=0.02)
    assert "7 images: a face in 5" in output and "no face found, median landmarks: 2" in output
    failed = (tmp_path / "list.failed.txt").read_text().splitlines()
    assert [line[-16:] for line in failed if line.startswith("no face")] == ["Ann/Ann_0003.png", "Bob/Bob_0001.png"]
    assert json.loads((tmp_path / "list.json").read_text())["photos"] == photos_digest(Folder(people))


def test_casia_landmark_leaves_out_images_without_a_face(people, tmp_path, call):
    """The person folders are where training finds them, also below another folder."""
    shutil.copytree(people, tmp_path / "unpacked" / "CASIA")
    output = call(casia_landmark, "--casia", tmp_path / "unpacked", "--output", tmp_path / "list.txt", *CPU)[1]
    listed = read_landmarks(tmp_path / "list.txt", labeled=True)
    assert listed.paths == ["Ann/Ann_0001.png", "Ann/Ann_0002.png", *(f"Zoe/Zoe_000{i}.png" for i in (1, 2, 3))]
    assert listed.labels.tolist() == [0, 0, 1, 1, 1]
    assert "no face found, left out: 2" in output and "2 people; people without any image left: 1 Bob" in output


@pytest.mark.parametrize("change", [(), ("--min-face-size", 40), ("--select", "score"), "photo"], ids=str)
def test_a_killed_run_is_continued_with_the_same_photos_and_options_only(people, tmp_path, call, monkeypatch, change):
    shutil.copytree(people / "Zoe", tmp_path / "set" / "Zoe")
    whole, again = tmp_path / "whole.txt", tmp_path / "again.txt"
    args = ["--lfw", tmp_path / "set", *CPU, "--output"]
    assert call(lfw_landmark, *args, whole)[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr("mtcnn.landmark_lists.write_landmarks", lambda *_, **__: sys.exit(9))
        assert call(lfw_landmark, *args, again)[0] == 9 and not again.exists()
    partial, = tmp_path.glob(".again.txt.*.rows")
    partial.write_bytes(partial.read_bytes()[:-5])    # it was killed while it wrote the last row
    if change == "photo":
        shutil.copy(people / "Bob" / "Bob_0001.png", tmp_path / "set" / "Zoe" / "Zoe_0001.png")
    status, output, _ = call(lfw_landmark, *args, again, *(() if change == "photo" else change))
    assert status == 0 and ("starting over, because" in output) == bool(change)
    assert ("continuing: 2 of 3 images" in output) == (not change)
    assert (change or again.read_text() == whole.read_text()) and not partial.exists()


def test_detector_draws_photos_in_folders_and_skips_unreadable_ones(people, tmp_path, call, refusal, monkeypatch):
    for name in ("in/a.png", "in/a-2.png", "in/b/a.png"):
        write_image(tmp_path / name, read_image(people / "Ann/Ann_0001.png"))
    (tmp_path / "bad.jpg").write_bytes(b"<html>")
    monkeypatch.setenv("HOME", str(tmp_path))
    _, out, err = call(detector, tmp_path / "in", tmp_path / "bad.jpg", "~/in/a.png", "--output=~/out", *CPU)
    assert "3 faces in 3 photos, 1 skipped" in out and f"skipped {tmp_path}/bad.jpg: not an image" in err
    listed = json.loads((tmp_path / "out/faces.json").read_text())
    assert [entry["photo"] for entry in listed] == [f"{tmp_path}/in/{name}" for name in ("a-2.png", "a.png", "b/a.png")]
    np.testing.assert_allclose(listed[0]["faces"][0]["landmarks"] + np.array((100, 0)), ASTRONAUT, atol=3)
    assert len({entry["drawing"] for entry in listed}) == 3
    assert read_image(tmp_path / "out" / listed[2]["drawing"]).shape == (250, 250, 3)
    assert "would overwrite the photo" in refusal(detector, tmp_path / "in/a.png", "--output", tmp_path / "in", *CPU)


@pytest.mark.skipif(sys.platform != "linux", reason="other file systems take only UTF-8")
def test_names_that_a_list_can_not_hold_and_names_that_it_can(people, tmp_path, call, refusal):
    names = ["a b/0.png", os.fsdecode(b"c/Jos\xe9.png"), "d/\u5973\u00a0.png"]
    args = ["--casia", tmp_path / "set", "--output", tmp_path / "list.txt", *CPU]
    for name in [*names, "d/tab\t.png"]:
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(people / "Zoe/Zoe_0003.png", tmp_path / "set" / name)
    assert re.search("1 of 4 images .*tab\t.png: its name", refusal(casia_landmark, *args))
    (tmp_path / "set" / "d/tab\t.png").unlink()
    assert call(casia_landmark, *args)[0] == 0
    assert read_landmarks(tmp_path / "list.txt", labeled=True).paths == names


@pytest.mark.parametrize("name, sentence", [(None, "does not exist"), ("list.txt", "found in 0 images"),
                                            ("bad.jpg", "1 of 1 image in"), ("blank.png", "no face was found")])
def test_bad_input_is_one_sentence(name, sentence, tmp_path, refusal):
    if name:
        write_image(tmp_path / "set/blank.png", np.zeros((50, 50, 3), np.uint8))
        (tmp_path / "set/blank.png").rename(tmp_path / "set" / name)
    if name in ("list.txt", "bad.jpg"):
        (tmp_path / "set" / name).write_bytes(b"no image")
    assert sentence in refusal(lfw_landmark, "--lfw", tmp_path / "set", "--output", tmp_path / "list.txt", *CPU)
    assert not (tmp_path / "list.txt").exists()
