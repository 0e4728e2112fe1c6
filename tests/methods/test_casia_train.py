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
from conftest import ROOT, checkpoint, epochs, options, saved_step, script, tensors, torchrun, write_lfw

import sphereFace.casia_train
from cosFace import casia_train
from cosFace.net import NETS, sphere20a
from faces.files import locked
from faces.landmarks import write_landmarks
from faces.training.checkpoint import parse_resumed
from faces.verification.embed import embed
from faces.verification.lfw import load_lfw
from faces.verification.metrics import verify
from faces.verification.threshold import choose_threshold, load_threshold
from faces.verification.weights import load_net


def interrupt(args, signal_number, folder, step):
    """Start training, and send it a signal once the checkpoint in its folder has reached a step; return the exit
    status, and stdout and stderr together."""
    process = subprocess.Popen([sys.executable, "casia_train.py", *map(str, args)], cwd=ROOT / "sphereFace", text=True,
                               env={"OMP_NUM_THREADS": "2", **os.environ},
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while process.poll() is None and saved_step(folder) < step:
        time.sleep(0.05)
    process.send_signal(signal_number)
    output, _ = process.communicate(timeout=900)
    return process.returncode, output


def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(casia, tmp_path):
    args, run, whole = options(casia, tmp_path), tmp_path / "run", tmp_path / "uninterrupted"
    uninterrupted = script("sphereFace/casia_train.py", *options(casia, tmp_path, whole.name))
    assert uninterrupted.returncode == 0, uninterrupted.stderr

    status, _ = interrupt(args, signal.SIGKILL, run, 2)
    assert status == -signal.SIGKILL
    status, output = interrupt([*args, "--resume"], signal.SIGTERM, run, max(6, saved_step(run) + 1))
    assert status == 128 + signal.SIGTERM and "stopped after" in output, output
    last = script("sphereFace/casia_train.py", *args, "--resume", from_root=True)
    assert last.returncode == 0, last.stderr

    assert saved_step(run) == saved_step(whole) == 12
    actual, expected = tensors(checkpoint(run)), tensors(checkpoint(whole))
    assert actual.keys() == expected.keys() and len(expected) > 150
    assert not [name for name in expected if not torch.equal(actual[name], expected[name])]
    logged = epochs(run)
    assert [epoch["step"] for epoch in logged] == [6, 12] and logged[1]["loss"] < logged[0]["loss"]
    for one, two in zip(logged, epochs(whole)):    # a resumed run reports the means of whole epochs
        assert (one["loss"], one["train_accuracy"]) == pytest.approx((two["loss"], two["train_accuracy"]))
    assert list(run.glob("events.out.tfevents.*")) and (run / "training.png").exists()
    assert json.loads((run / "settings.json").read_text())["settings"]["batch_size"] == 8


def test_invalid_input_is_explained_in_one_sentence(refusal, casia, tmp_path):
    common = ["--cache", tmp_path / "cache", "--output", tmp_path / "run", "--device", "cpu"]
    (tmp_path / "empty").mkdir()
    assert "does not exist" in refusal(casia_train, "--casia", tmp_path / "absent", *common)
    assert "has 0 photos of 0 people" in refusal(casia_train, "--casia", tmp_path / "empty", *common)
    absent = "--landmarks", tmp_path / "absent.txt"
    assert "can't read the landmark list" in refusal(casia_train, "--casia", casia, *absent, *common)
    assert "48 faces are less than a step" in refusal(casia_train, "--casia", casia, "--batch-size", "50", *common)
    assert "--batch-size must be a multiple" in refusal(casia_train, "--casia", casia, "--accumulate", "5", *common)
    assert "must be greater than 0, not -1; --help" in refusal(casia_train, "--casia", casia, "--epochs", "-1", *common)
    assert not (tmp_path / "run/checkpoint.pt").exists()


def test_a_resumed_run_takes_its_options_from_the_checkpoint_and_may_train_longer(main, refusal, casia, tmp_path):
    args = options(casia, tmp_path)
    longer = [*options(casia, tmp_path, "longer"), "--net", "sphere20a", "--shift", "1"]
    assert main("cosFace", *longer, "--epochs", "0.5")[0] == 0
    common = [*args[:4], "--output", tmp_path / "longer", "--device", "cpu", "--resume"]
    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "longer").glob("[!.]*")}
    status, out, _ = main("cosFace", *common)
    assert status == 0 and "12 steps" not in out and "after 3 steps;" in out
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "longer").glob("[!.]*")} == written
    status, out, _ = main("cosFace", *common, "--epochs", "0.67", "--schedule", "cosine")
    assert status == 0 and "after 4 steps;" in out
    assert "--epochs is 0.67 from step 3 on; it was 0.5" in out
    assert "--schedule is cosine from step 3 on; it was step" in out
    assert "was trained with --shift 1" in refusal(casia_train, *common, "--shift", "2")
    assert "is at step 4, beyond the 1 steps of this schedule" in refusal(casia_train, *common, "--epochs", "0.17")
    saved = checkpoint(tmp_path / "longer")["settings"]
    assert (saved["shift"], saved["epochs"], saved["batch_size"]) == (1, 0.67, 8)


