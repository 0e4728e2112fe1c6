"""Run the project's own commands as subprocesses, and print each as a user would type it in the current folder."""
import os
import shlex
import signal
import subprocess
import sys

from faces.files import ROOT
from faces.signals import handled_by, leave_lost_terminal

LOCAL = ("--standalone", "--local-addr", "127.0.0.1")    # the name of a machine may have no address
PROGRAMS = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}


def command_line(script, *args, processes=1):
    """Return the words of a command.

    Args:
        script: path of one of the project's scripts, relative to the root of the clone.
        args: its arguments.
        processes: how many processes run it, with torchrun if there are several.
    """
    start = ["python"] if processes == 1 else ["torchrun", *LOCAL, "--nproc-per-node", str(processes)]
    return [*start, *map(str, (ROOT / script, *args))]


def printed(words):
    """Return a command as it is typed in the current folder: paths in the clone become relative to that folder."""
    return shlex.join(os.path.relpath(word) if word.startswith(f"{ROOT}{os.sep}") else word for word in words)


def run(words):
    """Print a command, run it to its end, and return its exit status.

    Ctrl-C reaches the command by itself, and SIGTERM and SIGHUP are passed on. This process waits until the command has
    saved its work, and then returns 128 plus the number of the signal.
    """
    print(f"\n$ {printed(words)}", flush=True)
    received, process = [], None

    def note(number, _):
        received.append(number)
        leave_lost_terminal()
        if number != signal.SIGINT and process is not None:
            process.send_signal(number)

    with handled_by(note):
        process = subprocess.Popen([*PROGRAMS[words[0]], *words[1:]])
        for number in set(received) - {signal.SIGINT}:    # before there was a process to pass them on to
            process.send_signal(number)
        status = process.wait()
    if received:
        return 128 + received[-1]
    return status if status >= 0 else 128 - status    # Popen reports a process that signal 9 killed as -9
