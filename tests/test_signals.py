"""Ctrl-C, SIGTERM and SIGHUP end every script at any moment with one line at most, and with the right status."""
import os
import signal
import subprocess
import sys

import pytest
from conftest import FOLDERS, ROOT

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has other signals")
SCRIPTS = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")
                 if "sys.path.insert" in path.read_text(encoding="utf-8"))
PROGRAM = """
import sys, time
from faces.files import command
from faces.signals import end_quietly, resumable
end_quietly(__name__)
@command
def main():
    with resumable():
        try:
            print("started", flush=True)
            time.sleep(60)
        finally:
            print("cleaned up", flush=True)
"""


def start(program=PROGRAM + "main()", **options):
    """Start a program that prints "started", and wait until it does; return the Popen."""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.PIPE, **options)
    assert process.stdout.readline() == "started\n"
    return process


def test_ctrl_c_during_the_imports_of_any_script_is_silent(tmp_path):
    for name in ("cv2", "filelock", "numpy", "torch", "tqdm"):    # whichever is imported first presses Ctrl-C
        (tmp_path / f"{name}.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\n")
    processes = [subprocess.Popen([sys.executable, path], stderr=subprocess.PIPE, text=True,
                                  env={**os.environ, "PYTHONPATH": str(tmp_path)}) for path in SCRIPTS]
    ends = [(process.communicate()[1], process.returncode) for process in processes]
    assert len(SCRIPTS) > 15 and set(ends) == {("", -signal.SIGINT)}


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_main_with_one_line_after_its_cleanup(number):
    process, number = start(), getattr(signal, number)
    process.send_signal(number)
    assert process.communicate() == ("cleaned up\n",
                                     "-c: interrupted; the same command continues where it stopped.\n")
    assert process.returncode == 128 + number


def test_a_signal_in_a_callback_whose_exceptions_python_ignores_ends_main_too():
    destructor = "type('D', (), {'__del__': lambda _: (print('started', flush=True), time.sleep(60))})()"
    process = start("import time\nfrom faces.files import command\n@command\ndef main():\n"
                    f"    {destructor}\n    time.sleep(60)\nmain()")
    process.send_signal(signal.SIGTERM)
    assert process.communicate() == ("", "-c: interrupted; run the same command again.\n")
    assert process.returncode == 128 + signal.SIGTERM


def test_a_signal_that_c_code_turns_into_another_exception_ends_main_too():
    process = start("import time\nfrom faces.files import command\n@command\ndef main():\n"
                    "    print('started', flush=True)\n    try:\n        time.sleep(60)\n"
                    "    except BaseException:\n        raise ValueError from None\nmain()")
    process.send_signal(signal.SIGTERM)
    assert process.communicate() == ("", "-c: interrupted; run the same command again.\n")
    assert process.returncode == 128 + signal.SIGTERM


def test_ctrl_c_after_main_is_silent():
    process = start(PROGRAM + "import atexit; atexit.register(time.sleep, 60); time.sleep = lambda _: None; main()\n"
                    "print('main has ended', flush=True)")
    assert process.stdout.readline() + process.stdout.readline() == "cleaned up\nmain has ended\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate() == ("", "") and process.returncode == -signal.SIGINT


def test_signals_that_the_caller_ignores_stay_ignored():
    process = start(preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))    # as nohup does
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM


def test_a_closed_terminal_is_like_any_signal():
    terminal, other_end = os.openpty()
    attach = "import fcntl, os, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
    process = subprocess.Popen([sys.executable, "-c", attach + PROGRAM + "main()"], cwd=ROOT, stdin=other_end,
                               stdout=other_end, stderr=other_end, start_new_session=True)
    os.close(other_end)
    assert os.read(terminal, 7) == b"started"
    os.close(terminal)    # the system sends SIGHUP, and writing to the terminal is an error now
    assert process.wait() == 128 + signal.SIGHUP
