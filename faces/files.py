"""Files that are whole or absent: everything is written beside its place and moved there when complete."""
import contextlib
import json
import os
import tempfile
from pathlib import Path

from filelock import FileLock, Timeout

from faces.errors import InputError


@contextlib.contextmanager
def atomic_write(path, mode="wb", **kwargs):
    """Open a temporary file beside `path`; on a clean exit it is flushed to disk and takes the name `path`.

    On any error, a full disk included, the temporary file goes and what was at `path` stays.

    Raises:
        InputError: the folder or the file can't be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
        try:
            with os.fdopen(handle, mode, **kwargs) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files that only their owner can read
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InputError(f"can't write {path}: {error.strerror or error}; free some space or choose another "
                         "place.") from None


@contextlib.contextmanager
def locked(path, what):
    """Hold the lock file `path`, which one process on the machine can do at a time; the others wait here.

    Args:
        what: what the holder does, for the line that a waiting process prints, as in "building the cache DIR".

    Raises:
        InputError: the lock file can't be written.
    """
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"another process is {what}; waiting until it is done", flush=True)
            lock.acquire()
    except (OSError, NotImplementedError) as error:    # the latter where the file system has no locks
        raise InputError(f"can't lock {path}: {error.strerror if isinstance(error, OSError) else error}; choose a "
                         "folder that can be written, on a local disk.") from None
    try:
        yield
    finally:
        lock.release()


def write_json(path, value):
    """Write `value` as indented JSON, atomically."""
    with atomic_write(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2) + "\n")


def folder(path, what):
    """Return `path` as a Path if it is a folder that exists.

    Args:
        what: what it should hold, for the message, as in "LFW images".
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        found = "is not a folder" if path.exists() else "does not exist"
        raise InputError(f"{path} {found}; give the folder that holds {what}.")
    return path


def inside(root, name):
    """Return root / name for a `name` read from a file, which must not leave `root`.

    Raises:
        InputError: the name is absolute or climbs out of the folder.
    """
    relative = Path(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise InputError(f"the path {name!r} leaves {root}; lists may only name files below it.")
    return Path(root) / relative
