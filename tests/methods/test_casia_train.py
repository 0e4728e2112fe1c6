"""casia_train.py learns, resumes exactly after a kill, and explains what is wrong with its input."""
import json
import os
import pickle
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, assert_same_model, draw_face, options, script, tensors, torchrun, write_image

from cosFace.net import faceNet
from faces.landmarks import write_landmarks
from faces.verification.evaluate import evaluate
from faces.verification.lfw import load_lfw
from faces.verification.weights import load_weights
from sphereFace.net import SphereFace


def interrupt(method, args, number, checkpoint, step):
    """Start training and send it a signal once its checkpoint is at or beyond a step; return the exit status."""
    process = subprocess.Popen([sys.executable, "casia_train.py", *map(str, args)], cwd=ROOT / method,
                               env={**os.environ, "OMP_NUM_THREADS": "2"},
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        if checkpoint.exists() and torch.load(checkpoint, weights_only=True)["step"] >= step:
            process.send_signal(number)
            break
        time.sleep(0.05)
    output, _ = process.communicate(timeout=200)
    return process.returncode, output.decode()


@pytest.mark.parametrize("method", ["cosFace", "sphereFace"])
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(method, casia, tmp_path):
    calm = script(f"{method}/casia_train.py", *options(casia, tmp_path, "calm"))
    assert calm.returncode == 0, calm.stderr
    expected = torch.load(tmp_path / "calm/checkpoint.pt", weights_only=True)

    args, checkpoint = options(casia, tmp_path), tmp_path / "run/checkpoint.pt"
    status, _ = interrupt(method, args, signal.SIGKILL, checkpoint, 2)
    assert status == -signal.SIGKILL
    status, output = interrupt(method, [*args, "--resume"], signal.SIGTERM, checkpoint, 6)
    assert status == 0 and "stopped after" in output, output                # clusters send SIGTERM: saved, no failure
    last = script(f"{method}/casia_train.py", *args, "--resume", from_root=True)
    assert last.returncode == 0, last.stderr
    state = torch.load(checkpoint, weights_only=True)

    assert state["step"] == expected["step"] == 12
    got, want = tensors(state), tensors(expected)
    assert got.keys() == want.keys() and len(want) > 150
    different = [name for name in want if not torch.equal(got[name], want[name])]
    assert not different
    epochs = [json.loads(line) for line in (tmp_path / "run/epochs.jsonl").read_text().splitlines()]
    assert [line["step"] for line in epochs] == [6, 12] and epochs[1]["loss"] < epochs[0]["loss"]
    assert list((tmp_path / "run").glob("events.out.tfevents.*")) and (tmp_path / "run/training.png").exists()
    assert json.loads((tmp_path / "run/settings.json").read_text())["settings"]["batch_size"] == 8


def fails(main, *args, method="cosFace"):
    """Run and return the one sentence it fails with."""
    status, output = main(method, *args)
    last = output.err.replace("\r", "\n").strip().splitlines()[-1]
    assert status == 2 and "Traceback" not in output.err
    return last


def test_bad_input_is_one_sentence(main, casia, tmp_path):
    common = ["--cache", tmp_path / "cache", "--output", tmp_path / "run", "--device", "cpu"]
    (tmp_path / "empty").mkdir()
    assert "does not exist" in fails(main, "--casia", tmp_path / "absent", *common)
    assert "expected person folders" in fails(main, "--casia", tmp_path / "empty", *common)
    assert "can't read the landmark list" in fails(main, "--casia", casia, "--landmarks", tmp_path / "no.txt", *common)
    assert "larger than the set of 48 faces" in fails(main, "--casia", casia, "--batch-size", "49", *common)
    assert "--device cuda:99 is not available" in fails(main, "--casia", casia, *common[:4], "--device", "cuda:99")
    (tmp_path / "no.zip").write_bytes(b"PK\x03\x04 not really")
    assert "is not a zip" in fails(main, "--casia", tmp_path / "no.zip", *common)
    assert not (tmp_path / "run/checkpoint.pt").exists()


class Malice:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


def test_a_run_is_never_overwritten_or_resumed_by_mistake(main, casia, tmp_path):
    args = [*options(casia, tmp_path)[:-1], "bf16", "--epochs", "0.4"]
    assert "can't read" in fails(main, *args, "--resume")                                   # nothing there yet
    assert main("cosFace", *args)[0] == 0
    assert "already holds a run" in fails(main, *args)
    assert "was trained with --seed 0" in fails(main, *args, "--resume", "--seed", "1")
    checkpoint = tmp_path / "run/checkpoint.pt"
    torch.save({"weights": {}}, checkpoint)
    assert "not a training checkpoint" in fails(main, *args, "--resume")
    checkpoint.write_bytes(pickle.dumps(Malice(tmp_path / "malice")))
    assert "not a checkpoint that can be loaded safely" in fails(main, *args, "--resume")
    assert not (tmp_path / "malice").exists()


def test_training_stops_before_saving_a_loss_that_is_not_finite(main, casia, tmp_path):
    message = fails(main, *options(casia, tmp_path), "--net", "sphere20a", "--lr", "1e30", method="sphereFace")
    assert "the loss is not finite" in message
    path = tmp_path / "run/checkpoint.pt"
    saved = tensors(torch.load(path, weights_only=True)) if path.exists() else {}
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())