def test_init_starts_from_the_network_of_a_run_or_of_public_weights(main, refusal, casia, tmp_path):
    torch.manual_seed(1)
    public = {f"module.{name}": tensor for name, tensor in sphere20a().state_dict().items()}
    public["module.conv1_2.bias"] = torch.full((64,), 0.5)     # as public checkpoints have it
    torch.save(public, tmp_path / "public.pth")
    args = ["--epochs", "0.17", "--lr", "1e-12", "--init"]    # without --net, which the files say
    status, out, err = main("cosFace", *options(casia, tmp_path), *args, tmp_path / "public.pth")
    assert status == 0 and "BGR" in err and "(sphere20a, " in out and "after 1 step;" in out
    first = checkpoint(tmp_path / "run")
    trained = first["weights"]
    torch.testing.assert_close(trained["conv1_1.weight"], public["module.conv1_1.weight"].flip(1))
    torch.testing.assert_close(trained["conv1_2.bias"], public["module.conv1_2.bias"])
    assert main("sphereFace", *options(casia, tmp_path, "second"), *args, tmp_path / "run/checkpoint.pt")[0] == 0
    second = checkpoint(tmp_path / "second")
    torch.testing.assert_close(second["weights"]["fc5.weight"], trained["fc5.weight"])
    centers = first["head"]["weight"], second["head"]["weight"]
    assert torch.cosine_similarity(*centers).abs().max() < 0.3    # new ones, though both runs have the same seed
    args = ["--output", tmp_path / "third", "--init"]
    other = *options(casia, tmp_path), *args, tmp_path / "public.pth", "--net", "faceNet"
    assert "sphere20a" in refusal(casia_train, *other)
    assert "can't read" in refusal(casia_train, *options(tmp_path / "absent", tmp_path), *args, tmp_path / "absent.pth")


def test_the_output_folder_is_checked_before_the_set_is_read(refusal, tmp_path):
    common = options(tmp_path / "absent", tmp_path)
    with locked(tmp_path / "run/.lock", "training"):
        assert "another process is training into" in refusal(casia_train, *common)
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {".lock"}
    (tmp_path / "file").write_text("")
    assert "choose another --output" in refusal(casia_train, *common, "--output", tmp_path / "file/run")
    (tmp_path / "run/checkpoint.pt").write_text("")
    assert "already holds a run" in refusal(casia_train, *common)
    assert "checkpoint.pt to resume" in refusal(casia_train, *common, "--output", tmp_path / "other", "--resume")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("option, value", [("--epochs", "nan"), ("--lr", "inf"), ("--lr", "0"), ("--seed", "-1"),
                                           ("--seed", "9" * 30), ("--shift", "17"), ("--weight-decay", "nan")])
def test_options_are_checked_before_the_set_is_read(refusal, tmp_path, option, value):
    assert option in refusal(casia_train, "--casia", tmp_path / "absent", option, value)


def test_a_run_is_never_overwritten_or_resumed_by_mistake(main, refusal, casia, tmp_path):
    args = [*options(casia, tmp_path), "--net", "sphere20a", "--epochs", "0.4"]
    assert main("cosFace", *args)[0] == 0
    assert "was trained with --seed 0" in refusal(casia_train, *args, "--resume", "--seed", "1")
    assert "is a run of CosFace" in refusal(sphereFace.casia_train, *args, "--resume")
    torch.save({"weights": {}}, tmp_path / "run/checkpoint.pt")
    assert "not a training checkpoint" in refusal(casia_train, *args, "--resume")


def test_training_stops_before_saving_after_a_loss_that_is_not_finite(refusal, casia, tmp_path):
    message = refusal(sphereFace.casia_train, *options(casia, tmp_path), "--net", "sphere20a", "--lr", "1e30")
    assert "the loss is not finite" in message
    saved = tensors(checkpoint(tmp_path / "run")) if saved_step(tmp_path / "run") else {}
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())


