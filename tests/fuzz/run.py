"""Feed damaged files to every reader for as long as you like, and keep those that do harm.

    python tests/fuzz/run.py --seconds 3600
    python tests/fuzz/run.py --repeat runs/fuzz/images-123        # read a finding again

A worker process takes the targets in turn. It is a finding if a reader raises anything but InputError or
UnreadableImage, needs over 5 s of processor time, takes over 1 GB of memory, or kills the process. Findings are folders
in runs/fuzz with the input and what happened.
"""
import argparse
import collections
import contextlib
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]
import cv2
import torch
from targets import ALLOWED, TARGETS, attempt

from faces.files import RUNS
from faces.text import printable

SECONDS, MEMORY = 5, 10**9    # for one input
ROUND = 500                   # inputs per worker process, at most
ROUND_SECONDS = 20            # after which the next target has its turn
OUTPUT = RUNS / "fuzz"


def peak_memory(reset=False):
    """Return the peak memory of this process in bytes since the last reset, which takes Linux; elsewhere 0."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return 0


def read(call, may_refuse):
    """Return what is wrong with a reader, as text, or None."""
    before = peak_memory(reset=True)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)    # the signals end the process
    signal.setitimer(signal.ITIMER_REAL, 12 * SECONDS)
    try:
        call()
    except BaseException as error:
        if not may_refuse or not isinstance(error, ALLOWED):
            return traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    taken = peak_memory() - before
    return f"{taken / 1e9:.1f} GB" if taken > MEMORY else None


def work(target, numbers, folder):
    """Read the inputs with these numbers in a process of its own; the file `at` says which one is read."""
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (12 * MEMORY, 12 * MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    end = time.monotonic() + ROUND_SECONDS
    for number in numbers:
        if time.monotonic() > end:
            break
        with input_folder(target, number, folder) as (call, may_refuse):
            (folder / "at").write_text(str(number))
            problem = read(call, may_refuse)
        if problem:
            keep(target, number, problem)


@contextlib.contextmanager
def input_folder(target, number, folder):
    """Give what attempt() returns for a folder that is deleted afterwards."""
    path = Path(tempfile.mkdtemp(dir=folder))
    try:
        yield attempt(target, number, path)
    finally:
        shutil.rmtree(path, ignore_errors=True)


def keep(target, number, problem):
    """Save a finding with its input, unless there is one with the same traceback."""
    reports = [path.read_text() for path in OUTPUT.glob(f"{target}-*/report.txt")]
    if problem.splitlines()[:-1] in [report.splitlines()[:-1] for report in reports]:
        return
    finding = OUTPUT / f"{target}-{number}"
    finding.mkdir(parents=True, exist_ok=True)
    attempt(target, number, finding)
    (finding / "report.txt").write_text(problem)


def run_round(target, numbers, folder):
    """Return the number of inputs that a worker process read; one that kills it is the last."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            work(target, numbers, folder)
            status = 0
        except BaseException:
            (folder / "error").write_text(traceback.format_exc())
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if status == 1:
        raise SystemExit((folder / "error").read_text())
    last = int((folder / "at").read_text())
    if status:
        hung = -status in (signal.SIGPROF, signal.SIGALRM)
        keep(target, last, f"hangs ({signal.Signals(-status).name})" if hung else f"killed by signal {-status}")
    return last - numbers[0] + 1


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=60, help="how long to go on (default: 60)")
    parser.add_argument("--target", choices=TARGETS, action="append", help="only this one; may be repeated")
    parser.add_argument("--seed", type=int, help="number of the first input (default: at random, and printed)")
    parser.add_argument("--repeat", type=Path, metavar="DIR", help="read one finding again, and show what it raises")
    args = parser.parse_args()
    if args.repeat:
        TARGETS[args.repeat.name.partition("-")[0]][1](args.repeat)
        return
    number = random.randrange(10**12) if args.seed is None else args.seed
    print(f"seed {number}; findings go to {OUTPUT}", flush=True)
    counts, end = collections.Counter(), time.monotonic() + args.seconds
    with tempfile.TemporaryDirectory() as folder:
        while time.monotonic() < end:
            for target in args.target or TARGETS:
                started = time.monotonic()
                counts[target] += run_round(target, range(number, number + ROUND), Path(folder))
                counts[f"{target} s"] += round(time.monotonic() - started)
            number += ROUND
    for target in args.target or TARGETS:
        print(f"{target:12}{counts[target]:>10,} inputs in {counts[target + ' s']} s")
    findings = sorted(OUTPUT.glob("*/report.txt"))
    for finding in findings:
        print(f"{finding.parent.name}: {printable(finding.read_text().splitlines()[-1])}")
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
