"""The protocol of the demo: LFW's reader accepts its pairs, and folds share no people."""
import numpy as np
import pytest

from faces.files import InputError
from faces.verification.lfw import read_pairs
from tools import demo


@pytest.fixture
def pairs(tmp_path):
    names = [f"Person_{i}" for i in range(demo.PEOPLE - demo.TRAINING)]
    for name in names:
        (tmp_path / name).mkdir()
        for i in range(1, demo.PHOTOS + 1):
            (tmp_path / name / f"{name}_{i:04d}.png").touch()
    (tmp_path / "pairs.txt").write_text("".join(demo.pairs_by_people(names)))
    return read_pairs(tmp_path)


def test_folds_are_of_different_people(pairs):
    people = np.array([path.split("/")[0] for path in pairs.paths])[pairs.pairs]
    of_fold = [set(people[pairs.folds == fold].ravel()) for fold in range(demo.FOLDS)]
    assert len(set.union(*of_fold)) == sum(map(len, of_fold)) == demo.PEOPLE - demo.TRAINING


def test_a_fold_has_every_genuine_pair_and_as_many_impostor_pairs(pairs):
    assert len({tuple(sorted(pair)) for pair in pairs.pairs.tolist()}) == len(pairs.pairs)   # none comes twice
    size = (demo.PEOPLE - demo.TRAINING) // demo.FOLDS * demo.PHOTOS * (demo.PHOTOS - 1) // 2
    for kind in (pairs.same, ~pairs.same):
        assert np.bincount(pairs.folds, kind).tolist() == demo.FOLDS * [size]


def test_without_the_package_one_sentence_says_what_to_do(monkeypatch):
    monkeypatch.setattr(demo.metadata, "files", lambda _: [])
    with pytest.raises(InputError, match="make demo"):
        demo.find_photos()
