"""reproduce.py: a run that is stopped and continued ends with the table; what it does with photos; mistakes."""
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time

import cv2
import pytest
from conftest import ROOT, draw_face, write_image

from faces.align import align
from faces.landmarks import write_landmarks
from tools import reproduce

pytest_plugins = "helpers"
# 4 steps, with a checkpoint of 180 MB after each, so that there is time to interrupt the run after the first.
OPTIONS = "--batch-size 12 --epochs 1 --checkpoint-minutes 0 --device cpu --precision float32".split()


def write_bin(file):
    """Write 20 pairs of 20 aligned faces: for each of 10 people a genuine pair, and an impostor pair with the next."""
    faces = [[cv2.imencode(".png", align(*draw_face(50 + person, i)))[1].tobytes() for i in (0, 1)]
             for person in range(10)]
    images = [image for p in range(10) for image in (*faces[p], faces[p][0], faces[(p + 1) % 10][1])]
    file.write_bytes(pickle.dumps((images, [True, False] * 10), 2))
    return file


def write_photos(root, people, pairs=False):
    """Write photos that are not aligned, as NAME/NAME_0001.png, and perhaps a pairs.txt with two folds."""
    for person in range(people):
        for i in (1, 2):
            write_image(root / f"P{person}/P{person}_{i:04d}.png", draw_face(person, i)[0])
    if pairs:
        (root / "pairs.txt").write_text("2 1\nP0 1 2\nP0 1 P1 1\nP1 1 2\nP0 2 P1 2\n")
    return root


def test_a_run_that_is_stopped_continues_and_ends_with_the_table(casia, tmp_path, call):
    """The first session is stopped in the training of the second method; what was finished before is not done again."""
    out, errors = tmp_path / "out", tmp_path / "errors"
    args = ["--casia", casia, "--lfw", write_bin(tmp_path / "test.bin"), "--output", out, "--cache", tmp_path / "cache",
            *OPTIONS]
    with open(errors, "w") as file:
        first = subprocess.Popen([sys.executable, "tools/reproduce.py", *map(str, args)], cwd=ROOT, text=True,
                                 stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "2"})
        while not (out / "sphereFace/checkpoint.pt").exists() and first.poll() is None:
            time.sleep(0.02)
        first.send_signal(signal.SIGTERM)
        first.wait(600)
    output = errors.read_text()
    assert first.returncode == 143 and "repeat the command that you typed" in output, output
    assert re.search(r"stopped after \d+ of 4 steps", output)
    assert "| CosFace | faceNet |" in (out / "results.md").read_text()
    finished = [out / "cosFace/checkpoint.pt", out / "cosFace/lfw/results.json"]
    before = [file.stat().st_mtime_ns for file in finished]

    status, printed, _ = call(reproduce, *args)
    assert status == 0 and [file.stat().st_mtime_ns for file in finished] == before
    table = (out / "results.md").read_text()
    assert table in printed
    accuracy = json.loads((out / "sphereFace/lfw/results.json").read_text())["accuracy"]
    assert f"| SphereFace | faceNet | {accuracy:.4f} (std " in table
    assert table.count("| - | 48 of 6 people |") == 2    # no names, so no rank 1
    assert "only 10 impostor pairs" in table and "20 pairs of 20 images" in table
    for method in ("cosFace", "sphereFace"):
        assert re.search(rf"^    python {method}/casia_train.py .*--batch-size 12 .*--resume auto$", table, re.M)


def plan(*args, monkeypatch):
    """Return the commands that reproduce.py would run, without `python`, as text."""
    words = []
    monkeypatch.setattr(reproduce, "run", lambda command: words.append(command) or 0)
    monkeypatch.setattr(reproduce, "render", lambda *_: "")
    monkeypatch.setattr(sys, "argv", ["reproduce.py"])
    reproduce.main(list(map(str, args)))
    return [" ".join(command).replace(f"{ROOT}{os.sep}", "") for command in words]


def test_landmarks_are_found_only_for_photos_without_a_list(tmp_path, monkeypatch):
    casia, lfw = write_photos(tmp_path / "casia", 3), write_photos(tmp_path / "lfw", 2, pairs=True)
    args = ["--casia", casia, "--lfw", lfw, "--output", tmp_path / "o", "--batch-size", 2]
    commands = plan(*args, "--processes", 2, monkeypatch=monkeypatch)
    assert commands[:2] == [f"mtcnn/casia_landmark.py --casia {casia}", f"mtcnn/lfw_landmark.py --lfw {lfw}"]
    assert "--nproc-per-node 2 cosFace/casia_train.py" in commands[2] and "sphereFace/casia_train.py" in commands[4]
    assert "--protocol folds tar identification --output" in commands[5]

    write_landmarks(casia / "casia_landmark.txt", [(f"P{p}/P{p}_0001.png", p, draw_face(p, 1)[1]) for p in range(3)])
    commands = plan(*args, "--lfw-landmarks", "my_list.txt", monkeypatch=monkeypatch)
    assert [line.split()[0] for line in commands] == ["cosFace/casia_train.py", "cosFace/lfw_eval.py",
                                                      "sphereFace/casia_train.py", "sphereFace/lfw_eval.py"]
    assert "--landmarks my_list.txt" in commands[1]


@pytest.mark.parametrize("options, message", [
    (["--casia", "nowhere"], "nowhere does not exist"), (["--lfw", "nowhere"], "nowhere does not exist"),
    (["--lr", "-1"], "--lr"), (["--bach-size", "3"], "--bach-size"), (["--margin-warmup", "3"], "--margin-warmup")])
def test_a_mistake_is_reported_before_anything_runs(options, message, tmp_path, call):
    sets = ["--casia", write_photos(tmp_path / "casia", 3), "--lfw", write_photos(tmp_path / "lfw", 2, pairs=True)]
    status, _, err = call(reproduce, *sets, "--output", tmp_path / "out", "--device", "cpu", *options)
    assert status == 2 and message in err and not (tmp_path / "out/cosFace").exists()
