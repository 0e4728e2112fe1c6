"""The choice of a face, the journal, and the scripts that write landmark lists and drawings."""
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
import skimage.data
import torch
from conftest import ROOT

from faces.data.casia import read_casia
from faces.landmarks import read_landmarks
from mtcnn import search
from mtcnn.detector import Faces
from mtcnn.landmark_lists import median_points, reserved
from mtcnn.search import Find, choose, frame

# Landmarks of the face in skimage.data.astronaut(), read off by eye.
LANDMARKS = np.array([(203.8, 101.6), (246.8, 104.6), (224.5, 130.3), (200.8, 139.0), (244.4, 141.7)])


@pytest.fixture(scope="module")
def photo():
    return skimage.data.astronaut()


def test_select_rules():
    boxes = np.array([[0, 0, 50, 50], [80, 80, 110, 110], [10, 100, 40, 140]], np.float32)
    faces = Faces(boxes, np.array([0.8, 0.9, 0.99], np.float32), np.tile(LANDMARKS.astype(np.float32) - 100, (3, 1, 1)))
    assert [choose(faces, (200, 200), rule) for rule in ("center", "largest", "score")] == [1, 0, 2]
    faces.landmarks[1] = faces.landmarks[1][[1, 0, 2, 4, 3]]  # a mirrored face can't be aligned
    assert choose(faces, (200, 200), "center") == 2
    assert choose(faces, (200, 200), "score", corner=(50, 10)) == 2    # an image of 100 columns and 180 rows
    assert choose(faces, (200, 200), "score", corner=(99, 10)) is None
    assert choose(Faces(boxes[:0], faces.scores[:0], faces.landmarks[:0]), (200, 200), "center") is None


def test_frame_and_median():
    framed, corner = frame(np.ones((40, 100, 3), np.uint8), 0.25)
    assert framed.shape == (60, 150, 3) and framed.sum() == 40 * 100 * 3 and corner.tolist() == [25, 10]
    finds = [Find(0, (100, 200), 0, [50, 50] * 5), Find(1, (10, 10), 1, [3, 4] * 5), Find(2, (50, 50), 0, [5, 40] * 5),
             Find(3, (5, 5), -1, None)]
    np.testing.assert_allclose(median_points(finds), [(0.3, 0.4)] * 5)


@pytest.fixture(scope="module")
def people(tmp_path_factory, photo):
    """Three people, seven images; two of the images have no face, and one of those is Bob's only image."""
    root = tmp_path_factory.mktemp("people")
    blank = np.full((100, 200, 3), 128, np.uint8)
    images = {"Ann/Ann_0001.png": photo[:250, 100:350], "Ann/Ann_0002.png": photo[10:250, 110:350],
              "Ann/Ann_0003.png": blank, "Bob/Bob_0001.png": blank, "Zoe/Zoe_0001.png": photo[30:230, 110:330],
              "Zoe/Zoe_0002.png": np.fliplr(photo), "Zoe/Zoe_0003.png": photo[72:180, 183:263]}
    for name, image in images.items():
        (root / name).parent.mkdir(exist_ok=True)
        cv2.imwrite(str(root / name), image[..., ::-1])
    return root


def command(script, *args, **kwargs):
    return subprocess.run([sys.executable, script, *map(str, args)], cwd=ROOT / "mtcnn", capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, **kwargs)


def in_process(script, *args):
    """Run a script's main() in this process, which saves seconds of importing; return its exit status."""
    try:
        importlib.import_module(f"mtcnn.{script.removesuffix('.py')}").main(list(map(str, args)))
    except SystemExit as stop:
        return stop.code
    return 0


