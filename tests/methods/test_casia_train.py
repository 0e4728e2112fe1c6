"""casia_train.py learns, resumes exactly after being killed, and explains what is wrong with its input."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, assert_same_model, draw_face, options, saved_step, script, tensors, torchrun, write_image

from cosFace.casia_train import parser
from cosFace.net import NETS, sphere20a
from faces.files import locked
from faces.landmarks import write_landmarks
from faces.training.checkpoint import parse_resumed
from faces.verification.embed import embed
from faces.verification.lfw import load_lfw
from faces.verification.metrics import verify
from faces.verification.threshold import choose_threshold, load_threshold
from faces.verification.weights import load_net


def interrupt(method, args, signal_number, folder, step):
    """Start training, and send it a signal once it has saved a checkpoint in its folder that has reached a step; return
    the exit status, and stdout and stderr together."""
    before = saved_step(folder)
    process = subprocess.Popen([sys.executable, "casia_train.py", *map(str, args)], cwd=ROOT / method,
                               env={"OMP_NUM_THREADS": "2", **os.environ},
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 900
    while process.poll() is None and time.monotonic() < deadline:
        if saved_step(folder) >= max(step, before + 1):
            process.send_signal(signal_number)
            break
        time.sleep(0.05)
    output, _ = process.communicate(timeout=900)
    return process.returncode, output.decode()


def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(casia, tmp_path, method="sphereFace"):
    longer = ["--epochs", "3"]    # so that the run does not end before the signal
    uninterrupted = script(f"{method}/casia_train.py", *options(casia, tmp_path, "uninterrupted"), *longer)
    assert uninterrupted.returncode == 0, uninterrupted.stderr
    expected = torch.load(tmp_path / "uninterrupted/checkpoint.pt", weights_only=True)

    args, run = [*options(casia, tmp_path), *longer], tmp_path / "run"
    status, _ = interrupt(method, args, signal.SIGKILL, run, 2)
    assert status == -signal.SIGKILL
    status, output = interrupt(method, [*args, "--resume"], signal.SIGTERM, run, 6)
    assert status == 128 + signal.SIGTERM and "stopped after" in output, output
    last = script(f"{method}/casia_train.py", *args, "--resume", from_root=True)
    assert last.returncode == 0, last.stderr
    actual = torch.load(run / "checkpoint.pt", weights_only=True)

    assert actual["step"] == expected["step"] == 18
    actual, expected = tensors(actual), tensors(expected)
    assert actual.keys() == expected.keys() and len(expected) > 150
    different = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not different
    epochs, undisturbed = ([json.loads(line) for line in (tmp_path / run / "epochs.jsonl").read_text().splitlines()]
                           for run in ("run", "uninterrupted"))
    assert [line["step"] for line in epochs] == [6, 12, 18] and epochs[2]["loss"] < epochs[0]["loss"]
    for line, expected in zip(epochs, undisturbed):    # a resumed run reports the means of whole epochs
        assert (line["loss"], line["train_accuracy"]) == pytest.approx((expected["loss"], expected["train_accuracy"]))
    assert list((tmp_path / "run").glob("events.out.tfevents.*")) and (tmp_path / "run/training.png").exists()
    assert json.loads((tmp_path / "run/settings.json").read_text())["settings"]["batch_size"] == 8


def test_a_run_saves_although_nobody_reads_its_output(casia, tmp_path):
    """Ctrl-C ends `casia_train.py | tee log` at both ends, tee first."""
    process = subprocess.Popen([sys.executable, "tests/training/tiny_train.py", *map(str, options(casia, tmp_path)),
                                "--epochs", "100000", "--checkpoint-minutes", "100"], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)
    while b"training CosFace" not in process.stdout.readline():
        assert process.poll() is None
    process.stdout.close()
    time.sleep(0.5)    # the run goes on without output
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=300) == 128 + signal.SIGINT and saved_step(tmp_path / "run") > 0


def error_of(main, *args, method="cosFace"):
    """Run casia_train.py, which must fail without a traceback; return its error message, the last line of stderr."""
    status, output = main(method, *args)
    last_line = output.err.replace("\r", "\n").strip().splitlines()[-1]
    assert status == 2 and "Traceback" not in output.err
    return last_line


def test_invalid_input_is_explained_in_one_sentence(main, casia, tmp_path):
    common = ["--cache", tmp_path / "cache", "--output", tmp_path / "run", "--device", "cpu"]
    (tmp_path / "empty").mkdir()
    assert "does not exist" in error_of(main, "--casia", tmp_path / "absent", *common)
    assert "has 0 photos of 0 people; pass a folder with" in error_of(main, "--casia", tmp_path / "empty", *common)
    absent = "--landmarks", tmp_path / "absent.txt"
    assert "can't read the landmark list" in error_of(main, "--casia", casia, *absent, *common)
    assert "48 faces are less than a step" in error_of(main, "--casia", casia, "--batch-size", "50", *common)
    assert "--batch-size must be a multiple" in error_of(main, "--casia", casia, "--accumulate", "5", *common)
    assert "must be greater than 0, not -1; --help" in error_of(main, "--casia", casia, "--epochs", "-1", *common)
    assert not (tmp_path / "run/checkpoint.pt").exists()


def test_a_resumed_run_takes_its_options_from_the_checkpoint_and_may_train_longer(main, casia, tmp_path):
    args = options(casia, tmp_path)
    longer = [*options(casia, tmp_path, "longer"), "--net", "sphere20a", "--shift", "1"]
    assert main("cosFace", *longer, "--epochs", "0.5")[0] == 0
    common = [*args[:4], "--output", tmp_path / "longer", "--device", "cpu", "--resume"]
    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "longer").glob("[!.]*")}
    status, output = main("cosFace", *common)
    assert status == 0 and "12 steps" not in output.out and "after 3 steps;" in output.out
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "longer").glob("[!.]*")} == written
    status, output = main("cosFace", *common, "--epochs", "0.67", "--schedule", "cosine")
    assert status == 0 and "after 4 steps;" in output.out
    assert "--epochs is 0.67 from step 3 on; it was 0.5" in output.out
    assert "--schedule is cosine from step 3 on; it was step" in output.out
    assert "was trained with --shift 1" in error_of(main, *common, "--shift", "2")
    assert "is at step 4, beyond the 1 steps of this schedule" in error_of(main, *common, "--epochs", "0.17")
    saved = torch.load(tmp_path / "longer/checkpoint.pt", weights_only=True)["settings"]
    assert (saved["shift"], saved["epochs"], saved["batch_size"]) == (1, 0.67, 8)


def test_init_starts_from_the_network_of_a_run_or_of_public_weights(main, casia, tmp_path):
    torch.manual_seed(1)
    public = {f"module.{name}": tensor for name, tensor in sphere20a().state_dict().items()}
    public["module.conv1_2.bias"] = torch.full((64,), 0.5)     # as public checkpoints have it
    torch.save(public, tmp_path / "public.pth")
    args = ["--epochs", "0.17", "--lr", "1e-12", "--init"]    # without --net, which the files say
    status, output = main("cosFace", *options(casia, tmp_path), *args, tmp_path / "public.pth")
    assert status == 0 and "BGR" in output.err and "(sphere20a, " in output.out and "after 1 step;" in output.out
    trained = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["weights"]
    torch.testing.assert_close(trained["conv1_1.weight"], public["module.conv1_1.weight"].flip(1))
    torch.testing.assert_close(trained["conv1_2.bias"], public["module.conv1_2.bias"])
    assert main("sphereFace", *options(casia, tmp_path, "second"), *args, tmp_path / "run/checkpoint.pt")[0] == 0
    second = torch.load(tmp_path / "second/checkpoint.pt", weights_only=True)["weights"]
    torch.testing.assert_close(second["fc5.weight"], trained["fc5.weight"])
    assert "sphere20a" in error_of(main, *options(casia, tmp_path, "third"), "--init", tmp_path / "public.pth", "--net",
                                   "faceNet")
    args = [*options(tmp_path / "absent", tmp_path, "third"), "--init", tmp_path / "absent.pth"]
    assert "can't read" in error_of(main, *args)


def test_the_output_folder_is_checked_before_the_set_is_read(main, tmp_path):
    common = options(tmp_path / "absent", tmp_path)
    with locked(tmp_path / "run/.lock", "training"):
        assert "another process is training into" in error_of(main, *common)
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {".lock"}
    (tmp_path / "file").write_text("")
    assert "choose another --output" in error_of(main, *common, "--output", tmp_path / "file/run")
    (tmp_path / "run/checkpoint.pt").write_text("")
    assert "already holds a run" in error_of(main, *common)
    assert "checkpoint.pt to resume" in error_of(main, *common, "--output", tmp_path / "other", "--resume")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("option, value", [("--epochs", "nan"), ("--lr", "inf"), ("--lr", "0"), ("--seed", "-1"),
                                           ("--seed", "9" * 30), ("--shift", "17"), ("--weight-decay", "nan")])
def test_options_are_checked_before_the_set_is_read(main, tmp_path, option, value):
    assert option in error_of(main, "--casia", tmp_path / "absent", option, value)


def test_a_run_is_never_overwritten_or_resumed_by_mistake(main, casia, tmp_path):
    args = [*options(casia, tmp_path), "--net", "sphere20a", "--epochs", "0.4"]
    assert main("cosFace", *args)[0] == 0
    assert "was trained with --seed 0" in error_of(main, *args, "--resume", "--seed", "1")
    assert "is a run of CosFace" in error_of(main, *args, "--resume", method="sphereFace")
    checkpoint = tmp_path / "run/checkpoint.pt"
    torch.save({"weights": {}}, checkpoint)
    assert "not a training checkpoint" in error_of(main, *args, "--resume")


def test_training_stops_before_saving_after_a_loss_that_is_not_finite(main, casia, tmp_path):
    message = error_of(main, *options(casia, tmp_path), "--net", "sphere20a", "--lr", "1e30", method="sphereFace")
    assert "the loss is not finite" in message
    path = tmp_path / "run/checkpoint.pt"
    saved = tensors(torch.load(path, weights_only=True)) if path.exists() else {}
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())


def test_lfw_accuracy_after_an_epoch_equals_lfw_eval(main, casia, tmp_path, monkeypatch):
    rows = []
    for person in "ABCD":
        for photo in (1, 2):
            image, points = draw_face(ord(person), photo)
            name = f"{person}/{person}_{photo:04d}.jpg"
            write_image(tmp_path / "lfw" / name, image)
            rows.append((name, points))
    write_landmarks(tmp_path / "list.txt", rows)
    (tmp_path / "lfw/pairs.txt").write_text("2\t1\nA\t1\t2\nA\t1\tB\t1\nC\t1\t2\nC\t1\tD\t1\n")
    args = options(casia, tmp_path)
    monkeypatch.chdir(tmp_path)
    status, _ = main("cosFace", *args, "--epochs", "0.4", "--lfw", "lfw", "--lfw-landmarks", "list.txt")
    line, = (json.loads(line) for line in (tmp_path / "run/epochs.jsonl").read_text().splitlines())
    path = tmp_path / "run/checkpoint.pt"
    net, loaded = load_net(path, NETS)
    lfw = load_lfw(tmp_path / "lfw", landmarks=tmp_path / "list.txt")
    result = verify(embed(net, lfw.faces, "cpu"), lfw.pairs.pairs, lfw.pairs.same, lfw.pairs.folds)
    assert status == 0 and line["lfw"] == round(result.accuracy, 5)

    source = "4 pairs of lfw, evaluated during training at step 2"
    best = choose_threshold(result.similarities, lfw.pairs.same, source)
    stored = load_threshold(path, loaded)
    assert stored.value == pytest.approx(best.value, abs=1e-5) and stored[1:] == best[1:]
    assert load_threshold(path, {**loaded, "step": 3}).source == f"{source} (the weights are those of step 3)"

    monkeypatch.chdir("lfw")
    args += ["--resume", "--epochs"]
    assert main("cosFace", *args, "0.5")[0] == 0    # in another folder, without --lfw
    assert "at step 3" in load_threshold(path, load_net(path, NETS)[1]).source
    shutil.move(tmp_path / "lfw", tmp_path / "other")
    assert f"{tmp_path / 'lfw'} does not exist" in error_of(main, *args, "1")
    shutil.copytree(tmp_path / "other", tmp_path / "lfw")
    sets = ["--lfw", tmp_path / "lfw", tmp_path / "other"]
    assert parse_resumed(parser, list(map(str, [*args, "1", *sets]))).lfw_landmarks == []    # they are of other sets
    assert main("cosFace", *args, "1", *sets, "--lfw-landmarks", *2 * [tmp_path / "list.txt"])[0] == 0
    line = json.loads((tmp_path / "run/epochs.jsonl").read_text().splitlines()[-1])
    assert line["lfw"] == line["other"] == line["mean_accuracy"] and "other_std" in line


def test_gradient_accumulation_equals_the_whole_batch(main, casia, tmp_path):
    """The network is sphere20a, because batch normalization normalizes each micro-batch separately."""
    args = ["--net", "sphere20a", "--epochs", "0.34"]
    assert main("sphereFace", *options(casia, tmp_path, "whole"), *args)[0] == 0
    assert main("sphereFace", *options(casia, tmp_path, "parts"), *args, "--accumulate", "4")[0] == 0
    checkpoint, _ = assert_same_model(tmp_path / "whole", tmp_path / "parts")
    assert checkpoint["step"] == 2
    whole, parts = (json.loads((tmp_path / run / "epochs.jsonl").read_text()) for run in ("whole", "parts"))
    assert whole["loss"] == pytest.approx(parts["loss"], rel=1e-5)
    assert whole["train_accuracy"] == parts["train_accuracy"]
    sampled = [*options(casia, tmp_path), "--sample-centers", "0.5"]
    assert "can't be combined" in error_of(main, *sampled, "--accumulate", "2")


def test_the_loss_can_be_sphereface_r(main, casia, tmp_path):
    args = [*options(casia, tmp_path), "--epochs", "0.34"]
    assert "--margin must be 1, 2, 3, 4 or 5" in error_of(main, *args, "--margin", "1.5", method="sphereFace")
    assert main("sphereFace", *args, "--loss", "sphereface-r")[0] == 0
    epoch = json.loads((tmp_path / "run/epochs.jsonl").read_text())
    # At right angles, the margin adds 30 (cos 90° - cos 135°) = 21 to the loss of a plain softmax.
    assert 18 < epoch["loss"] < 30
    assert "is a run of SphereFaceR" in error_of(main, *options(casia, tmp_path), "--resume", method="cosFace")


@pytest.mark.parametrize("method, extra", [("cosFace", []), ("sphereFace", ["--shard-head"])])
def test_two_processes_train_the_same_model_as_one(main, casia, tmp_path, method, extra):
    """Each of the two processes takes half of the batch, in two micro-batches."""
    args = ["--net", "sphere20a", "--epochs", "0.5", "--no-flip"]
    assert main(method, *options(casia, tmp_path, "one"), *args)[0] == 0
    two = torchrun(method, *options(casia, tmp_path, "two"), *args, "--accumulate", "2", *extra)
    assert two.returncode == 0 and "FutureWarning" not in two.stderr, two.stderr
    one, two = assert_same_model(tmp_path / "one", tmp_path / "two")
    assert one["step"] == two["step"] and two["head"]["weight"].shape == (6, 512)
