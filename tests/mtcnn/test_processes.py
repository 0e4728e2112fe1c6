"""Worker processes: results in order, bounded memory, and an end to everything whoever dies first."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import skimage.data
import torch
from conftest import ROOT

from faces.files import InputError
from mtcnn.detector import Detector
from mtcnn.processes import AHEAD, in_processes, start_method


def squares(batch):
    """Square numbers, although the process gets the SIGINT that a terminal sends to all processes on Ctrl-C."""
    os.kill(os.getpid(), signal.SIGINT)
    return [number ** 2 for number in batch]


def log_and_wait(batch):
    """Append a batch to a file; the batch that contains 0 ends half a second after as many as are allowed were."""
    numbers = [number for number, _ in batch]
    log = Path(batch[0][1])
    with open(log, "a") as file:
        file.write(f"{numbers}\n")
    deadline = time.monotonic() + 60
    while 0 in numbers and log.read_text().count("\n") < 2 * AHEAD and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.5 * (0 in numbers))
    return numbers


def die(batch):
    if 5 in batch:
        os.kill(os.getpid(), signal.SIGKILL)
    return batch


def fail(batch):
    raise ZeroDivisionError("on purpose")


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_results_are_in_order_and_only_this_process_heeds_ctrl_c(method):
    batches = list(in_processes(squares, range(50), 3, 2, method))
    assert [n for batch in batches for n in batch] == [n ** 2 for n in range(50)] and len(batches) == 17
    assert list(in_processes(squares, [], 3, 2, method)) == []


def test_a_slow_batch_does_not_let_the_others_run_ahead_without_bound(tmp_path):
    items = [(n, str(tmp_path / "log")) for n in range(200)]
    batches = in_processes(log_and_wait, items, 1, 2, "fork")
    assert next(batches) == [0]
    assert len((tmp_path / "log").read_text().splitlines()) == 2 * AHEAD
    assert [n for batch in batches for n in batch] == list(range(1, 200))


def test_a_killed_worker_is_one_sentence():
    with pytest.raises(InputError, match=r"worker process \d+ was killed by signal 9; run the command again"):
        list(in_processes(die, range(20), 1, 2, "fork"))


def test_an_exception_in_a_worker_keeps_its_type_and_traceback():
    with pytest.raises(ZeroDivisionError, match="on purpose") as caught:
        list(in_processes(fail, range(20), 1, 2, "fork"))
    assert "in fail" in str(caught.value.__cause__)


def test_workers_end_when_this_process_is_killed():
    program = """
import os, time
from mtcnn.processes import in_processes
def pids(batch):
    return os.getpid()
results = in_processes(pids, range(2000), 1, 3, "fork")
print(len({next(results) for _ in range(300)}), flush=True)
time.sleep(600)"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "3\n"
    process.kill()
    process.wait()
    assert process.stdout.read() == ""  # the workers hold the other end, so this returns when the last has ended


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="Windows has no process groups")
@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_to_all_processes_is_one_line(number):
    program = """
from faces.files import command
from mtcnn.processes import in_processes
def wait(batch):
    import time; time.sleep(batch[0])
@command
def main():
    for _ in in_processes(wait, [0, 0, 600, 600], 1, 2, "fork"):
        print("started", flush=True)
main()"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.PIPE, start_new_session=True)
    assert process.stdout.readline() == "started\n"
    os.killpg(process.pid, getattr(signal, number))
    assert process.communicate()[1] == "-c: interrupted; run the same command again.\n"
    assert process.returncode == 128 + getattr(signal, number)


def test_a_detector_is_pickled_without_its_networks():
    """A spawned process could not use the networks of this process if they were on a GPU."""
    photo, detector = skimage.data.astronaut()[:200], Detector(min_face_size=40, device="cpu")
    expected = detector.detect(photo)
    assert "nets" not in detector.__getstate__()
    for batch in in_processes(detector.detect, [photo, photo], 1, 2, "spawn"):
        assert len(expected.scores) == 1 and abs(batch[0].landmarks - expected.landmarks).max() < 0.02


@pytest.mark.skipif(sys.platform != "linux", reason="other systems always spawn")
def test_only_a_detector_on_the_cpu_is_forked():
    assert [start_method(torch.device(name)) for name in ("cpu", "cuda:0", "mps")] == ["fork", "spawn", "spawn"]
