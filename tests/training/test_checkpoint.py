"""Checkpoints when things go wrong: killed processes, full disks, and older checkpoints.

The net is a tiny one, so that what is tested is everything around it; test_training.py kills and resumes the real one.
"""
import json
import multiprocessing
import os
import random
import signal
import sys
import time

import pytest
import torch
from conftest import ROOT, file_size_limit, options, tensors
from torch import nn

import cosFace.net
from cosFace import casia_train
from faces.device import has_bf16


class TinyNet(nn.Sequential):
    """Batch statistics and weights, like faceNet, in a millisecond a step."""

    def __init__(self):
        super().__init__(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 512), nn.BatchNorm1d(512))


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(cosFace.net.NETS, "faceNet", TinyNet)


def train(args):
    """Train in a process of its own."""
    cosFace.net.NETS["faceNet"] = TinyNet
    sys.stdout = sys.stderr = open(os.devnull, "w")
    sys.exit(casia_train.main(list(map(str, args))))


@pytest.fixture
def start(monkeypatch):
    """Function that starts train() in a process forked from one that has imported everything already."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests/training"))))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_checkpoint", "torch._dynamo", "torch.utils.tensorboard", "faces.figures"])

    def start(args):
        process = context.Process(target=train, args=(args,))
        process.start()
        return process
    return start


def test_a_run_killed_twenty_times_equals_an_uninterrupted_one(start, casia, tmp_path):
    """Each kill comes at random after a step drawn from the whole run, so that a slow machine's land in it as well."""
    more = ["--batch-size", "2", "--epochs", "6", "--checkpoint-every", "1", "--jitter", "2", "--keep-last", "2"]
    calm = start([*options(casia, tmp_path, "calm"), *more])
    calm.join()
    assert calm.exitcode == 0
    chance, checkpoint, found = random.Random(0), tmp_path / "run/checkpoint.pt", 0
    for after in sorted(chance.sample(range(65), 20)):                                  # of 144 steps
        process = start([*options(casia, tmp_path), *more, *["--resume"] * checkpoint.exists()])
        while process.is_alive() and saved_step(checkpoint) < after:
            time.sleep(0.005)
        process.join(chance.uniform(0, 0.02))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        before, found = found, saved_step(checkpoint)                                   # whole at every moment
        assert before <= found < 144
    last = start([*options(casia, tmp_path), *more, *["--resume"] * checkpoint.exists()])
    last.join()
    assert last.exitcode == 0 and saved_step(checkpoint) == 144
    want, got = (tensors(torch.load(tmp_path / run / "checkpoint.pt", weights_only=True)) for run in ("calm", "run"))
    assert got.keys() == want.keys() and len(want) > 10
    assert not [name for name in want if not torch.equal(got[name], want[name])]


def saved_step(checkpoint):
    """Step of a checkpoint, 0 where there is none."""
    return torch.load(checkpoint, weights_only=True)["step"] if checkpoint.exists() else 0


def test_a_full_disk_keeps_the_last_checkpoint_and_training_continues(tiny, main, casia, tmp_path, monkeypatch):
    """From step 5 to 8 no file may grow beyond a limit, as on a disk that someone then clears."""
    write, found = casia_train.Checkpoints.save, {}

    def save(checkpoints, step, last=False):
        with file_size_limit(50_000 if 5 <= step <= 8 else 10**9):
            write(checkpoints, step, last)
        found[step] = torch.load(checkpoints.path, weights_only=True)["step"]
    monkeypatch.setattr(casia_train.Checkpoints, "save", save)
    status, output = main("cosFace", *options(casia, tmp_path))
    assert status == 0 and found == {2: 2, 4: 4, 6: 4, 8: 4, 10: 10, 12: 12}
    assert "step 6: can't write" in output.err and "Training continues; the checkpoint of step 4 is kept." in output.err
    assert not list((tmp_path / "run").glob(".*"))


def test_a_disk_that_stays_full_fails_the_run(tiny, main, casia, tmp_path):
    args = options(casia, tmp_path)
    assert main("cosFace", *args, "--epochs", "0.4")[0] == 0                            # the cache is there
    with file_size_limit(50_000):
        status, output = main("cosFace", *options(casia, tmp_path, "full"), "--epochs", "0.4")
    assert status == 2 and "full; free some space. The last steps are lost; no earlier checkpoint exists." in output.err


def test_older_checkpoints_are_kept_and_pruned(tiny, main, casia, tmp_path):
    args = [*options(casia, tmp_path), "--keep-last"]
    assert main("cosFace", *args, "3")[0] == 0
    folder = tmp_path / "run"
    kept = {path.name: torch.load(path, weights_only=True)["step"] for path in folder.glob("*.pt")}
    assert kept == {"checkpoint.pt": 12, "checkpoint-0000010.pt": 10, "checkpoint-0000008.pt": 8}
    (folder / "checkpoint-0000010.pt").replace(folder / "checkpoint.pt")                # back to step 10
    assert main("cosFace", *args, "2", "--resume")[0] == 0
    kept = {path.name: torch.load(path, weights_only=True)["step"] for path in folder.glob("*.pt")}
    assert kept == {"checkpoint.pt": 12, "checkpoint-0000010.pt": 10}


def test_without_a_compiler_compile_is_one_sentence(tiny, main, casia, tmp_path, monkeypatch):
    def no_compiler(net):
        raise RuntimeError("no C++ compiler\nand a long story")
    monkeypatch.setattr(nn.Module, "compile", no_compiler)
    status, output = main("cosFace", *options(casia, tmp_path), "--compile")
    assert status == 0
    assert "--compile does not work here (no C++ compiler); training continues without it.\n" in output.out


def test_automatic_precision_is_the_one_of_the_device(tiny, main, casia, tmp_path):
    assert main("cosFace", *options(casia, tmp_path), "--precision", "auto", "--epochs", "0.17")[0] == 0
    precision = json.loads((tmp_path / "run/settings.json").read_text())["precision"]
    assert precision == ("bf16" if has_bf16(torch.device("cpu")) else "float32")
