"""The demo: its pairs are balanced, and the command that it prints gives a verdict."""
import importlib
import shlex

import numpy as np
from conftest import run_lfw_eval, write_model

from faces.verification.pairs import read_pairs
from tools import compare, demo

pytest_plugins = "helpers"
FAST = ("mtcnn.lfw_landmark", "tools.export")


def test_pairs_are_balanced_and_no_person_is_in_two_folds(tmp_path):
    names = [f"Person_{i}" for i in range(demo.TEST_PEOPLE)]
    for name in names:
        (tmp_path / name).mkdir()
        for i in range(1, demo.PHOTOS_PER_PERSON + 1):
            (tmp_path / name / f"{name}_{i:04d}.png").touch()
    (tmp_path / "pairs.txt").write_text("".join(demo.make_pairs(names)))
    pairs = read_pairs(tmp_path)
    people = np.array([path.split("/")[0] for path in pairs.paths])[pairs.pairs]
    people_of_fold = [set(people[pairs.folds == fold].ravel()) for fold in range(demo.FOLDS)]
    assert len(set.union(*people_of_fold)) == sum(map(len, people_of_fold)) == demo.TEST_PEOPLE
    expected = demo.TEST_PEOPLE // demo.FOLDS * demo.PHOTOS_PER_PERSON * (demo.PHOTOS_PER_PERSON - 1) // 2
    for kind in (pairs.same, ~pairs.same):
        assert np.bincount(pairs.folds, kind).tolist() == demo.FOLDS * [expected]


def test_the_command_that_it_prints_gives_a_verdict(photos, tmp_path, monkeypatch, capsys, call):
    def run(words):
        name = words[0].relative_to(demo.ROOT).with_suffix("").as_posix().replace("/", ".")
        if name == "cosFace.casia_train":
            write_model(tmp_path / "a demo/run/checkpoint.pt")
        if name == "cosFace.lfw_eval":
            return run_lfw_eval(capsys, *words[1:])[0]
        return name in FAST and call(importlib.import_module(name), *words[1:])[0]
    for name, value in {"DEMO": tmp_path / "a demo", "PEOPLE": 6, "TRAINING_PEOPLE": 2, "TEST_PEOPLE": 4, "FOLDS": 2,
                        "PHOTOS_PER_PERSON": 2, "run": run,
                        "find_photos": lambda: 6 * [[photos / "face.png", photos / "brighter.png"]]}.items():
        monkeypatch.setattr(demo, name, value)
    words = shlex.split(call(demo)[1].splitlines()[-1])
    assert words[:2] == ["python", "tools/compare.py"]
    out = call(compare, *words[2:])[1]
    assert "same person" in out and "expected errors at this threshold, from 8 pairs of orl:" in out
