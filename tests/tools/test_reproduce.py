"""tools/reproduce.py on a small RecordIO set and a .bin set; what it does with photos; and mistakes in its options."""
import functools
import itertools
import json
import operator
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import cv2
import pytest
from conftest import ROOT, draw_face, write_image

from faces.align import align
from faces.files import InputError
from faces.landmarks import write_landmarks
from tools import commands, reproduce, reproduce_table, sessions
from tools.sessions import Journal

# 6 steps, with a checkpoint of 180 MB after each, so that there is time to interrupt the run after the first.
OPTIONS = ["--batch-size", "2", "--epochs", "1", "--checkpoint-every", "1", "--device", "cpu", "--precision", "float32"]


def png(image):
    return cv2.imencode(".png", image[..., ::-1])[1].tobytes()


def write_recordio(root):
    """Write 12 aligned faces of 3 people as train.rec, train.idx and property."""
    root.mkdir()
    with open(root / "train.rec", "wb") as file, open(root / "train.idx", "w") as index:
        for key in range(12):
            data = struct.pack("<IfQQ", 0, key // 4, key, 0) + png(align(*draw_face(key // 4, key % 4)))
            index.write(f"{key}\t{file.tell()}\n")
            file.write(struct.pack("<II", 0xCED7230A, len(data)) + data + b"\0" * (-len(data) % 4))
    (root / "property").write_text("3,112,96\n")
    return root


def write_bin(path):
    """Write 20 pairs of 20 aligned faces: for each of 10 people a genuine pair, and an impostor pair with the next."""
    faces = [[png(align(*draw_face(50 + person, i))) for i in (0, 1)] for person in range(10)]
    images = [image for p in range(10) for image in (*faces[p], faces[p][0], faces[(p + 1) % 10][1])]
    path.write_bytes(pickle.dumps((images, [True, False] * 10), 2))
    return path


def write_photos(root, people, photos=2, pairs=False):
    """Write photos that are not aligned, as NAME/NAME_0001.png, and perhaps a pairs.txt with two folds."""
    for person in range(people):
        for i in range(1, photos + 1):
            write_image(root / f"P{person}/P{person}_{i:04d}.png", draw_face(person, i)[0])
    if pairs:
        (root / "pairs.txt").write_text("2 1\nP0 1 2\nP0 1 P1 1\nP1 1 2\nP0 2 P1 2\n")
    return root


def test_a_run_that_is_stopped_continues_and_ends_with_the_table(tmp_path, monkeypatch, capfd):
    """The first session is stopped in the training of the second method; what was finished before is not done again."""
    write_recordio(tmp_path / "set")
    write_bin(tmp_path / "test.bin")
    out = tmp_path / "out"
    args = list(map(str, ["--casia", tmp_path / "set", "--lfw", tmp_path / "test.bin", "--output", out, "--cache",
                          tmp_path / "cache", *OPTIONS]))
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.chdir(ROOT)
    first = subprocess.Popen([sys.executable, "tools/reproduce.py", *args], text=True, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE)
    while not (out / "sphereFace/checkpoint.pt").exists() and first.poll() is None:
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)
    output, errors = first.communicate(timeout=600)
    assert first.returncode == 143 and "repeat the command that you typed" in errors, errors
    assert re.search(r"stopped after \d+ of 6 steps", output)
    assert "| CosFace | faceNet |" in (out / "results.md").read_text()
    finished = [out / "cosFace/checkpoint.pt", out / "cosFace/lfw/results.json"]
    before = [path.stat().st_mtime_ns for path in finished]

    assert reproduce.main(args) == 0
    assert [path.stat().st_mtime_ns for path in finished] == before
    table = (out / "results.md").read_text()
    assert table in capfd.readouterr().out
    accuracy = json.loads((out / "sphereFace/lfw/results.json").read_text())["accuracy"]
    assert f"| SphereFace | faceNet | {accuracy:.4f} (std " in table
    assert table.count("| 12 (1.0 epochs, 3 people) |") == 2 and table.count("| - |") == 2    # no names, so no rank 1
    assert "only 10 impostor pairs" in table and "20 pairs of 20 images" in table
    sessions = dict(re.findall(r"^\| (\w+, \w+) \| [\w ]+ \| (\d+) \|$", table, re.M))
    assert sessions == {"training, cosFace": "1", "evaluation, cosFace": "1", "training, sphereFace": "2",
                        "evaluation, sphereFace": "1"}
    for method in ("cosFace", "sphereFace"):
        assert re.search(rf"^    python {method}/casia_train.py .*--batch-size 2 .*--resume auto$", table, re.M)

    with pytest.raises(InputError, match="was started with"):
        Journal(out, tmp_path / "set", ["--batch-size", "8"])