def test_lfw_accuracy_after_an_epoch_equals_lfw_eval(main, refusal, casia, tmp_path, monkeypatch):
    write_landmarks(tmp_path / "list.txt", write_lfw(tmp_path / "lfw"))
    args = options(casia, tmp_path)
    monkeypatch.chdir(tmp_path)
    status, *_ = main("cosFace", *args, "--epochs", "0.4", "--lfw", "lfw", "--lfw-landmarks", "list.txt")
    epoch, = epochs(tmp_path / "run")
    path = tmp_path / "run/checkpoint.pt"
    net, loaded = load_net(path, NETS)
    lfw = load_lfw(tmp_path / "lfw", landmarks=tmp_path / "list.txt")
    result = verify(embed(net, lfw.faces, "cpu"), lfw.pairs.pairs, lfw.pairs.same, lfw.pairs.folds)
    assert status == 0 and epoch["lfw"] == round(result.accuracy, 5)

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
    assert f"{tmp_path / 'lfw'} does not exist" in refusal(casia_train, *args, "1")
    shutil.copytree(tmp_path / "other", tmp_path / "lfw")
    sets = ["--lfw", tmp_path / "lfw", tmp_path / "other"]
    resumed = parse_resumed(casia_train.parser, list(map(str, [*args, "1", *sets])))
    assert resumed.lfw_landmarks == []    # those of the checkpoint are of other sets
    assert main("cosFace", *args, "1", *sets, "--lfw-landmarks", *2 * [tmp_path / "list.txt"])[0] == 0
    epoch = epochs(tmp_path / "run")[-1]
    assert epoch["lfw"] == epoch["other"] == epoch["mean_accuracy"] and "other_std" in epoch


def assert_same_model(one, two):
    """Assert that two runs logged the same and ended with the same network and head, up to rounding."""
    for a, b in zip(epochs(one), epochs(two), strict=True):
        assert (a["step"], a["train_accuracy"]) == (b["step"], b["train_accuracy"])
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    one, two = tensors(checkpoint(one)), tensors(checkpoint(two))
    for name in [name for name in one if name.startswith((".weights", ".head.weight"))]:
        # Three steps change a bias by 3e-3. If rounding moves a value across the kink of a PReLU, one element may
        # differ by a hundredth of that, but the root mean square over the tensor hardly changes.
        difference = two[name].double() - one[name].double()
        assert difference.square().mean().sqrt() < 5e-6 and difference.abs().max() < 5e-5, name


def test_gradient_accumulation_equals_the_whole_batch(main, refusal, casia, tmp_path):
    """The network is sphere20a, because batch normalization normalizes each micro-batch separately."""
    args = ["--net", "sphere20a", "--epochs", "0.34"]
    assert main("sphereFace", *options(casia, tmp_path, "whole"), *args)[0] == 0
    assert main("sphereFace", *options(casia, tmp_path, "parts"), *args, "--accumulate", "4")[0] == 0
    assert_same_model(tmp_path / "whole", tmp_path / "parts")
    sampled = [*options(casia, tmp_path), "--sample-centers", "0.5"]
    assert "can't be combined" in refusal(casia_train, *sampled, "--accumulate", "2")


def test_the_loss_can_be_sphereface_r(main, refusal, casia, tmp_path):
    args = [*options(casia, tmp_path), "--epochs", "0.34"]
    for option in (["--margin", "1.5"], ["--loss", "sphereface-r", "--lambda-min", "3"]):
        assert "takes a whole --margin and no --scale" in refusal(sphereFace.casia_train, *args, *option)
    assert main("sphereFace", *args, "--loss", "sphereface-r")[0] == 0
    epoch, = epochs(tmp_path / "run")
    # At right angles, the margin adds 30 (cos 90° - cos 135°) = 21 to the loss of a plain softmax.
    assert 18 < epoch["loss"] < 30
    assert "is a run of SphereFaceR" in refusal(casia_train, *options(casia, tmp_path), "--resume")


@pytest.mark.parametrize("method, extra", [("cosFace", []), ("sphereFace", ["--shard-head"])])
def test_two_processes_train_the_same_model_as_one(main, casia, tmp_path, method, extra):
    """Each of the two processes takes half of the batch, in two micro-batches."""
    args = ["--net", "sphere20a", "--epochs", "0.5", "--no-flip"]
    assert main(method, *options(casia, tmp_path, "one"), *args)[0] == 0
    run = torchrun(f"{method}/casia_train.py", *options(casia, tmp_path, "two"), *args, "--accumulate", "2", *extra)
    output, _ = run.communicate(timeout=900)
    assert run.returncode == 0 and "FutureWarning" not in output, output
    assert_same_model(tmp_path / "one", tmp_path / "two")