def test_lfw_landmark(people, tmp_path):
    run = command("lfw_landmark.py", "--lfw", people, "--output", tmp_path / "list.txt", "--device", "cpu")
    assert run.returncode == 0, run.stderr
    listed = read_landmarks(tmp_path / "list.txt", labeled=False)
    points = dict(zip(listed.paths, listed.points))
    assert listed.paths == sorted(listed.paths) and len(listed.paths) == 7
    np.testing.assert_allclose(points["Ann/Ann_0001.png"] + (100, 0), LANDMARKS, atol=3)
    np.testing.assert_allclose(points["Zoe/Zoe_0003.png"] + (183, 72), LANDMARKS, atol=4)
    sizes = {"Ann/Ann_0001.png": (250, 250), "Ann/Ann_0002.png": (240, 240), "Zoe/Zoe_0001.png": (220, 200),
             "Zoe/Zoe_0002.png": (512, 512), "Zoe/Zoe_0003.png": (80, 108)}
    median = np.median([points[name] / size for name, size in sizes.items()], axis=0) * (200, 100)
    np.testing.assert_allclose(points["Bob/Bob_0001.png"], median, atol=0.02)
    assert "7 images: a face in 5" in run.stdout and "no face found, median landmarks: 2" in run.stdout
    failed = (tmp_path / "list.failed.txt").read_text().splitlines()
    assert [line.split("\t")[1] for line in failed if line.startswith("no face")] == ["Ann/Ann_0003.png",
                                                                                     "Bob/Bob_0001.png"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [".list.txt.lock", "list.failed.txt", "list.txt"]


def test_casia_landmark_leaves_out_images_without_a_face(people, tmp_path):
    run = command("casia_landmark.py", "--casia", people, "--output", tmp_path / "list.txt", "--device", "cpu")
    assert run.returncode == 0, run.stderr
    listed = read_landmarks(tmp_path / "list.txt", labeled=True)
    assert listed.paths == ["Ann/Ann_0001.png", "Ann/Ann_0002.png", "Zoe/Zoe_0001.png", "Zoe/Zoe_0002.png",
                            "Zoe/Zoe_0003.png"]
    assert listed.labels.tolist() == [0, 0, 1, 1, 1]
    assert "no face found, left out: 2" in run.stdout and "2 people; people without any image left: 1 Bob" in run.stdout


def test_the_same_folder_is_the_person_as_in_training(people, tmp_path):
    """Images further down belong to nobody, neither in the list nor in training."""
    root = tmp_path / "people"
    shutil.copytree(people, root)
    shutil.copytree(root / "Zoe", root / "more" / "Zoe")
    assert in_process("casia_landmark.py", "--casia", root, "--output", tmp_path / "list.txt", "--device", "cpu") == 0
    listed, training = read_landmarks(tmp_path / "list.txt", labeled=True), read_casia(root)
    label = dict(zip(training.paths, training.labels))
    assert not [path for path in [*listed.paths, *training.paths] if path.startswith("more")]
    assert len(set(listed.labels)) == len({label[path] for path in listed.paths}) == 2
    assert len(set(zip(listed.labels, (label[path] for path in listed.paths)))) == 2


def test_a_second_run_is_refused_and_the_first_is_left_alone(people, tmp_path, capsys):
    output = tmp_path / "list.txt"
    args = ["lfw_landmark.py", "--lfw", people, "--output", output, "--device", "cpu"]
    with reserved(output):
        (tmp_path / ".list.txt.partial").write_text("the first run's")
        assert in_process(*args) == 2
    assert f"another process is making {output}; let it finish" in capsys.readouterr().err
    assert (tmp_path / ".list.txt.partial").read_text() == "the first run's" and not output.exists()


def test_a_file_that_is_not_a_landmark_list_is_not_replaced(people, tmp_path, capsys):
    output = tmp_path / "pairs.txt"
    output.write_text("1\t1\nA\t1\t2\nA\t1\tB\t1\n")
    assert in_process("lfw_landmark.py", "--lfw", people, "--output", output, "--device", "cpu") == 2
    assert "exists and is not a landmark list" in capsys.readouterr().err and output.read_text().startswith("1\t1\n")


def test_photos_exchanged_between_two_runs_are_searched_again(people, tmp_path, capsys, monkeypatch):
    root = tmp_path / "people"
    for name in ("Bob/Bob_0001.png", "Zoe/Zoe_0001.png"):
        (root / name).parent.mkdir(parents=True)
        shutil.copy(people / name, root / name)
    args = ["lfw_landmark.py", "--lfw", root, "--output", tmp_path / "list.txt", "--device", "cpu"]
    with monkeypatch.context() as patch:  # stop after all photos have been searched
        patch.setattr("mtcnn.landmark_lists.median_or_stop", lambda *_: sys.exit(9))
        assert in_process(*args) == in_process(*args) == 9
    assert "starting over" not in capsys.readouterr().out
    shutil.copy(root / "Zoe/Zoe_0001.png", root / "Bob/Bob_0001.png")
    assert in_process(*args) == 0
    out = capsys.readouterr().out
    assert "because the photos have changed" in out and "2 images: a face in 2" in out


def test_default_device_and_processes(monkeypatch):
    def defaults(cores, cuda):
        monkeypatch.setattr(search, "count_cpus", lambda: cores)
        monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
        device = search.fastest_device("auto")
        return device, search.default_workers(torch.device("cuda" if device == "auto" else device))
    assert defaults(4, cuda=False) == ("cpu", 4) and defaults(64, cuda=True) == ("cpu", 64)
    assert defaults(4, cuda=True) == ("auto", 4) and defaults(16, cuda=True) == ("auto", 8)
    assert search.fastest_device("mps") == "mps" and search.default_workers(torch.device("mps")) == 0


def test_a_killed_run_continues_to_the_same_list(photo, tmp_path):
    for i in range(60):  # a second or two of work, so that the kill interrupts it
        (tmp_path / "set" / f"Ann_{i:02d}").mkdir(parents=True)
        cv2.imwrite(str(tmp_path / "set" / f"Ann_{i:02d}" / "1.png"), photo[:300 - i, i:, ::-1])
    args = ["--lfw", tmp_path / "set", "--batch-size", "1", "--workers", "2", "--device", "cpu",
            "--output"]
    uninterrupted, resumed = tmp_path / "whole.txt", tmp_path / "again.txt"
    assert in_process("lfw_landmark.py", *args, uninterrupted) == 0
    journal = tmp_path / ".again.txt.partial"
    for _ in range(5):    # on a busy machine, a run may be complete before it is killed
        resumed.unlink(missing_ok=True)
        process = subprocess.Popen([sys.executable, "lfw_landmark.py", *map(str, [*args, resumed])], cwd=ROOT / "mtcnn",
                                   stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
        while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > 2):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if not resumed.exists():
            break
    assert not resumed.exists() and journal.exists()
    done = journal.read_bytes().count(b"\n") - 1
    run = command("lfw_landmark.py", *args, resumed)
    assert run.returncode == 0 and f"continuing: {done} of 60" in run.stdout
    assert done < 60 and resumed.read_text() == uninterrupted.read_text() and not journal.exists()


def test_detector_draws_photos_and_skips_unreadable_ones(photo, tmp_path, capsys):
    for name in ("a.png", "a-2.png", "b/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / name), photo[:200, 100:350, ::-1])
    (tmp_path / "bad.jpg").write_bytes(b"<html>")
    photos = [tmp_path / name for name in ("a.png", "bad.jpg", "none.jpg", "b/a.png", "a-2.png")]
    assert in_process("detector.py", *photos, "--output", tmp_path / "out", "--device", "cpu") == 0
    shown = capsys.readouterr()
    assert "3 faces in 3 photos, 2 skipped" in shown.out
    assert f"skipped {tmp_path}/bad.jpg: not an image\nskipped {tmp_path}/none.jpg: No such file" in shown.err
    listed = json.loads((tmp_path / "out" / "faces.json").read_text())
    assert [entry["photo"] for entry in listed] == [str(photos[k]) for k in (0, 3, 4)]
    np.testing.assert_allclose(listed[0]["faces"][0]["landmarks"] + np.array((100, 0)), LANDMARKS, atol=3)
    assert len({entry["drawing"] for entry in listed}) == 3
    assert cv2.imread(str(tmp_path / "out" / listed[2]["drawing"])).shape == (200, 250, 3)


def test_detector_without_any_photo_and_onto_a_photo(photo, tmp_path, capsys):
    (tmp_path / "bad.jpg").write_bytes(b"<html>")
    assert in_process("detector.py", tmp_path / "bad.jpg", "--output", tmp_path / "out", "--device", "cpu") == 2
    assert "no photo can be read" in capsys.readouterr().err and not list((tmp_path / "out").iterdir())
    cv2.imwrite(str(tmp_path / "a.png"), photo[:200, :, ::-1])
    before = (tmp_path / "a.png").read_bytes()
    assert in_process("detector.py", tmp_path / "a.png", "--output", tmp_path, "--device", "cpu") == 2
    assert "would overwrite the photo" in capsys.readouterr().err and (tmp_path / "a.png").read_bytes() == before


def test_the_person_folders_and_names_that_training_takes(people, tmp_path, capsys):
    root = tmp_path / "parts"
    names = ["0/0_12/0.png", "0/0_13/0.png", "1/1_12/0.png", os.fsdecode(b"1/Jos\xe9/0.png"), "2/\u5973\u00a0/0.png"]
    for name in names:
        try:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
        except OSError:
            pytest.skip("this file system takes only UTF-8")
        shutil.copy(people / "Zoe/Zoe_0003.png", root / name)
    assert in_process("casia_landmark.py", "--casia", root, "--output", tmp_path / "list.txt", "--workers", 0) == 0
    listing = read_casia(root, tmp_path / "list.txt")
    assert listing.paths == names and listing.labels.tolist() == list(range(5))
    for name in ("1/1_12/tab\t.png", "1/1_12/line\u2028.png", "1/1_12/back\\slash.png"):
        shutil.copy(people / "Zoe/Zoe_0003.png", root / name)
    assert in_process("casia_landmark.py", "--casia", root, "--output", tmp_path / "list.txt", "--workers", 0) == 2
    assert "3 of 8 images" in (error := capsys.readouterr().err) and r"tab\t.png: its name" in error


def test_a_missing_folder_is_one_sentence(tmp_path):
    run = command("lfw_landmark.py", "--lfw", tmp_path / "none", "--output", tmp_path / "list.txt")
    assert run.returncode == 2 and "does not exist" in run.stderr and "Traceback" not in run.stderr


@pytest.mark.parametrize("content, script, sentence", [
    ({}, "lfw_landmark.py", "contains no images"),
    ({"Ann/Ann_0001.jpg": b"no image"}, "lfw_landmark.py", "1 of 1 image in"),
    ({"Ann/Ann_0001.png": "blank"}, "lfw_landmark.py", "no face was found"),
    ({"0001.png": "blank"}, "casia_landmark.py", "because they are not in folders; pass a folder"),
    ({"0001.png": "blank"}, "lfw_landmark.py", "not in a person folder; pass"),
    ({"A/1.png": "blank", "A/2.png": "blank"}, "casia_landmark.py", "has 2 photos of 1 person; pass a folder"),
    ({"lfw/A/1.png": "blank", "lfw/B/1.png": "blank"}, "lfw_landmark.py", "further down; pass {root}/lfw."),
    ({"lfw/A/1.png": "blank", "casia/B/1.png": "blank"}, "lfw_landmark.py", "pass one of them, such as {root}/casia"),
    ({}, "casia_landmark.py", "has no photos; pass a folder"),
], ids=["empty", "unreadable", "faceless", "no person", "no person in lfw", "one person", "wrapped",
        "two sets", "empty casia"])
def test_bad_input_is_one_sentence_and_status_2(content, script, sentence, tmp_path, capsys):
    root = tmp_path / "set"
    root.mkdir()
    blank = cv2.imencode(".png", np.zeros((50, 50), np.uint8))[1].tobytes()
    for name, data in content.items():
        (root / name).parent.mkdir(exist_ok=True, parents=True)
        (root / name).write_bytes(blank if data == "blank" else data)
    status = in_process(script, f"--{script.split('_')[0]}", root, "--output", tmp_path / "list.txt")
    assert status == 2 and sentence.format(root=root) in capsys.readouterr().err
    assert not (tmp_path / "list.txt").exists()