SETTINGS = {"recipe": {"batch_size": 2, "steps_per_epoch": 6}, "device": "CPU", "precision": "float32", "git": None,
            "versions": {"python": "3", "torch": "2", "opencv": "4\n\x1b[2J"}}
RESULTS = {"accuracy": 0.9, "std": 0.1, "interval_95": [0.8, 1.0], "identification": None,
           "tar": [{"far": 1e-3, "tar": 0.5, "impostors": 10, "resolved": False}],
           "counts": {"pairs": 20, "images": 20},
           "settings": {"lfw": "a\nb", "net": "face|Net", "landmarks": "none", "weights": {"fingerprint": "1"}}}


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """Replace the commands by ones that only write their JSON files; return the arguments of reproduce.main()."""
    def run(words):
        folder = tmp_path / "out" / Path(words[1]).parent.name
        training = words[1].endswith("casia_train.py")
        sessions.write_json(folder / ("settings.json" if training else "lfw/results.json"),
                            SETTINGS if training else RESULTS)
        return 0
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(commands, "run", run)
    versions = itertools.count()    # of the checkpoint, as if each command had made steps
    monkeypatch.setattr(sessions, "version", lambda _: next(versions))
    monkeypatch.setattr(sessions, "load_net", lambda *_: (None, {"fingerprint": "1"}))
    monkeypatch.setattr(reproduce_table.checkpoint, "load", lambda _: {"step": 6, "classes": 3})
    return list(map(str, ["--casia", write_recordio(tmp_path / "set"), "--lfw", write_bin(tmp_path / "test.bin"),
                          "--output", tmp_path / "out", *OPTIONS]))


def test_texts_from_files_can_not_change_the_table_or_the_terminal(quick, tmp_path, capsys):
    assert reproduce.main(quick) == 0
    table = (tmp_path / "out/results.md").read_text()
    assert table in capsys.readouterr().out and "\x1b" not in table
    for text in (r"| CosFace | face\|Net | 0.9000", r"OpenCV 4\n\x1b[2J", r"- test set: a\nb, 20 pairs"):
        assert text in table


@pytest.mark.parametrize("file, keys, value, advice", [
    *[("sessions.json", keys, value, "delete it, which only forgets how long stages took") for keys, value in (
        (["sessions"], {}), (["sessions"], ""), (["casia"], 5), (["options"], "x"), (["sessions", 0, "seconds"], "x"),
        (["sessions", 0, "seconds"], float("inf")), (["sessions", 0, "cpu"], [5]), (["sessions", 0, "run"], {}),
        (["sessions", 0, "run"], "x"), (["sessions", 0, "run", "git"], 5), (["sessions", 0, "command"], None))],
    *[("sphereFace/settings.json", keys, value, "delete the folder") for keys, value in (
        (["recipe"], {}), (["recipe", "steps_per_epoch"], 0), (["versions"], None), ([], {}), ([], []), ([], None))],
    *[("sphereFace/lfw/results.json", keys, value, "delete it, and the evaluation is repeated") for keys, value in (
        (["counts"], None), (["accuracy"], "x"), (["tar"], []), (["tar", 0, "tar"], float("inf")),
        (["interval_95"], [0.5]), (["identification"], {}), (["settings", "lfw"], 5), (["tar", 0], []))]])
