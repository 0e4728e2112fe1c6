"""The demo: the command that it prints gives a verdict."""
import importlib
import shlex

from conftest import run_lfw_eval, write_model

from tools import compare, demo

FAST = ("mtcnn.lfw_landmark", "tools.export")


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
