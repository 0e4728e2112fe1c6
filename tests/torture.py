"""Kill the long jobs at random moments, run them twice at once, and fill their disks; the results must not change.

    make torture                                            100 kills of each job; half an hour on two cores
    python tests/torture.py --kills 10 --jobs embed lists   less of it

The jobs are landmark lists, the cache of aligned faces, training, and embed.py, on few photos and with a tiny network.
Each is run once without disturbance. Then it is ended by SIGKILL, SIGTERM or Ctrl-C again and again, until a last run
may finish; its files must equal those of the first run, byte for byte. Two processes at once must end with the same
files too, and so must a disk that fills up and is enlarged. That part needs root on Linux, which may mount a disk.
Processes are forked from this one, so that they start within milliseconds.
"""
import argparse
import contextlib
import ctypes
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "training"), str(TESTS / "tools")]
import skimage.data
import tiny_train
import torch._dynamo  # noqa: F401    imported here, so that it isn't in each process
import torch.utils.tensorboard  # noqa: F401
from conftest import tensors, write_image
from helpers import write_model

import faces.plots  # noqa: F401
import mtcnn.casia_landmark
import mtcnn.lfw_landmark
import tools.embed
from faces.cpu import kernels
from faces.data import cache
from faces.files import command

END = 600           # seconds after which a process hangs
BY_USER = (signal.SIGTERM, signal.SIGINT)


class Job(NamedTuple):
    """A command; all that it writes, except for photos that it reads, is below `folder`."""
    name: str
    main: callable
    options: list
    folder: Path

    def results(self):
        """Return {name: content} of the files that must be the same after every kind of disturbance."""
        files = [path for path in self.folder.rglob("*") if path.is_file() and not path.name.endswith(".lock")
                 and not path.name.startswith(("events.", "settings.json", "training.png"))]
        return {str(path.relative_to(self.folder)): _content(path) for path in sorted(files)}


def _content(path):
    if path.suffix == ".pt":    # equal objects are pickled differently if some of them are the same object
        state = torch.load(path, weights_only=True)
        others = {name: state[name] for name in ("step", "settings", "faces")}
        # An interruption changes over which steps the log takes its means, and so their rounding.
        others |= {name: round(total, 4) for name, total in state["epoch"].items()}
        return {name: tensor.numpy().tobytes() for name, tensor in tensors(state).items()} | others
    if path.name != "epochs.jsonl":
        return path.read_bytes()
    lines = map(json.loads, path.read_text().splitlines())
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in lines]


def make_jobs(root):
    """Write photos and a model into a folder; return the list of Jobs on them."""
    cache.CHUNK, cache.BLOCK, tools.embed.PART = 4, 2, 3
    kernels.LIBRARY_FOLDER = root / "kernels"
    jobs, search = [], ["--device", "cpu", "--workers", "2"]

    def add(name, main, *options):
        folder = root / name
        jobs.append(Job(name, main, [str(option).replace("FOLDER", str(folder)) for option in options], folder))

    def finish_now(name, main, *options):
        add(name, main, *options)
        status, output = run(jobs[-1])
        check(status == 0, jobs.pop(), output)

    # In a process too, because a process that has computed with several threads can't be forked.
    finish_now("inputs", lambda _: write_inputs(root))
    lists = [*search, "--batch-size", 1, "--output", "FOLDER/list.txt"]
    add("lists", mtcnn.lfw_landmark.main, "--lfw", root / "photos", *lists)
    add("casia-lists", mtcnn.casia_landmark.main, "--casia", root / "photos", *lists)
    few = [root / f"photos/P0{i}" for i in range(5)]
    add("embed", tools.embed.main, *few, "--model", root / "model.pt", *search, "--output", "FOLDER/faces.npz")
    labels = root / "labels.txt"    # one file for both, so that the cache does not depend on the other jobs
    finish_now("labels", mtcnn.casia_landmark.main, "--casia", root / "photos", *search, "--output", labels)
    train = ["--casia", root / "photos", "--landmarks", labels, "--cache", "FOLDER/cache", "--output", "FOLDER/run",
             "--device", "cpu", "--precision", "float32", "--batch-size", 4, "--resume", "auto"]
    add("cache", command(lambda argv: cache.load_casia(argv[1], argv[3], argv[5]) and None), *train)
    add("training", tiny_train.main, *train, "--epochs", 10, "--checkpoint-every", 3, "--keep-last", 2)
    return jobs