def test_a_damaged_file_is_named_and_the_table_stays(file, keys, value, advice, quick, tmp_path, capsys, monkeypatch):
    """The file is damaged after a complete reproduction, which is then repeated; None at the top deletes it."""
    reproduce.main(quick)
    path, table = tmp_path / "out" / file, (tmp_path / "out/results.md").read_text()
    content = [json.loads(path.read_text())]
    *outer, last = [0, *keys]
    functools.reduce(operator.getitem, outer, content)[last] = value
    path.unlink()
    if content != [None]:
        path.write_text(json.dumps(*content))

    monkeypatch.setattr(commands, "run", lambda words: 0)    # nothing is left to do
    with pytest.raises(SystemExit) as stop:
        reproduce.main(quick)
    errors = capsys.readouterr().err
    assert stop.value.code == 2 and str(path) in errors and "damaged" in errors and advice in errors
    assert (tmp_path / "out/results.md").read_text() == table


def test_a_run_may_be_continued_from_another_folder(quick, tmp_path, monkeypatch, capsys):
    assert reproduce.main(quick) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(sessions, "version", lambda _: 0)    # trained no further
    ran = []
    monkeypatch.setattr(commands, "run", lambda words: ran.append(words[1]) or 0)
    assert reproduce.main(quick) == 0
    assert ran == [str(ROOT / method / "casia_train.py") for method in ("cosFace", "sphereFace")]    # they resume


def test_a_deleted_run_is_trained_again(quick, tmp_path, monkeypatch):
    """As the message about a damaged settings.json advises."""
    reproduce.main(quick)
    shutil.rmtree(tmp_path / "out/sphereFace")

    def load_net(path, _):
        if not path.exists():
            raise InputError("no checkpoint")
        return None, {"fingerprint": "1"}
    monkeypatch.setattr(sessions, "load_net", load_net)
    assert reproduce.main(quick) == 0 and (tmp_path / "out/sphereFace/lfw/results.json").exists()


def plan(*args):
    """Return the commands that reproduce.py would run, without `python`, as text."""
    return [commands.printed(stage.words[1:]) for stage in reproduce.plan(*reproduce.parse_args(list(map(str, args))))]


def test_landmarks_are_found_only_for_photos_without_a_list(tmp_path):
    casia, lfw, out = write_photos(tmp_path / "casia", 3), write_photos(tmp_path / "lfw", 2, pairs=True), tmp_path / "o"
    options = ["--casia", casia, "--lfw", lfw, "--output", out, "--batch-size", 2, "--processes", 1]
    commands = plan(*options)
    assert commands[:2] == [f"mtcnn/casia_landmark.py --casia {casia} --output {out}/casia_landmark.txt",
                            f"mtcnn/lfw_landmark.py --lfw {lfw} --output {out}/lfw_landmark.txt"]
    assert f"--landmarks {out}/casia_landmark.txt" in commands[2] and commands[4].startswith("sphereFace/casia_train")
    assert f"--landmarks {out}/lfw_landmark.txt --protocol folds tar identification" in commands[5]

    write_landmarks(casia / "casia_landmark.txt", [(f"P{p}/P{p}_0001.png", p, draw_face(p, 1)[1]) for p in range(3)])
    commands = plan(*options, "--lfw-landmarks", "my_list.txt")
    assert [line.split()[0] for line in commands] == ["cosFace/casia_train.py", "cosFace/lfw_eval.py",
                                                      "sphereFace/casia_train.py", "sphereFace/lfw_eval.py"]
    assert "--landmarks my_list.txt" in commands[1] and "--landmarks" not in commands[0].replace("lfw-landmarks", "")


@pytest.mark.parametrize("options, message", [
    (["--casia", "nowhere"], "nowhere does not exist"),
    (["--lfw", "nowhere"], "nowhere does not exist"),
    (["--lfw", "README.md"], "README.md is refused"),
    (["--batch-size", "500"], "--batch-size 500 is larger than the set"),
    (["--batch-size", "2", "--processes", "4"], "--processes"),
    (["--lr", "-1"], "--lr must be greater than 0")])
def test_a_mistake_is_reported_before_anything_runs(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    sets = ["--casia", write_photos(tmp_path / "casia", 3), "--lfw", write_photos(tmp_path / "lfw", 2, pairs=True)]
    with pytest.raises(InputError, match=message):
        plan(*sets, "--output", tmp_path / "out", "--device", "cpu", "--batch-size", 2, *options)
    assert not (tmp_path / "out").exists()


def test_an_unknown_option_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        plan("--casia", tmp_path, "--lfw", tmp_path, "--bach-size", 3)
    assert "--bach-size" in capsys.readouterr().err
