"""Writes are whole or not at all, mistakes are one sentence, signals and lost output end no script badly."""
import argparse
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, file_size_limit

from faces.files import InputError, at_least, atomic_write, command, load_tensors, locked, path, reading

PROGRAM = """
import sys, time
from faces.files import command
@command
def main():
    try:
        print("started", flush=True)
        time.sleep(60)
    finally:
        print("cleaned up", flush=True)
main()
"""


def start(program=PROGRAM, **options):
    """Start a program that prints "started", and wait until it does; return the Popen."""
    options = {"stdout": subprocess.PIPE, **options}
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, text=True, stderr=subprocess.PIPE, **options)
    assert process.stdout.readline() == "started\n"
    return process


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_a_script_with_one_line_after_its_cleanup(number):
    process, number = start(), getattr(signal, number)
    process.send_signal(number)
    assert process.communicate() == ("cleaned up\n", "-c: interrupted.\n")
    assert process.returncode == 128 + number


def test_signals_that_the_caller_ignores_stay_ignored():
    process = start(preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))    # as nohup does
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM


def test_output_that_nobody_reads_is_dropped():
    process = start(PROGRAM.replace("60", "1"))
    process.stdout.close()
    assert process.wait() == 0 and process.stderr.read() == ""
    program = "import sys; sys.stdout = sys.stderr = None\n" + PROGRAM.replace("60", "0")    # no console
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


def run(main, capsys):
    """Run a decorated function that fails; return its exit status and what it wrote to stderr."""
    with pytest.raises(SystemExit) as stop:
        command(main)()
    return stop.value.code, capsys.readouterr().err


def test_mistakes_are_one_sentence_and_bugs_keep_their_traceback(tmp_path, capsys):
    def mistake():
        raise InputError("x.txt is wrong; correct it.")

    def full_disk():
        with file_size_limit(0), open(tmp_path / "log", "wb", buffering=0) as file:
            file.write(b"more")

    def gpu_memory():
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def bug():
        raise ZeroDivisionError
    status, error = run(mistake, capsys)
    assert status == 2 and error.endswith(": x.txt is wrong; correct it.\n")
    status, error = run(gpu_memory, capsys)
    assert status == 2 and "too little free memory; free some, or pass --device cpu" in error
    with pytest.raises(OSError):    # beyond a limit of the process, which is not a full disk
        command(full_disk)()
    with pytest.raises(ZeroDivisionError):
        command(bug)()


def test_a_reader_turns_any_exception_into_one_sentence(tmp_path):
    with pytest.raises(InputError, match=r"f.txt is damaged or not a list \(no digit\); download or create it again"), \
            reading("f.txt", "list"):
        raise ValueError("no digit\nand more")
    with pytest.raises(InputError, match="can't read the file of tensors .*absent.pt: No such file"):
        load_tensors(tmp_path / "absent.pt")


def test_a_write_is_whole_or_leaves_what_was_there(tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    with atomic_write(file, "w") as output:
        output.write("old")
    with pytest.raises(ZeroDivisionError), atomic_write(file, "w") as output:
        output.write("new")
        raise ZeroDivisionError
    with pytest.raises(InputError, match="can't write .*a.txt"), file_size_limit(10), atomic_write(file) as output:
        output.write(bytes(20))
    assert file.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]

    def chmod(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")    # as on exFAT and some network disks
    monkeypatch.setattr(os, "chmod", chmod)
    with atomic_write(file, "w") as output:
        output.write("new")
    assert file.read_text() == "new"


def test_a_disk_without_locks_is_no_error(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.EIO, "Input/output error")
    monkeypatch.setattr("fcntl.flock", flock)
    with locked(tmp_path / "a.lock", "testing", wait=False):
        assert "make sure that no other process is testing" in capsys.readouterr().out


def test_options(monkeypatch):
    assert path("~/x") == Path.home() / "x" and path(Path("y")) == Path("y")
    assert at_least(1)("3") == 3 and at_least(0, float)("0.5") == 0.5
    for text in ("0", "inf", "nan"):
        with pytest.raises(argparse.ArgumentTypeError):
            at_least(1, float)(text)
