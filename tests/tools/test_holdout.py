"""holdout.py: the people of the pairs are not in the list to train on, and both files work with training."""
import numpy as np
import pytest
from conftest import options, write_image, write_people

from faces.align import align
from faces.images import read_image
from faces.landmarks import read_landmarks, write_landmarks
from faces.verification.binset import read_bin
from tools import holdout


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Return a folder of 24 people with three photos each, and the aligned face of each, by its path."""
    root = tmp_path_factory.mktemp("photos")
    write_landmarks(root / "casia_landmark.txt", write_people(root, range(24), 3, "{0:07d}/{1:03d}.png"))
    paths, _, points = read_landmarks(root / "casia_landmark.txt", True)
    return root, {name: align(read_image(root / name), landmarks) for name, landmarks in zip(paths, points)}


@pytest.fixture
def hold_out(tmp_path, call):
    """Return a function that runs holdout.py on a set: (exit status, stdout, stderr)."""
    return lambda root, *more, run=call: run(holdout, "--casia", root, "--cache", tmp_path / "cache", "--output",
                                             tmp_path / "out", "--people", 20, "--pairs", 60, *more)


def test_pairs_are_of_people_who_are_not_in_the_list(photos, tmp_path, hold_out, refusal, main):
    status, out, _ = hold_out(photos[0])
    assert status == 0 and "60 pairs of 20 people" in out and "12 images of the other 4" in out
    train, pairs_file = tmp_path / "out" / "train.txt", tmp_path / "out" / "heldout.bin"
    paths, labels, points = read_landmarks(train, True)
    trained = {path.split("/")[0] for path in paths}
    assert len(trained) == 4 and sorted(set(labels)) == [0, 1, 2, 3] and points.shape == (12, 5, 2)

    pairs, images = read_bin(pairs_file)
    owner = {face.tobytes(): name.split("/")[0] for name, face in photos[1].items()}
    people = np.array([owner[read_image(images.open(name)).tobytes()] for name in pairs.paths])
    assert len(set(people)) == 20 and not set(people) & trained
    left, right = people[pairs.pairs].T
    assert ((left == right) == pairs.same).all() and pairs.same.sum() == 30
    assert len(set(map(tuple, np.sort(pairs.pairs).tolist()))) == 60        # no pair twice
    in_fold = [set(people[pairs.pairs[pairs.folds == fold]].ravel()) for fold in range(10)]
    assert set.union(*in_fold) == set(people) and {len(some) for some in in_fold} == {2}    # no person in two folds

    status, out, _ = main("cosFace", *options(photos[0], tmp_path), "--landmarks", train, "--lfw", pairs_file,
                          "--batch-size", "4", "--epochs", "0.34")
    assert status == 0 and "12 faces of 4 people" in out
    assert "train.txt already exists" in hold_out(photos[0], "--seed", 1, run=refusal)


def test_aligned_faces_get_a_list_without_landmarks(photos, tmp_path, hold_out):
    for name, face in photos[1].items():
        write_image(tmp_path / "aligned" / name, face)
    assert hold_out(tmp_path / "aligned")[0] == 0
    lines = (tmp_path / "out" / "train.txt").read_text().splitlines()
    assert len(lines) == 12 and {line.split("\t")[1] for line in lines} == set("0123")


def test_bad_input_is_one_sentence_and_writes_nothing(photos, tmp_path, hold_out, refusal):
    for option, value, sentence in (
            ("--people", 23, "--people 23 is too many; 24 of 24 people have two images or more"),
            ("--pairs", 200, "a fold of 2 people has 6 genuine and 9 impostor pairs, fewer than 10"),
            ("--pairs", 30, "--pairs must be a multiple of 20")):
        assert sentence in hold_out(photos[0], option, value, run=refusal) and not list(tmp_path.glob("out/[!.]*"))
