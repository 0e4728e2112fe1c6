"""Run a command of this project and print what its processes hold, to see that nothing grows over a large data set.

    python benchmarks/load.py --seconds 10 mtcnn/casia_landmark.py --casia DIR
    python benchmarks/load.py cosFace/casia_train.py --casia DIR --epochs 0.01 --output runs/try

Every few seconds, a line gives the memory of the first process, the largest of the others and all of them, in MB, and
the numbers of processes, threads and open files. Memory is what a process has for itself (RssAnon); the pages of a
cache that is read through a memory map are not counted, because the system takes them back when it needs them. The last
line compares the second and the last quarter of the run, also after Ctrl-C. The rate is in the command's own progress
bar. Linux only.
"""
import contextlib
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from faces.signals import end_quietly

end_quietly(__name__)    # Ctrl-C during the slow imports below prints no traceback
from faces.files import ROOT, InputError, command, script_parser

COLUMNS = "{:>8} {:>8} {:>8} {:>8} {:>6} {:>8} {:>6}"


class Sample(NamedTuple):
    """What the processes of a command hold: MB of the first, of the largest other one, and of all; and numbers."""
    seconds: float
    first: int
    largest: int
    total: int
    processes: int
    threads: int
    files: int


def processes_of(root):
    """Return the process `root` and all that it has started, directly or not, as a list of process numbers."""
    children = {}
    for process in filter(str.isdigit, os.listdir("/proc")):
        # The name of a program, in parentheses, may contain spaces; the parent is the second field behind it.
        fields = _text(f"/proc/{process}/stat").rpartition(")")[2].split()
        children.setdefault(int(fields[1]) if fields else 0, []).append(int(process))
    found = [root]
    for process in found:
        found += children.get(process, [])
    return found


def measure(root, start):
    """Return a Sample of the process `root` and those that it has started."""
    memory, threads, files = [], 0, 0
    for process in processes_of(root):
        status = dict(line.split(":", 1) for line in _text(f"/proc/{process}/status").splitlines() if ":" in line)
        memory.append(int(status.get("RssAnon", "0").split()[0]) // 1024)
        threads += int(status.get("Threads", 0))
        files += len(list(Path(f"/proc/{process}/fd").glob("*")))
    return Sample(time.monotonic() - start, memory[0], max(memory[1:], default=0), sum(memory), len(memory), threads,
                  files)


def summary(samples):
    """Return a sentence that compares the second and the last quarter of the samples, and the peak."""
    quarter = max(1, len(samples) // 4)
    early, late = samples[quarter:2 * quarter] or samples, samples[-quarter:]
    median = [[statistics.median(getattr(sample, name) for sample in part) for part in (early, late)]
              for name in ("total", "threads", "files")]
    return ("second and last quarter of the run: {:,.0f} and {:,.0f} MB, {:.0f} and {:.0f} threads, {:.0f} and {:.0f} "
            "open files; peak {:,} MB").format(*sum(median, []), max(sample.total for sample in samples))


def watch(arguments, seconds):
    """Run a script of this project, print a Sample every few seconds and the summary; return its exit status."""
    start, samples = time.monotonic(), []
    with subprocess.Popen([sys.executable, *arguments]) as process:
        print(COLUMNS.format("seconds", "first MB", "other MB", "all MB", "procs", "threads", "files"), flush=True)
        with contextlib.suppress(KeyboardInterrupt):    # the command gets it too, and ends
            while process.poll() is None:
                sample = measure(process.pid, start)
                if sample.total:    # not in the instant when it ends
                    samples.append(sample)
                    print(COLUMNS.format(round(sample.seconds), *sample[1:]), flush=True)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(seconds)
    if samples:
        print(summary(samples))
    return process.returncode


def _text(path):
    try:
        return Path(path).read_text()
    except OSError:         # the process has ended
        return ""


@command
def main(argv=None):
    parser = script_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=10, help="time between two lines, above 0 (default: 10)")
    parser.add_argument("script", help="a script of this project, such as mtcnn/casia_landmark.py")
    parser.add_argument("arguments", nargs="...", help="the script's own options")
    args = parser.parse_args(argv)
    if not Path("/proc/self/status").is_file():
        raise InputError("this system has no /proc; run the program on Linux.")
    if not args.seconds > 0:
        raise InputError(f"--seconds {args.seconds:g} is out of range; it must be above 0.")
    script = next((path for path in (Path(args.script), ROOT / args.script) if path.is_file()), None)
    if script is None:
        raise InputError(f"{args.script} does not exist; pass a script of this project.")
    return watch([str(script), *args.arguments], args.seconds)


if __name__ == "__main__":
    sys.exit(main())
