"""holdout.py: the people of the pairs are not in the list to train on, and both files work with training."""
import shutil

import cv2
import numpy as np
import pytest
from conftest import draw_face, write_image
from helpers import call

from faces.align import align
from faces.files import locked
from faces.landmarks import read_landmarks, write_landmarks
from faces.verification.binset import read_bin
from tools import holdout

PEOPLE, PHOTOS = 24, 3


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Return a folder of 24 people with three photos each, and the aligned face of each, by its path."""
    root, rows, faces = tmp_path_factory.mktemp("photos"), [], {}
    for person in range(PEOPLE):
        for photo in range(PHOTOS):
            image, points = draw_face(person, photo)
            name = f"{person:07d}/{photo + 1:03d}.png"
            write_image(root / name, image)
            rows.append((name, person, points))
            faces[name] = align(image, np.round(points, 2).astype(np.float32))
    write_landmarks(root / "casia_landmark.txt", rows)
    return root, faces


def hold_out(photos, folder, *options):
    return ["--casia", photos[0], "--cache", folder / "cache", "--output", folder / "out",
            "--people", 20, "--pairs", 60, *options]


def test_pairs_are_of_people_who_are_not_in_the_list(photos, tmp_path, capsys):
    status, out = call(holdout, *hold_out(photos, tmp_path)), capsys.readouterr().out
    assert status == 0 and "60 pairs of 20 people" in out and "12 images of the other 4" in out
    paths, labels, points = read_landmarks(tmp_path / "out" / "train.txt", True)
    trained = {path.split("/")[0] for path in paths}
    assert len(trained) == 4 and sorted(set(labels)) == [0, 1, 2, 3] and points.shape == (12, 5, 2)

    pairs, images = read_bin(tmp_path / "out" / "heldout.bin")
    owner = {face.tobytes(): name.split("/")[0] for name, face in photos[1].items()}
    people = np.array([owner[cv2.imdecode(np.frombuffer(image, np.uint8), 1)[..., ::-1].tobytes()] for image in images])
    assert len(set(people)) == 20 and not set(people) & trained
    left, right = people[pairs.pairs].T
    assert ((left == right) == pairs.same).all() and pairs.same.sum() == 30
    assert len(set(map(tuple, np.sort(pairs.pairs).tolist()))) == 60        # no pair twice
    in_fold = [set(left[pairs.folds == fold]) | set(right[pairs.folds == fold]) for fold in range(10)]
    assert sum(map(len, in_fold)) == 20 and {len(some) for some in in_fold} == {2}    # no person in two folds


def test_training_takes_both_files(photos, tmp_path, main):
    assert call(holdout, *hold_out(photos, tmp_path)) == 0
    out = tmp_path / "out"
    status, output = main("cosFace", "--casia", photos[0], "--cache", tmp_path / "cache", "--output", tmp_path / "run",
                          "--landmarks", out / "train.txt", "--lfw", out / "heldout.bin", "--batch-size", "4",
                          "--epochs", "0.34", "--device", "cpu", "--precision", "float32")
    assert status == 0 and "12 faces of 4 people" in output.out and "lfw " in output.out


def test_aligned_faces_get_a_list_without_landmarks(photos, tmp_path):
    root = tmp_path / "aligned"
    for name, face in photos[1].items():
        write_image(root / name, face)
    assert call(holdout, *hold_out((root,), tmp_path)) == 0
    lines = (tmp_path / "out" / "train.txt").read_text().splitlines()
    assert len(lines) == 12 and {line.split("\t")[1] for line in lines} == set("0123")


@pytest.mark.parametrize("options, sentence", [
    (("--people", 23), "--people 23 is too many; 24 of 24 people have two images or more"),
    (("--pairs", 200), "a fold of 2 people has 6 genuine and 9 impostor pairs, fewer than 10"),
    (("--pairs", 30), "--pairs must be a multiple of 20"), (("--people", 19), "--people must be at least 20")])
def test_bad_input_is_one_sentence_and_writes_nothing(photos, tmp_path, capsys, options, sentence):
    assert call(holdout, *hold_out(photos, tmp_path, *options)) == 2
    assert sentence in capsys.readouterr().err and not list(tmp_path.glob("out/[!.]*"))


def test_unusable_photos_are_counted_and_not_in_the_list(photos, tmp_path, capsys, monkeypatch):
    shutil.copytree(photos[0], tmp_path / "photos")
    lines = (photos[0] / "casia_landmark.txt").read_text().splitlines()
    kept = [line for line in lines if not line.startswith("0000003/001.png")]
    (tmp_path / "photos" / "casia_landmark.txt").write_text("\n".join(kept) + "\n")
    (tmp_path / "photos" / "0000007" / "002.png").write_bytes(b"not an image")
    monkeypatch.setattr("faces.data.cache.MAX_FAILED", 0.1)
    assert call(holdout, *hold_out((tmp_path / "photos",), tmp_path)) == 0
    out = capsys.readouterr().out
    assert "1 photo not in the list" in out and "1 unusable image, see failed.txt" in out
    assert "0000007/002.png" not in (tmp_path / "out" / "train.txt").read_text()


def test_a_split_is_never_overwritten(photos, tmp_path, capsys):
    assert call(holdout, *hold_out(photos, tmp_path)) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("[!.]*")}
    assert call(holdout, *hold_out(photos, tmp_path, "--seed", 1)) == 2
    assert "train.txt exists already" in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").glob("[!.]*")}
    (tmp_path / "out" / "train.txt").unlink()    # as if the first run had been killed between its two files
    with locked(tmp_path / "out" / ".lock", "a test"):
        assert call(holdout, *hold_out(photos, tmp_path)) == 2
    assert "another process is writing into" in capsys.readouterr().err
    assert call(holdout, *hold_out(photos, tmp_path, "--seed", 1)) == 0
    assert before["heldout.bin"] != (tmp_path / "out" / "heldout.bin").read_bytes()


@pytest.mark.parametrize("name", [" lead/001.png", "new\nline/001.png"])
def test_names_that_a_list_cannot_hold_are_refused(photos, tmp_path, capsys, monkeypatch, name):
    for original, face in photos[1].items():
        write_image(tmp_path / "aligned" / original, face)
    for photo in range(2):
        write_image(tmp_path / "aligned" / name.replace("001", f"00{photo}"), np.full((112, 96, 3), 90, np.uint8))
    monkeypatch.setattr(holdout, "choose_people", lambda labels, count, rng: np.unique(labels)[2:22])
    assert call(holdout, *hold_out((tmp_path / "aligned",), tmp_path)) == 2
    assert "has a name that a list can't hold" in capsys.readouterr().err
    assert not (tmp_path / "out" / "train.txt").exists()
