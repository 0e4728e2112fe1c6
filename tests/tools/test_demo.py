"""The demo's pairs.txt: the LFW reader accepts it, the folds share no people, and every fold is balanced."""
import numpy as np

from faces.verification.pairs import open_images, read_pairs
from tools import demo


def test_pairs_are_balanced_and_no_person_is_in_two_folds(tmp_path):
    names = [f"Person_{i}" for i in range(demo.TEST_PEOPLE)]
    for name in names:
        (tmp_path / name).mkdir()
        for i in range(1, demo.PHOTOS_PER_PERSON + 1):
            (tmp_path / name / f"{name}_{i:04d}.png").touch()
    (tmp_path / "pairs.txt").write_text("".join(demo.make_pairs(names)))
    pairs = read_pairs(open_images(tmp_path))
    people = np.array([path.split("/")[0] for path in pairs.paths])[pairs.pairs]
    people_of_fold = [set(people[pairs.folds == fold].ravel()) for fold in range(demo.FOLDS)]
    assert len(set.union(*people_of_fold)) == sum(map(len, people_of_fold)) == demo.TEST_PEOPLE
    expected = demo.TEST_PEOPLE // demo.FOLDS * demo.PHOTOS_PER_PERSON * (demo.PHOTOS_PER_PERSON - 1) // 2
    for kind in (pairs.same, ~pairs.same):
        assert np.bincount(pairs.folds, kind).tolist() == demo.FOLDS * [expected]
