"""Several processes: signals, killed processes, restarts, two machines, and uses of torchrun to refuse."""
import os
import signal
import time

import pytest
import torch
from conftest import LOCAL, checkpoint, free_port, options, saved_step, tensors, torchrun
from tiny_train import TinyNet

from cosFace import casia_train
from faces.files import InputError, TemporaryError
from faces.training.distributed import Processes, torchrun_device

SETTINGS = ["--batch-size", "4", "--epochs", "8", "--resume", "auto"]    # 96 steps
FOREVER = ["--batch-size", "8", "--epochs", "2000"]


def start(*args, **options):
    """Start tiny_train.py under torchrun."""
    return torchrun("tests/tiny_train.py", *args, **options)


def wait_for_step(step, folder, process):
    """Wait until a run has saved the checkpoint of a step."""
    deadline = time.monotonic() + 300
    while saved_step(folder) < step:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.05)


def output_of(run):
    """Wait for the end of a run; return what it printed."""
    return run.communicate(timeout=300)[0]


def test_sigterm_to_torchrun_saves_every_step_that_was_done(casia, tmp_path):
    run = start(*options(casia, tmp_path), *FOREVER)
    wait_for_step(5, tmp_path / "run", run)
    run.terminate()
    output = output_of(run)
    assert "stopped after" in output and "continue with --resume" in output, output
    stopped = int(output.split("stopped after ")[1].split(" ")[0].replace(",", ""))
    assert saved_step(tmp_path / "run") == stopped and run.returncode != 0


def assert_equals_undisturbed(casia, tmp_path, head, folder):
    """Assert that a run ended with exactly the model of a run of two processes that nothing disturbed."""
    run = start(*options(casia, tmp_path, "undisturbed"), *SETTINGS, *head)
    assert "training is complete" in output_of(run) and run.returncode == 0
    expected, actual = tensors(checkpoint(tmp_path / "undisturbed")), tensors(checkpoint(folder))
    assert not [name for name in expected if not torch.equal(actual[name], expected[name])]


def test_a_killed_process_is_restarted_and_the_result_is_the_same(casia, tmp_path):
    """With --max-restarts and --resume auto, torchrun survives the loss of a process."""
    run = start(*options(casia, tmp_path), *SETTINGS, launcher=(*LOCAL, "--max-restarts", "2"), PIDS=str(tmp_path))
    wait_for_step(5, tmp_path / "run", run)
    os.kill(int((tmp_path / "1").read_text()), signal.SIGKILL)
    assert "resumed" in output_of(run) and run.returncode == 0
    assert_equals_undisturbed(casia, tmp_path, [], tmp_path / "run")


def start_machines(casia, tmp_path, *options_of_each):
    """Start two torchrun groups with a process, a cache and an output folder each; return their Popens."""
    port, machines = free_port(), []
    for rank, extra in enumerate(options_of_each):
        launcher = ("--nnodes", "2", "--node-rank", rank, "--master-addr", "localhost", "--master-port", port)
        machines.append(start(*options(casia, tmp_path / f"machine{rank}"), *SETTINGS, *extra, PIDS=str(tmp_path),
                              launcher=launcher, processes=1))
    return machines


def test_machines_with_different_options_are_refused(casia, tmp_path):
    """Otherwise, some would wait for each other forever, because options decide which tensors are exchanged."""
    outputs = list(map(output_of, start_machines(casia, tmp_path, [], ["--sample-centers", "0.5"])))
    assert "process 1 has sample-centers 0.5, unlike rank 0" in outputs[1], outputs


def test_two_machines_without_a_shared_disk(casia, tmp_path):
    """Each has a cache and an output folder of its own; one is lost, and the other finishes the run alone."""
    head = ["--shard-head"]
    machines = start_machines(casia, tmp_path, head, head)
    wait_for_step(4, tmp_path / "machine0/run", machines[0])
    os.kill(int((tmp_path / "1").read_text()), signal.SIGKILL)
    outputs = list(map(output_of, machines))
    assert all("aligning 48 faces" in output for output in outputs), outputs
    assert "process 0 lost the connection to another process" in outputs[0], outputs[0]
    assert not (tmp_path / "machine1/run").exists()
    last = start(*options(casia, tmp_path / "machine0"), *SETTINGS, *head)
    assert "resumed" in output_of(last) and last.returncode == 0
    assert_equals_undisturbed(casia, tmp_path, head, tmp_path / "machine0/run")


@pytest.mark.parametrize("device, gpus, problem", [
    ("cuda:1", 2, "would put all processes of torchrun on one GPU"), ("mps", 0, "can't be used with Apple's MPS"),
    ("auto", 1, "process 2 on this machine, which has 1 GPU")])
def test_devices_that_torchrun_can_not_use_are_refused(monkeypatch, device, gpus, problem):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(InputError, match=problem):
        torchrun_device(device)


def test_a_device_that_one_machine_lacks_ends_all_machines(casia, tmp_path):
    """Otherwise, the others would wait for half an hour, in silence."""
    for machine in start_machines(casia, tmp_path, [], ["--device", "gpu99"]):
        output = output_of(machine)
        assert "tiny_train.py: process 1 can't start: --device gpu99 is not available here" in output, output
        assert "exitcode  : 2" in output, output
    assert not (tmp_path / "machine0/run").exists()


NCCL = "NCCL error in: .../c10d/NCCLUtils.cpp:93, "
WATCHDOG = "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=1, OpType=BROADCAST) ran for 600081"
LOST = [
    f"{NCCL}remote process exited or there was a network error, NCCL version 2.21.5\nncclRemoteError: A call failed",
    f"{NCCL}internal error, NCCL version 2.20.5\nLast error:\nNet : Connection closed by remote peer node7<50260>",
    f"{NCCL}unhandled system error\nLast error:\nsocketProgressOpt: Call to recv from 10.1.1.2 failed : Broken pipe",
    "NCCL communicator was aborted on rank 2.  Original reason for failure was: NCCL timeout", WATCHDOG,
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:2041",
    "[.../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation to complete"]
WRONG = [
    f"{NCCL}invalid usage, NCCL version 2.28.9\nLast error:\nDuplicate GPU detected : rank 1 and rank 0 both on 2000",
    f"{NCCL}unhandled cuda error\nLast error:\nCuda failure 'CUDA driver version is insufficient for CUDA runtime'",
    f"{NCCL}internal error, NCCL version 2.21.5\nLast error:\nBootstrap : no socket interface found",
    "ProcessGroupNCCL is only supported with GPUs, no GPUs found!",
    "[enforce fail at .../gloo/transport/tcp/device.cc:84] ifa != nullptr. Unable to find address for: ^lo"]


@pytest.mark.parametrize("message", LOST + WRONG)
def test_only_a_lost_connection_asks_to_try_again(message):
    """The messages are those that people have reported."""
    run = Processes("cpu")
    run.world_size = 2
    with pytest.raises(TemporaryError if message in LOST else RuntimeError):
        with run.explained("no advice"):
            raise RuntimeError(message)


def test_out_of_memory_is_one_sentence_with_advice(tiny, refusal, casia, tmp_path, monkeypatch):
    def forward(net, x):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    monkeypatch.setattr(TinyNet, "forward", forward)
    message = "cpu is out of memory; a device has 8 faces at a time; try --accumulate"
    assert message in refusal(casia_train, *options(casia, tmp_path))
