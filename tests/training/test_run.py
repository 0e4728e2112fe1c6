"""Tests of several processes: signals, killed processes, restarts, two machines, and uses of torchrun to refuse."""
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny_train
import torch
from conftest import ROOT, free_port, options, saved_step, tensors, write_image

import cosFace.net
from faces.files import InputError
from faces.training import sharded_head
from faces.training.run import Run
from faces.verification.evaluator import LfwEvaluator
from tools.commands import LOCAL

SETTINGS = ["--batch-size", "4", "--epochs", "20", "--checkpoint-every", "2", "--resume", "auto"]    # 240 steps
FOREVER = ["--batch-size", "8", "--epochs", "2000", "--checkpoint-every", "5", "--precision", "float32"]


def torchrun(*args, launcher=LOCAL, folder=None, processes=2):
    """Start tiny_train.py under torchrun; return the Popen, whose stderr holds both streams."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **({"PIDS": str(folder)} if folder else {})}
    command = [sys.executable, "-m", "torch.distributed.run", *launcher, "--nproc-per-node", str(processes),
               str(ROOT / "tests/training/tiny_train.py")]
    return subprocess.Popen([*command, *map(str, args)], env=environment, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)


def wait_for(condition, process):
    """Wait until condition() is true while the process runs."""
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.05)


def model(folder):
    """Return all tensors of a run's checkpoint."""
    return tensors(torch.load(folder / "checkpoint.pt", weights_only=True))


def test_sigterm_to_torchrun_saves_every_step_that_was_done(casia, tmp_path):
    run = torchrun(*options(casia, tmp_path), *FOREVER)
    wait_for(lambda: saved_step(tmp_path / "run") >= 5, run)
    run.terminate()
    output, _ = run.communicate(timeout=120)
    assert "stopped after" in output and "continue with --resume" in output, output
    stopped = int(output.split("stopped after ")[1].split(" ")[0].replace(",", ""))
    assert saved_step(tmp_path / "run") == stopped and run.returncode != 0


def assert_equals_undisturbed(casia, tmp_path, head, folder):
    """Assert that a run ended with exactly the model of a run of two processes that nothing disturbed."""
    run = torchrun(*options(casia, tmp_path, "undisturbed"), *SETTINGS, *head)
    output, _ = run.communicate(timeout=300)    # wait() would not end once the pipe is full
    assert run.returncode == 0, output
    expected, actual = model(tmp_path / "undisturbed"), model(folder)
    assert not [name for name in expected if not torch.equal(actual[name], expected[name])]


def test_a_killed_process_is_restarted_and_the_result_is_the_same(casia, tmp_path):
    """With --max-restarts and --resume auto, torchrun survives the loss of a process."""
    run = torchrun(*options(casia, tmp_path), *SETTINGS, launcher=(*LOCAL, "--max-restarts", "2"),
                   folder=tmp_path)
    wait_for(lambda: saved_step(tmp_path / "run") >= 5, run)
    os.kill(int((tmp_path / "1").read_text()), signal.SIGKILL)
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 0 and "resumed" in output, output
    assert_equals_undisturbed(casia, tmp_path, [], tmp_path / "run")


def start_machines(casia, tmp_path, *options_of_each):
    """Start two torchrun groups with a process, a cache and an output folder each; return their Popens."""
    port, machines = free_port(), []
    for rank, extra in enumerate(options_of_each):
        launcher = ("--nnodes", "2", "--node-rank", rank, "--master-addr", "localhost", "--master-port", port)
        machines.append(torchrun(*options(casia, tmp_path / f"machine{rank}"), *SETTINGS, *extra, folder=tmp_path,
                                 launcher=map(str, launcher), processes=1))
    return machines


@pytest.mark.parametrize("option, value", [("--jitter", "1"), ("--sample-centers", "0.5"), ("--checkpoint-every", "3")])
def test_machines_with_different_options_are_refused(casia, tmp_path, option, value):
    """Otherwise, some would wait for each other forever, because options decide which tensors are exchanged."""
    machines = start_machines(casia, tmp_path, [], [option, value])
    outputs = [machine.communicate(timeout=300)[0] for machine in machines]
    assert f"process 1 has {option} {value}, unlike the first process" in outputs[1], outputs


