"""Several processes: signals, killed processes, restarts, two machines, and uses of torchrun to refuse."""
import os
import signal
import subprocess
import sys
import time

import pytest
import tiny_train
import torch
from conftest import LOCAL, ROOT, free_port, options, saved_step, tensors

import cosFace.net
from faces.files import InputError, TemporaryError
from faces.training.distributed import Processes, torchrun_device

SETTINGS = ["--batch-size", "4", "--epochs", "8", "--resume", "auto"]    # 96 steps
FOREVER = ["--batch-size", "8", "--epochs", "2000"]


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


def test_machines_with_different_options_are_refused(casia, tmp_path):
    """Otherwise, some would wait for each other forever, because options decide which tensors are exchanged."""
    machines = start_machines(casia, tmp_path, [], ["--sample-centers", "0.5"])
    outputs = [machine.communicate(timeout=300)[0] for machine in machines]
    assert "process 1 has sample-centers 0.5, unlike rank 0" in outputs[1], outputs


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
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(InputError, match=problem):
        torchrun_device(device)


def test_a_device_that_one_machine_lacks_ends_all_machines(casia, tmp_path):
    """Otherwise, the others would wait for half an hour, in silence."""
    for machine in start_machines(casia, tmp_path, [], ["--device", "gpu99"]):
        output, _ = machine.communicate(timeout=300)
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


def test_out_of_memory_is_one_sentence_with_advice(main, casia, tmp_path, monkeypatch):
    def forward(net, x):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    monkeypatch.setitem(cosFace.net.NETS, "faceNet", tiny_train.TinyNet)
    monkeypatch.setattr(tiny_train.TinyNet, "forward", forward)
    status, output = main("cosFace", *options(casia, tmp_path))
    assert status == 2 and "cpu is out of memory; a device has 8 faces at a time; try --accumulate" in output.err