def test_lfw_accuracy_after_an_epoch_equals_lfw_eval(main, casia, tmp_path):
    rows = []
    for person in "ABCD":
        for photo in (1, 2):
            image, points = draw_face(ord(person), photo)
            name = f"{person}/{person}_{photo:04d}.jpg"
            write_image(tmp_path / "lfw" / name, image)
            rows.append((name, points))
    write_landmarks(tmp_path / "list.txt", rows)
    (tmp_path / "lfw/pairs.txt").write_text("2\t1\nA\t1\t2\nA\t1\tB\t1\nC\t1\t2\nC\t1\tD\t1\n")
    status, _ = main("cosFace", *options(casia, tmp_path), "--epochs", "0.4", "--lfw", tmp_path / "lfw",
                     "--lfw-landmarks", tmp_path / "list.txt")
    line, = (json.loads(line) for line in (tmp_path / "run/epochs.jsonl").read_text().splitlines())
    net = faceNet()
    load_weights(net, tmp_path / "run/checkpoint.pt")
    lfw = load_lfw(tmp_path / "lfw", landmarks=tmp_path / "list.txt")
    assert status == 0 and line["lfw"] == round(evaluate(net, lfw, "cpu", progress=False).accuracy, 5)


def test_gradient_accumulation_equals_the_whole_batch(main, casia, tmp_path):
    """Without batch normalization, which sees each part by itself."""
    args = ["--net", "sphere20a", "--epochs", "0.34"]
    assert main("sphereFace", *options(casia, tmp_path, "one"), *args)[0] == 0
    assert main("sphereFace", *options(casia, tmp_path, "parts"), *args, "--accumulate", "4")[0] == 0
    one, _ = assert_same_model(tmp_path / "one", tmp_path / "parts")
    assert one["step"] == 2
    whole, parts = (json.loads((tmp_path / run / "epochs.jsonl").read_text()) for run in ("one", "parts"))
    assert whole["loss"] == pytest.approx(parts["loss"], rel=1e-5) and whole["accuracy"] == parts["accuracy"]
    assert "can't be split into 3 micro-batches" in fails(main, *options(casia, tmp_path), "--accumulate", "3")
    assert "can't be split into 0 micro-batches" in fails(main, *options(casia, tmp_path), "--accumulate", "0")
    assert "can't be combined" in fails(main, *options(casia, tmp_path), "--accumulate", "2",
                                             "--sample-centers", "0.5")


def test_sphereface_r_is_selected_with_scale(main, casia, tmp_path):
    args = [*options(casia, tmp_path), "--epochs", "0.34", "--margin", "1.5"]
    status, output = main("sphereFace", *args)
    assert status == 2 and "--margin must be 1, 2, 3, 4 or 5; with --scale" in output.err
    assert main("sphereFace", *args, "--scale", "30")[0] == 0
    epoch = json.loads((tmp_path / "run/epochs.jsonl").read_text())
    assert 18 < epoch["loss"] < 30      # at right angles: 30 (cos 90 - cos 135) = 21 more than plain softmax


@pytest.mark.parametrize("minimum, reached", [([], 5), (["--lambda-min", "1"], 1)])
def test_the_head_gets_lambda_min(main, casia, tmp_path, monkeypatch, minimum, reached):
    annealing, forward, seen = SphereFace.annealing, SphereFace.forward, []

    def late(step, *minimum):
        return annealing(step + 10**6, *minimum)

    def look(head, embedding, label, lam):
        seen.append(lam)
        return forward(head, embedding, label, lam)
    monkeypatch.setattr(SphereFace, "annealing", late)
    monkeypatch.setattr(SphereFace, "forward", look)
    args = [*options(casia, tmp_path), "--net", "sphere20a", "--epochs", "0.17", *minimum]
    assert main("sphereFace", *args)[0] == 0 and seen == [reached]


def test_two_processes_train_the_same_model_as_one(casia, tmp_path):
    """Two processes see the batch of one, halved and each half in two parts, and end with one model between them."""
    args = [*options(casia, tmp_path), "--net", "sphere20a", "--epochs", "0.5", "--no-mirror"]
    single = script("cosFace/casia_train.py", *args[:5], tmp_path / "one", *args[6:])
    assert single.returncode == 0, single.stderr
    double = torchrun("cosFace", *args, "--accumulate", "2")
    assert double.returncode == 0, double.stderr
    assert_same_model(tmp_path / "one", tmp_path / "run")
