"""reproduce.py: a run that is stopped and continued ends with the table; published values; photos; mistakes."""
import json
import os
import pickle
import re
import runpy
import signal
import sys
from pathlib import Path

import pytest
from conftest import ROOT, draw_face, encoded_pairs, write_lfw, write_people

from faces.landmarks import write_landmarks
from tools import reproduce


@pytest.fixture
def photos(tmp_path):
    """Return folders of photos that are not aligned, NAME/NAME_0001.png, like CASIA and like LFW."""
    write_people(tmp_path / "casia", range(3), 2)
    write_lfw(tmp_path / "lfw")
    (tmp_path / "bins").mkdir()
    for name in ("lfw.bin", "cfp_fp.bin", "train.rec"):    # as in faces_webface_112x112
        (tmp_path / "bins" / name).touch()
    return tmp_path / "casia", tmp_path / "lfw"


def test_a_run_that_is_stopped_continues_and_ends_with_the_table(casia, tmp_path, call, monkeypatch):
    """The first session is stopped in the training of the second method; what was finished before is not done again."""
    out, typed = tmp_path / "out", []

    def run(words):    # in this process, which saves the time of starting others
        typed.append("/".join(Path(words[0]).parts[-2:]))
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(words[0]), run_name="__main__")
        return 143 if typed == first else end.value.code or 0
    monkeypatch.setattr(reproduce, "run", run)
    first = ["cosFace/casia_train.py", "cosFace/lfw_eval.py", "sphereFace/casia_train.py"]
    (tmp_path / "test.bin").write_bytes(pickle.dumps((encoded_pairs(10), [True, False] * 10), 2))
    args = ["--casia", casia, "--lfw", tmp_path / "test.bin", "--output", out, "--cache", tmp_path / "cache",
            *"--batch-size 12 --epochs 0.25 --device cpu --precision float32".split()]
    assert call(reproduce, *args)[0] == 143 and typed == first
    assert "| CosFace | faceNet |" in (out / "results.md").read_text()
    finished = [out / "cosFace/checkpoint.pt", out / "cosFace/lfw/results.json"]
    before = [file.stat().st_mtime_ns for file in finished]

    status, printed, _ = call(reproduce, *args)
    assert status == 0 and [file.stat().st_mtime_ns for file in finished] == before
    assert typed[3:] == ["cosFace/casia_train.py", "sphereFace/casia_train.py", "sphereFace/lfw_eval.py"]
    table = (out / "results.md").read_text()
    assert table in printed
    accuracy = json.loads((out / "sphereFace/lfw/results.json").read_text())["accuracy"]
    assert f"| SphereFace | faceNet | {accuracy:.4f} (std " in table
    assert table.count("| - | 12 of 6 people |") == 2    # no names, so no rank 1
    assert "only 10 impostor pairs" in table and "20 pairs of 20 images" in table
    assert re.search(r"^    python sphereFace/casia_train.py .*--batch-size 12 .*--resume auto$", table, re.M)


@pytest.mark.parametrize("accuracy, run, said, blamed", [
    (0.9913, {}, "| 0.9913 to 0.9930 | overlaps |", False), (0.9934, {}, "| 0.9913 to 0.9930 | overlaps |", False),
    (0.9907, {}, "| 0.9913 to 0.9930 | is below |", False), (0.9936, {}, "| 0.9913 to 0.9930 | is above |", False),
    (0.9250, {"set": "CFP-FP"}, "| AdaFace, neighbor: IR-18 | 0.9259 | is below |", False),
    (0.98, {"set": "photos"}, "no published value", False), (0.98, {"set": "lfw_funneled"}, "is below", True),
    (0.98, {"step": 1_000}, "is below", False), (0.98, {"classes": 3_141}, "set has 3,141 people", False)])
def test_results_are_compared_with_published_ones_and_only_a_full_run_is_blamed(accuracy, run, said, blamed):
    state = {"method": "SphereFace", "step": 28_000, "classes": 10_575, "settings": {"batch_size": 512}, **run}
    result = {"accuracy": accuracy, "interval_95": [accuracy - 0.0005, accuracy + 0.0005], **run}
    text = "\n".join(reproduce.compare(state, result))
    assert said in text and ("channel order" in text) == blamed and "CosFace" not in text


def test_a_command_gets_the_signal_and_is_waited_for(tmp_path):
    (tmp_path / "script.py").write_text(
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (open(sys.argv[1], 'w'), sys.exit(1)))\n"
        "os.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(60)\n")
    assert reproduce.run([tmp_path / "script.py", tmp_path / "saved"]) == 128 + signal.SIGTERM
    assert (tmp_path / "saved").exists()


def test_landmarks_are_found_only_for_photos_without_a_list(photos, tmp_path, call, monkeypatch):
    (casia, lfw), commands, here = photos, [], f"{ROOT}{os.sep}"
    monkeypatch.setattr(reproduce, "run", lambda words: commands.append(" ".join(map(str, words)).replace(here, "")))
    monkeypatch.setattr(reproduce, "render", lambda *_: "")
    args = ["--casia", casia, "--lfw", lfw, "--output", tmp_path / "o", "--batch-size", 2]
    call(reproduce, *args, "--processes", 2)
    assert commands[:2] == [f"mtcnn/casia_landmark.py --casia {casia}", f"mtcnn/lfw_landmark.py --lfw {lfw}"]
    assert "--nproc-per-node 2 cosFace/casia_train.py" in commands[2]
    assert "--protocol folds tar identification --output" in commands[5]

    write_landmarks(casia / "casia_landmark.txt", [(f"P{p}/P{p}_0001.png", p, draw_face(p, 1)[1]) for p in range(3)])
    call(reproduce, *args, "--lfw-landmarks", "my_list.txt")
    assert [line.split()[0] for line in commands[6:]] == [
        "cosFace/casia_train.py", "cosFace/lfw_eval.py", "sphereFace/casia_train.py", "sphereFace/lfw_eval.py"]
    assert "--landmarks my_list.txt" in commands[7]


@pytest.mark.parametrize("options, message", [
    (["--casia", "nowhere"], "nowhere does not exist"), (["--lfw", "nowhere"], "nowhere does not exist"),
    (["--lfw", "bins"], "bins holds 2 sets; pass one of them, such as "),
    (["--bach-size", "3"], "--bach-size"), (["--margin-warmup", "3"], "--margin-warmup")])
def test_a_mistake_is_reported_before_anything_runs(options, message, photos, tmp_path, refusal, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sets = ["--casia", photos[0], "--lfw", photos[1]]
    assert message in refusal(reproduce, *sets, "--output", tmp_path / "out", "--device", "cpu", *options)
    assert not (tmp_path / "out/cosFace").exists()
