"""Tests of checkpoints when processes are killed and disks are full, and of keeping older checkpoints.

They train a tiny network to be fast; tests/methods/test_casia_train.py kills and resumes a run of the real one.
"""
import json
import math
import multiprocessing
import os
import random
import signal
import sys
import time

import pytest
import tiny_train
import torch
from conftest import ROOT, file_size_limit, options, tensors
from torch import nn

import cosFace.net
from cosFace import casia_train
from faces.device import prefers_bf16


@pytest.fixture
def tiny(monkeypatch):
    """Replace faceNet by TinyNet."""
    monkeypatch.setitem(cosFace.net.NETS, "faceNet", tiny_train.TinyNet)


def train(args):
    """Train TinyNet silently, and end this process with the exit status."""
    sys.stdout = sys.stderr = open(os.devnull, "w")
    sys.exit(tiny_train.main(list(map(str, args))))


@pytest.fixture
def start(monkeypatch):
    """Return a function that starts train() in a new process, forked from one that has already imported everything."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests/training"))))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_checkpoint", "torch._dynamo", "torch.utils.tensorboard", "faces.plots"])

    def start(args):
        process = context.Process(target=train, args=(args,))
        process.start()
        return process
    return start


def test_a_run_killed_twenty_times_equals_an_uninterrupted_one(start, casia, tmp_path):
    """Each kill follows a random step by a random delay, so that on slow machines too it lands within the run."""
    settings = ["--batch-size", "2", "--epochs", "6", "--checkpoint-every", "1", "--jitter", "2", "--keep-last", "2"]
    uninterrupted = start([*options(casia, tmp_path, "uninterrupted"), *settings])
    uninterrupted.join()
    assert uninterrupted.exitcode == 0
    rng, checkpoint, saved = random.Random(0), tmp_path / "run/checkpoint.pt", 0
    for step in sorted(rng.sample(range(65), 20)):              # the run has 144 steps
        process = start([*options(casia, tmp_path), *settings, *["--resume"] * checkpoint.exists()])
        while process.is_alive() and saved_step(checkpoint) < step:
            time.sleep(0.005)
        process.join(rng.uniform(0, 0.02))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        previous, saved = saved, saved_step(checkpoint)         # fails if a kill left a truncated file
        assert previous <= saved < 144
    last = start([*options(casia, tmp_path), *settings, *["--resume"] * checkpoint.exists()])
    last.join()
    assert last.exitcode == 0 and saved_step(checkpoint) == 144
    expected, actual = (tensors(torch.load(tmp_path / run / "checkpoint.pt", weights_only=True))
                        for run in ("uninterrupted", "run"))
    assert actual.keys() == expected.keys() and len(expected) > 10
    assert not [name for name in expected if not torch.equal(actual[name], expected[name])]


def saved_step(checkpoint):
    """Return the step of a checkpoint, 0 if the file does not exist."""
    return torch.load(checkpoint, weights_only=True)["step"] if checkpoint.exists() else 0


def test_a_full_disk_keeps_the_last_checkpoint_and_training_continues(tiny, main, casia, tmp_path, monkeypatch):
    """Writes fail from step 5 to step 8, as on a full disk on which someone then frees space."""
    write, saved_steps = casia_train.Checkpoints._write, {}

    def write_with_limit(checkpoints, step, last, state):
        with file_size_limit(50_000 if 5 <= step <= 8 else 10**9):
            write(checkpoints, step, last, state)
        saved_steps[step] = saved_step(checkpoints.path)
    monkeypatch.setattr(casia_train.Checkpoints, "_write", write_with_limit)
    status, output = main("cosFace", *options(casia, tmp_path))
    assert status == 0 and saved_steps == {2: 2, 4: 4, 6: 4, 8: 4, 10: 10, 12: 12}
    assert "step 6: can't write" in output.err and "Training continues; the checkpoint of step 4 is kept." in output.err
    assert not list((tmp_path / "run").glob(".*.partial"))


def test_a_run_fails_if_the_disk_stays_full(tiny, main, casia, tmp_path):
    args = options(casia, tmp_path)
    assert main("cosFace", *args, "--epochs", "0.4")[0] == 0    # builds the cache, which would not fit the limit either
    with file_size_limit(50_000):
        status, output = main("cosFace", *options(casia, tmp_path, "full"), "--epochs", "0.4")
    assert status == 2 and "full; free some space. The last steps are lost; no earlier checkpoint exists." in output.err


def test_keep_last_keeps_and_prunes_older_checkpoints(tiny, main, casia, tmp_path):
    args = [*options(casia, tmp_path), "--keep-last"]
    assert main("cosFace", *args, "3")[0] == 0
    folder = tmp_path / "run"
    kept = {path.name: torch.load(path, weights_only=True)["step"] for path in folder.glob("*.pt")}
    assert kept == {"checkpoint.pt": 12, "checkpoint-0000010.pt": 10, "checkpoint-0000008.pt": 8}
    (folder / "checkpoint-0000010.pt").replace(folder / "checkpoint.pt")    # go back to step 10
    assert main("cosFace", *args, "2", "--resume")[0] == 0
    kept = {path.name: torch.load(path, weights_only=True)["step"] for path in folder.glob("*.pt")}
    assert kept == {"checkpoint.pt": 12, "checkpoint-0000010.pt": 10}


@pytest.fixture(scope="module")
def saved(casia, tmp_path_factory):
    """Return the arguments of a finished run of TinyNet, and the content of its checkpoint."""
    folder = tmp_path_factory.mktemp("saved")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cosFace.net.NETS, "faceNet", tiny_train.TinyNet)
        assert casia_train.main(list(map(str, [*options(casia, folder), "--epochs", "0.4"]))) == 0
    return options(casia, folder), torch.load(folder / "run/checkpoint.pt", weights_only=True)


THRESHOLD = {"value": 0.3, "accepted": 1, "impostor": 9, "rejected": 0, "genuine": 9, "source": "LFW", "step": 2}


def test_a_checkpoint_of_before_thresholds_is_resumed(tiny, main, saved, tmp_path):
    args, state = saved
    (tmp_path / "run").mkdir()
    torch.save({name: value for name, value in state.items() if name != "threshold"}, tmp_path / "run/checkpoint.pt")
    status, output = main("cosFace", *args, "--output", tmp_path / "run", "--resume", "--epochs", "0.5")
    assert status == 0 and torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["threshold"] is None


def with_optimizer(state, entry):
    return {**state["optimizer"], "state": {**state["optimizer"]["state"], 0: entry}}


@pytest.mark.parametrize("entry, make", [
    ("optimizer", lambda state: None), ("optimizer", lambda state: {}),
    ("optimizer", lambda state: with_optimizer(state, 3)),
    ("optimizer", lambda state: with_optimizer(state, {"momentum_buffer": None})),
    ("settings", lambda state: []), ("settings", lambda state: {**state["settings"], "batch_size": [8]}),
    ("settings", lambda state: {}), ("step", lambda state: -5), ("step", lambda state: torch.ones(2)),
    ("step", lambda state: True), ("method", lambda state: torch.zeros(3)), ("net", lambda state: "\x1b[2Jfoo"),
    ("weights", lambda state: {**state["weights"], "2.bias": 1}), ("weights", lambda state: list(state["weights"])),
    ("weights", lambda state: {**state["weights"], "2.bias": torch.zeros(512).to_sparse()}),
    ("weights", lambda state: {**state["weights"], "2.bias": torch.zeros(1).expand(10**12)}),
    ("head", lambda state: {"weight": torch.zeros(6)}), ("head", lambda state: {}), ("classes", lambda state: "6"),
    ("faces", lambda state: 7), ("threshold", lambda state: 0.3),
    ("threshold", lambda state: {**THRESHOLD, "value": math.nan}),
    ("threshold", lambda state: {**THRESHOLD, "genuine": 0}),
    ("threshold", lambda state: {**THRESHOLD, "source": "\x1b[2J"})])
def test_a_damaged_checkpoint_is_one_sentence(tiny, main, saved, tmp_path, entry, make):
    args, state = saved
    (tmp_path / "run").mkdir()
    torch.save({**state, entry: make(state)}, tmp_path / "run/checkpoint.pt")
    status, output = main("cosFace", *args, "--output", tmp_path / "run", "--resume")
    assert status == 2 and f"is damaged (its entry '{entry}'" in output.err and "Traceback" not in output.err


@pytest.mark.parametrize("change", [
    {"head": {"weight": torch.zeros(5, 512)}}, {"weights": {}}, {"settings": "batch_size"}, {"scaler": {"scale": "x"}}])
def test_a_checkpoint_whose_entries_do_not_fit_is_one_sentence(tiny, main, saved, tmp_path, change):
    args, state = saved
    if change.get("settings"):
        change = {"settings": {**state["settings"], "jitter": "many"}}
        args = [*args[:6], "--device", "cpu"]     # the option is left out, so that it comes from the checkpoint
    (tmp_path / "run").mkdir()
    torch.save({**state, **change}, tmp_path / "run/checkpoint.pt")
    status, output = main("cosFace", *args, "--output", tmp_path / "run", "--resume")
    assert status in (0, 2) and "Traceback" not in output.err
    assert status == 0 if "scaler" in change else "damaged" in output.err


def test_compile_without_a_compiler_prints_one_sentence_and_continues(tiny, main, casia, tmp_path, monkeypatch):
    def fail(net, dynamic):
        raise RuntimeError("no C++ compiler\nand a long story")
    monkeypatch.setattr(nn.Module, "compile", fail)
    status, output = main("cosFace", *options(casia, tmp_path), "--compile")
    assert status == 0
    assert "--compile does not work here (no C++ compiler); training continues without it.\n" in output.out


def test_automatic_precision_is_the_one_of_the_device(tiny, main, casia, tmp_path):
    assert main("cosFace", *options(casia, tmp_path), "--precision", "auto", "--epochs", "0.17")[0] == 0
    precision = json.loads((tmp_path / "run/settings.json").read_text())["precision"]
    assert precision == ("bf16" if prefers_bf16(torch.device("cpu")) else "float32")
