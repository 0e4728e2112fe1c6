"""Writes are whole or not at all, mistakes are one sentence, signals and lost output end no script badly."""
import errno
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, file_size_limit

from faces.files import InputError, atomic_write, command, load_tensors, locked, reading

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
    options = {"cwd": ROOT, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    process = subprocess.Popen([sys.executable, "-c", program], **options)
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
    for seconds, status in (("1", 0), ("60", 128 + signal.SIGINT)):
        process = start(PROGRAM.replace("60", seconds), stderr=subprocess.STDOUT)
        process.stdout.close()    # Ctrl-C ends `python ... | tee log` at both ends, tee first
        process.send_signal(signal.SIGINT if status else 0)
        assert process.wait() == status
    program = "import sys; sys.stdout = sys.stderr = None\n" + PROGRAM.replace("60", "0")    # no console
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("error, sentence", [
    (InputError("x\ny.txt is wrong; correct it."), ": x\\ny.txt is wrong; correct it.\n"), (ZeroDivisionError(), None),
    (torch.OutOfMemoryError("CUDA out of memory."), "pass --device cpu.\n"), (RuntimeError("shapes differ"), None)])
def test_mistakes_are_one_sentence_and_bugs_keep_their_traceback(error, sentence, capsys):
    @command
    def main():
        raise error
    with pytest.raises(SystemExit if sentence else type(error)) as stop:
        main()
    assert not sentence or stop.value.code == 2 and capsys.readouterr().err.endswith(sentence)


def test_a_reader_turns_any_exception_into_one_sentence(tmp_path):
    with pytest.raises(InputError, match=r"f.txt is damaged or not a list \(no digit\); download or create it again"), \
            reading("f.txt", "list"):
        raise ValueError("no digit\nand more")
    with pytest.raises(InputError, match="can't read the file of tensors .*absent.pt: No such file"):
        load_tensors(tmp_path / "absent.pt")


def test_a_write_is_whole_or_leaves_what_was_there(tmp_path):
    file = tmp_path / "a.txt"
    with atomic_write(file, "w") as output:
        output.write("old")
    with pytest.raises(ZeroDivisionError), atomic_write(file, "w") as output:
        output.write("new")
        raise ZeroDivisionError
    with pytest.raises(InputError, match="can't write .*a.txt"), file_size_limit(10), atomic_write(file) as output:
        output.write(bytes(20))
    assert file.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_a_disk_without_locks_is_no_error(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.EIO, "Input/output error")
    monkeypatch.setattr("fcntl.flock", flock)
    with locked(tmp_path / "a.lock", "testing", wait=False):
        assert "make sure that no other process is testing" in capsys.readouterr().out
