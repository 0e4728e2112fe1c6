"""Worker processes: results in order, bounded memory, and an end to everything whoever dies first."""
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from faces.files import InputError
from mtcnn.processes import AHEAD, in_processes

CPU = torch.device("cpu")


def squares(batch):
    """Square numbers in a process that gets the signal that a terminal sends to all processes."""
    os.kill(os.getpid(), signal.SIGINT)
    return [number ** 2 for number in batch]


def die(batch):
    if batch == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return batch


def fail(batch):
    raise ZeroDivisionError("on purpose")


@pytest.mark.parametrize("device", [CPU, torch.device("cuda")], ids=["forked", "spawned"])
def test_results_are_in_order_and_only_this_process_heeds_signals(device):
    assert list(in_processes(squares, ([n, n + 1] for n in range(20)), 2, device)) == [
        [n ** 2, (n + 1) ** 2] for n in range(20)]


def test_batches_are_taken_when_they_are_needed():
    taken = []
    results = in_processes(die, (taken.append(n) or n for n in range(10, 200)), 2, CPU)
    assert next(results) == 10 and len(taken) == 2 * AHEAD
    assert list(results) == list(range(11, 200)) and not list(in_processes(die, [], 2, CPU))


def test_a_killed_worker_and_an_exception_in_one():
    with pytest.raises(InputError, match="a worker process was killed; run the same command again"):
        list(in_processes(die, range(20), 2, CPU))
    with pytest.raises(ZeroDivisionError, match="on purpose") as caught:
        list(in_processes(fail, range(20), 2, CPU))
    assert "in fail" in str(caught.value.__cause__)


PROGRAM = """
import os, time
import torch
from faces.files import command
from mtcnn.processes import in_processes
def work(batch):
    time.sleep(batch)
@command
def main():
    for _ in in_processes(work, [0, 0, 600, 600], 2, torch.device("cpu")):
        print("started", flush=True)
main()"""


@pytest.mark.parametrize("end, to_all", [("SIGKILL", False), ("SIGINT", True)])
def test_busy_workers_end_with_this_process(end, to_all):
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], cwd=ROOT, text=True, start_new_session=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == "started\n"
    (os.killpg if to_all else os.kill)(process.pid, getattr(signal, end))
    _, errors = process.communicate(timeout=60)    # returns when the last worker, which holds the pipes too, has ended
    assert errors == ("" if end == "SIGKILL" else "-c: interrupted.\n")
