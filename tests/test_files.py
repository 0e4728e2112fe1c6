"""What is written survives planted links and full disks, and killed processes leave nothing behind."""
import errno
import os
import subprocess
import sys
from pathlib import PureWindowsPath

import pytest
import torch
from conftest import ROOT, file_size_limit

from faces import files
from faces.data.cache import load_casia
from faces.files import InputError, atomic_write, command, inside, locked, open_regular, remove_partial


@pytest.fixture
def victim(tmp_path):
    """Return a file that no link may make us change."""
    path = tmp_path / "victim"
    path.write_text("precious")
    yield path
    assert path.read_text() == "precious"


@pytest.mark.parametrize("mode", ["a", "a+b", "r+b", "r"])
def test_links_pipes_and_folders_are_not_opened(victim, tmp_path, mode):
    (tmp_path / "link").symlink_to(victim)
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "dangling", "folder", "pipe"):
        with pytest.raises(InputError, match=f"{name} is a link or not a regular file; remove it"):
            open_regular(tmp_path / name, mode)
    assert not (tmp_path / "nothing").exists()


def test_a_file_that_becomes_a_link_after_the_check_is_not_opened(victim, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(victim)
    monkeypatch.setattr(os.path, "islink", lambda _: False)
    with pytest.raises(OSError):
        open_regular(tmp_path / "link", "a")


def test_a_lock_that_is_a_link_is_refused(victim, tmp_path):
    (tmp_path / ".lock").symlink_to(victim)
    with pytest.raises(InputError, match="lock is a link"), locked(tmp_path / ".lock", "testing"):
        pass


def test_a_disk_without_locks(tmp_path, monkeypatch, capsys):
    """Such as Lustre mounted with noflock. filelock's own fallback would wait for a process that does not exist."""
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")
    monkeypatch.setattr("fcntl.flock", flock)
    with locked(tmp_path / "a.lock", "testing", wait=False):
        assert "on a disk without file locks; make sure that no other process is testing" in capsys.readouterr().out
    with pytest.raises(InputError, match="can't lock .*b.lock: .*; choose"), locked(tmp_path / "b.lock", "testing"):
        pass


@pytest.mark.parametrize("name", ["../a.jpg", "b/../../a.jpg", "/a.jpg", "C:a.jpg", "C:\\a.jpg", "..\\a.jpg"])
def test_paths_from_files_stay_in_their_folder_on_windows_too(name, monkeypatch):
    monkeypatch.setattr(files, "Path", PureWindowsPath)
    with pytest.raises(InputError, match="leaves E:"):
        inside("E:/data", name)
    assert inside("E:/data", "b/a.jpg") == PureWindowsPath("E:/data/b/a.jpg")


@pytest.mark.parametrize("name", ["faces.u8", "journal.jsonl"])
def test_a_link_in_an_unfinished_cache_is_refused(victim, casia, tmp_path, name):
    load_casia(casia, cache=tmp_path)
    folder, = tmp_path.glob("casia*")
    (folder / "cache.json").unlink()
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(victim)
    with pytest.raises(InputError, match=f"{name} is a link"):
        load_casia(casia, cache=tmp_path)


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    others = [".list.txt.partial", ".list.txt.lock", ".list.txt.abc.partial", "list.txt", ".other.txt.abcd1234.partial"]
    for name in [*others, ".list.txt.abcd1234.partial"]:
        (tmp_path / name).touch()
    remove_partial(tmp_path / "list.txt", tmp_path / "missing" / "list.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)
    with atomic_write(tmp_path / "new.txt"):
        left, = tmp_path.glob(".new.txt.*.partial")    # named as atomic_write() does
    left.touch()
    remove_partial(tmp_path / "new.txt")
    assert (tmp_path / "new.txt").exists() and not left.exists()


def test_a_gpu_without_enough_memory_is_one_sentence(capsys):
    @command
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory.")
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and "too little free memory; pass --device cpu" in capsys.readouterr().err


def test_a_full_disk_where_nothing_expects_it_is_one_sentence(tmp_path, capsys):
    @command
    def main():
        with file_size_limit(0), open(tmp_path / "log", "wb", buffering=0) as file:
            file.write(b"more")
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "can't write: " in capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no device that is always full")
@pytest.mark.parametrize("text", ["short", "long" * 10_000], ids=["at the end", "within main"])
def test_output_that_is_redirected_to_a_full_disk_is_one_sentence(text):
    program = f"from faces.files import command\n@command\ndef main(): print({text!r})\nmain()"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr.startswith("-c: can't write: No space left on device; free")
    assert done.stderr.count("\n") == 1