def write_inputs(root):
    photo = skimage.data.astronaut()
    for i in range(48):
        write_image(root / f"photos/P{i // 4:02d}/{i % 4}.png", photo[i:240 - i, 90 + i:350])
    write_image(root / "photos/P00/blank.png", photo[:60, :60] // 8)
    write_model(root / "model.pt")


def start(job):
    """Start a job in a process group of its own; return its process ID."""
    job.folder.mkdir(exist_ok=True, parents=True)
    if pid := os.fork():
        return pid
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # as scripts have it outside of main()
    log = os.open(log_of(job, os.getpid()), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1), os.dup2(log, 2)
    sys.argv[0], status = job.name, 1
    try:
        status = job.main(job.options) or 0
    except SystemExit as exit:
        status = exit.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def log_of(job, pid):
    return job.folder.parent / f"{job.name}-{pid}.log"


def finish(job, pid):
    """Wait for a job; return its status, minus the signal if that ended it, and its output, which may be no traceback.

    Fails if it hangs, or if a worker process outlives it.
    """
    deadline = time.monotonic() + END
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.killpg(pid, signal.SIGKILL)
            check(False, job, "hangs, see", log_of(job, pid))
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(pid, 0)
            time.sleep(0.01)
        check(False, job, "left processes behind")
    output = log_of(job, pid).read_text(errors="replace") if log_of(job, pid).exists() else ""
    check("Traceback" not in output and "Exception ignored" not in output, job, output)
    log_of(job, pid).unlink(missing_ok=True)
    return os.waitstatus_to_exitcode(ended[1]), output


def run(job):
    """Run a job to its end; return its status and its output."""
    return finish(job, start(job))


def check(condition, job, *problem):
    if not condition:
        sys.exit(f"torture: {job.name}: {' '.join(map(str, problem))}; see {job.folder}")


def check_equal(job, expected, after):
    """Check that a job's files are those of the first run, no more and no fewer."""
    files = job.results()
    other = sorted(name for name in files | expected if files.get(name) != expected.get(name))
    check(not other, job, "has other files after", after, other)
    shutil.rmtree(job.folder)


def kill_often(job, expected, seconds, kills, rng):
    """End a job by `kills` signals at random moments, then let it finish."""
    killed = runs = finished = 0
    while killed < kills:
        pid, runs = start(job), runs + 1
        time.sleep(rng.uniform(0, rng.choice((0.1, 0.5, 1)) * seconds))
        number = rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, *BY_USER))
        with contextlib.suppress(ProcessLookupError):    # it may have finished
            rng.choice((os.kill, os.killpg))(pid, number)
        status, output = finish(job, pid)
        check(status in (0, -number, 128 + number), job, "ended with status", status, output)
        check(status != 128 + number or "continue" in output or "interrupted" in output, job, output)
        killed += status != 0
        if status == 0:
            finished += 1
            check_equal(job, expected, f"{killed} kills")
    status, output = run(job)
    check(status == 0, job, output)
    check_equal(job, expected, f"{killed} kills")
    print(f"{job.name}: {killed} kills in {runs} runs of up to {seconds:.1f} s, {finished + 1} results, all equal")


def two_at_once(job, expected, seconds, rounds, rng):
    """Run a job twice at the same time, and in every second round kill one of the two."""
    waited = refused = 0
    for i in range(rounds):
        pids = [start(job), start(job)]
        if i % 2:
            time.sleep(rng.uniform(0, seconds))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pids[0], signal.SIGKILL)
        ends = [finish(job, pid) for pid in pids]
        for status, output in ends:
            check(status in (0, -signal.SIGKILL) or status == 2 and ("another process is" in output or
                  "already holds a run" in output), job, "beside another one:", output)
            refused, waited = refused + (status == 2), waited + ("waiting for it" in output)
        if all(status for status, _ in ends):    # the one that was killed had refused the other
            check(run(job)[0] == 0, job, "can't continue")
        check_equal(job, expected, "two at once")
    print(f"{job.name}: {rounds} times two at once, {waited} waited and {refused} were refused, all equal")


def fill_disk(job, expected):
    """Run a job on a disk that is too small and grows, and on a read-only one; /dev/shm is tiny too."""
    job.folder.mkdir()
    mount("--make-rprivate", "/")
    mount("-t", "tmpfs", "-o", "size=64k", "tmpfs", "/dev/shm")
    mount("-t", "tmpfs", "-o", "size=4k", "tmpfs", job.folder)
    full, size, status = 0, 4096, None
    while status != 0:
        mount("-o", f"remount,size={size}", job.folder)
        status, output = run(job)
        check(status in (0, 2), job, "on a full disk:", output)
        full, size = full + (status == 2), int(size * 1.2) + 4096
        check(size < 1e9, job, "does not continue", output)
    check(job.results() == expected, job, "has other files after its disk was full")
    for path in [*job.folder.rglob("*")]:
        if path.is_file():
            path.unlink()
    mount("-o", "remount,ro", job.folder)
    status, output = run(job)
    check(status == 2 and "can't" in output, job, "on a read-only disk:", output)
    print(f"{job.name}: a disk that was full {full} times and a read-only one, all equal", flush=True)


def mount(*args):
    subprocess.run(["mount", *map(str, args)], check=True)


def in_own_mounts(function, *args):
    """Call a function in a process that can mount disks without anybody else seeing them."""
    if not hasattr(os, "geteuid") or os.geteuid() or sys.platform != "linux":
        print("full disks are skipped: only root on Linux can mount some")
        return
    if pid := os.fork():
        if os.waitpid(pid, 0)[1]:
            sys.exit(1)
        return
    status = 1
    try:
        if ctypes.CDLL(None).unshare(0x20000):    # CLONE_NEWNS
            print("full disks are skipped: the system does not allow mounts")
        else:
            function(*args)
        status = 0
    except SystemExit as exit:
        print(exit.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, metavar="N", help="per job (default: 100)")
    parser.add_argument("--jobs", nargs="+", metavar="JOB",
                        help="lists casia-lists embed cache training (default: all)")
    parser.add_argument("--seed", type=int, help="of the moments (default: a new one each time)")
    args = parser.parse_args()
    seed = random.randrange(10**6) if args.seed is None else args.seed
    root = Path(tempfile.mkdtemp(prefix="torture-"))
    print(f"seed {seed}, folder {root}", flush=True)
    for job in make_jobs(root):
        if args.jobs and job.name not in args.jobs:
            continue
        rng, started = random.Random(f"{seed} {job.name}"), time.monotonic()
        status, output = run(job)
        seconds, expected = time.monotonic() - started, job.results()
        check(status == 0, job, output)
        shutil.rmtree(job.folder)
        kill_often(job, expected, seconds, args.kills, rng)
        two_at_once(job, expected, seconds, max(2, args.kills // 10), rng)
        in_own_mounts(fill_disk, job, expected)
        shutil.rmtree(job.folder, ignore_errors=True)
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