def test_two_machines_without_a_shared_disk(casia, tmp_path):
    """Each has a cache and an output folder of its own; one is lost, and the other finishes the run alone."""
    head = ["--shard-head"]
    machines = start_machines(casia, tmp_path, head, head)
    wait_for(lambda: saved_step(tmp_path / "machine0/run") >= 4, machines[0])
    os.kill(int((tmp_path / "1").read_text()), signal.SIGKILL)
    outputs = [machine.communicate(timeout=300)[0] for machine in machines]
    assert all("aligning 48 faces" in output for output in outputs), outputs
    assert "process 0 lost the connection to another process" in outputs[0], outputs[0]
    assert not (tmp_path / "machine1/run").exists()
    last = torchrun(*options(casia, tmp_path / "machine0"), *SETTINGS, *head)
    output, _ = last.communicate(timeout=300)
    assert last.returncode == 0 and "resumed" in output, output
    assert_equals_undisturbed(casia, tmp_path, head, tmp_path / "machine0/run")


@pytest.mark.parametrize("device, gpus, problem", [
    ("cuda:1", 2, "would put all processes of torchrun on one GPU"), ("mps", 0, "can't be used with Apple's MPS"),
    ("auto", 1, "process 2 on this machine, which has 1 GPU")])
def test_devices_that_torchrun_can_not_use_are_refused(monkeypatch, device, gpus, problem):
    for name, value in {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(InputError, match=problem):
        Run(device)


@pytest.mark.parametrize("extra, advice", [
    ([], "8 faces at a time on each device; pass --accumulate 2 for 4 at a time (batch normalization then sees 4"),
    (["--sample-centers", "0.5"], "8 faces at a time on each device; choose a smaller --batch-size, or more devices")])
def test_out_of_memory_is_one_sentence_with_advice(main, casia, tmp_path, monkeypatch, extra, advice):
    def forward(net, x):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    monkeypatch.setitem(cosFace.net.NETS, "faceNet", tiny_train.TinyNet)
    monkeypatch.setattr(tiny_train.TinyNet, "forward", forward)
    status, output = main("cosFace", *options(casia, tmp_path), *extra)
    assert status == 2 and "cpu is out of memory; a step of --batch-size 8 processes " + advice in output.err


def test_out_of_memory_while_resuming_does_not_blame_the_checkpoint(main, casia, tmp_path, monkeypatch):
    def load_momentum(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    monkeypatch.setitem(cosFace.net.NETS, "faceNet", tiny_train.TinyNet)
    assert main("cosFace", *options(casia, tmp_path), "--epochs", "1")[0] == 0
    monkeypatch.setattr(sharded_head, "load_momentum", load_momentum)
    status, output = main("cosFace", *options(casia, tmp_path), "--resume")
    assert status == 2 and "out of memory; a step of" in output.err and "damaged" not in output.err


def test_landmarks_that_lfw_needs_do_not_change_the_training(tmp_path):
    def find_landmarks(*_, device):
        torch.randn(3)
        raise InputError("no landmarks")
    write_image(tmp_path / "A/A_0001.jpg", np.zeros((100, 100, 3), np.uint8))
    write_image(tmp_path / "A/A_0002.jpg", np.zeros((100, 100, 3), np.uint8))
    write_image(tmp_path / "B/B_0001.jpg", np.zeros((100, 100, 3), np.uint8))
    (tmp_path / "pairs.txt").write_text("2 1\n" + "A 1 2\nA 1 B 1\n" * 2)
    run = Run("cpu")
    expected = torch.random.get_rng_state()
    with pytest.raises(InputError, match="no landmarks"):
        LfwEvaluator(run, tmp_path, find_landmarks=find_landmarks)
    assert torch.equal(torch.random.get_rng_state(), expected)


def test_fp16_scales_the_loss_and_skips_steps_that_overflow(main, casia, tmp_path, monkeypatch):
    """The first scale, 65536, overflows in this network; after it was halved often enough, it learns."""
    monkeypatch.setitem(cosFace.net.NETS, "faceNet", tiny_train.TinyNet)
    args = [*options(casia, tmp_path), "--precision", "fp16", "--scale", "30", "--epochs", "4"]
    scales, step = [], Run.step

    def step_and_note_scale(run, optimizer):
        step(run, optimizer)
        scales.append(run.scaler.get_scale())
    monkeypatch.setattr(Run, "step", step_and_note_scale)
    assert main("cosFace", *args, "--lr", "0.1")[0] == 0
    state = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    assert state["scaler"]["scale"] == scales[-1] and state["settings"]["precision"] == "fp16"
    assert scales[0] == 32768 and scales[-1] == scales[-2]
    assert all(torch.isfinite(tensor).all() for tensor in tensors(state).values())
