"""Atomic writes, file locks, paths that stay in their folder, and errors as one sentence."""
import argparse
import contextlib
import errno
import functools
import inspect
import io
import json
import os
import re
import signal
import stat
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock, Timeout

from faces.signals import stopped_by_signals
from faces.text import printable

ROOT = Path(__file__).resolve().parents[1]    # the clone
CACHE = ROOT / "cache"                        # landmark lists, aligned faces, compiled kernels
RUNS = ROOT / "runs"                          # training runs
# Errors of a disk that can happen wherever something is written or printed.
DISK = {errno.ENOSPC, errno.EFBIG, errno.EROFS, errno.EIO, getattr(errno, "EDQUOT", errno.ENOSPC)}
MAX_JSON = 16 * 10**6                         # bytes of a JSON file, which can take 30 times that in memory
MAX_ZIP_LIST = 64 << 20                       # bytes of a zip's list of files; that of a zip of CASIA has 50 million


class InputError(Exception):
    """A mistake the user can fix. The message is one sentence that names the file and says what to do."""

    status = 2    # exit status of the script


class TemporaryError(InputError):
    """A failure that is not the user's: the same command, or its continuation, may succeed later."""

    status = 75    # EX_TEMPFAIL of sysexits.h, for job scripts that try again


def command(main):
    """Decorate a script's main(): InputError prints `script: sentence` and exits with its status.

    So do Ctrl-C, SIGTERM and SIGHUP, with 128 plus the number of the signal, and a GPU without enough memory, or a
    full or broken disk, where nothing else expects it. Any other exception is a bug of ours and keeps its traceback.
    """
    @functools.wraps(main)
    def run(*args, **kwargs):
        script = os.path.basename(sys.argv[0])
        for stream in (sys.stdout, sys.stderr):    # names of files may have letters that the console lacks
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        try:
            with stopped_by_signals():
                status = main(*args, **kwargs)
                sys.stdout.flush()    # now, because Python would print a traceback if it failed at exit
                return status
        except InputError as error:
            _exit(f"{script}: {printable(str(error))}", error.status)
        except KeyboardInterrupt as stop:
            advice = "the same command continues where it stopped" if hasattr(stop, "resumable") else \
                "run the same command again"
            _exit(f"{script}: interrupted; {advice}.", 128 + getattr(stop, "number", signal.SIGINT))
        except BrokenPipeError:    # `lfw_eval.py | head` is not an error
            _exit(None, 141)
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":    # of torch, which is not imported everywhere
                raise
            _exit(f"{script}: the GPU has too little free memory; pass --device cpu, or a smaller --batch-size if the "
                  "script has that option.", InputError.status)
        except OSError as error:
            if error.errno not in DISK:
                raise
            where = f" {error.filename}" if error.filename else ""
            _exit(f"{script}: can't write{where}: {error.strerror}; free some space or choose another disk, and run "
                  "the command again.", InputError.status)
    return run


def _exit(message, status):
    with contextlib.suppress(OSError):    # the terminal may be gone, or the disk full that stderr is redirected to
        if message:
            print(message, file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:    # Python would try again at exit and complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


def script_parser(doc):
    """Return an argparse.ArgumentParser whose --help starts with the first paragraph of a script's docstring, and ends
    with the others.
    """
    summary, _, details = doc.partition("\n\n")
    return argparse.ArgumentParser(description=summary, epilog=details,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)


@contextlib.contextmanager
def atomic_write(path, mode="wb", **kwargs):
    """Open a temporary file beside `path`; on success it is flushed to disk and renamed to `path`.

    On any error, including a full disk, the temporary file is deleted and whatever was at `path` stays. Text may
    contain names of files that are not UTF-8.

    Raises:
        InputError: the folder or the file can't be written.
    """
    path = Path(path)
    if "b" not in mode:
        kwargs.setdefault("errors", "surrogateescape")
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
            os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes the file readable by its owner only
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InputError(f"can't write {path}: {error.strerror or error}; free some space or choose another "
                         "place.") from None


def remove_partial(*paths):
    """Delete what killed processes have left of atomic_write(path); the caller holds a lock on each path."""
    for path in map(Path, paths):
        pattern = re.compile(re.escape(f".{path.name}.") + r"[a-z0-9_]{8}\.partial")    # as tempfile names them
        for other in path.parent.iterdir() if path.parent.is_dir() else ():
            if pattern.fullmatch(other.name):
                other.unlink(missing_ok=True)


def open_regular(path, mode, **kwargs):
    """Open a file that is kept open, such as a journal, like open(); never through a link, and never a pipe or device.

    Whoever can write to the folder could otherwise choose the file that is overwritten, or make us wait forever.

    Raises:
        InputError: it is a link or not a regular file.
        OSError: it can't be opened.
    """
    def opener(name, flags):
        return os.open(name, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o666)
    refused = InputError(f"{path} is a link or not a regular file; remove it.")
    if os.path.islink(path) or os.path.exists(path) and not os.path.isfile(path):
        raise refused
    file = open(path, mode, opener=opener, **kwargs)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):    # it has just been exchanged
        file.close()
        raise refused
    return file


def write_json(path, value):
    """Write `value` as indented JSON, atomically."""
    with atomic_write(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2) + "\n")


def read_bytes(path, limit):
    """Return the content of a regular file.

    Raises:
        OSError: it can't be read, is not a regular file, or has more than `limit` bytes.
    """
    # Opening a named pipe would wait for a writer forever without O_NONBLOCK, which regular files ignore.
    def opener(path, flags):
        return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))

    with open(path, "rb", buffering=0, opener=opener) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(0, "not a regular file")
        if status.st_size > limit:
            raise OSError(0, f"over {limit // 10**6} MB")
        return file.read(status.st_size)


class ZipReader(io.BufferedReader):
    """A zip file whose list of files can't be so long that it would fill the memory; zipfile reads it at once."""

    def __init__(self, path):
        super().__init__(open(path, "rb", buffering=0))

    def read(self, size=-1):
        if size > MAX_ZIP_LIST:
            raise InputError(f"{self.name} has a list of files over {MAX_ZIP_LIST >> 20} MiB; split it, or unpack it.")
        return super().read(size)


def entries_of_zip(path):
    """Return the list of zipfile.ZipInfo of a zip; raises many kinds of exceptions on damaged files."""
    with ZipReader(path) as file, zipfile.ZipFile(file) as archive:
        return archive.infolist()


def read_json(path, advice):
    """Return the object in a JSON file that write_json() wrote, as a dict; None if there is no such file.

    Args:
        advice: what to do about a damaged file, for the error message.

    Raises:
        InputError: the file can't be read, has more than MAX_JSON bytes, or is not a JSON object.
    """
    try:
        value = json.loads(read_bytes(path, MAX_JSON).decode())
        if not isinstance(value, dict):
            raise ValueError
        return value
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"can't read {path}: {error.strerror or error}; {advice}.") from None
    except (ValueError, RecursionError):    # not UTF-8, not JSON, a number of 5,000 digits, or nested without end
        raise InputError(f"{path} is damaged; {advice}.") from None


@contextlib.contextmanager
def locked(path, activity, wait=True, advice="choose a writable folder on a local disk"):
    """Hold the lock file `path`. If another process holds it, say so once and wait.

    Args:
        path: the lock file; its folder is created.
        activity: what the holder is doing, for that message, such as "building the cache DIR".
        wait: whether to wait for another process; otherwise, that is an error, and a disk without locks is none.
        advice: what to do if there can be no lock, for the error message; it should name the option.

    Raises:
        InputError: the lock file can't be written or is a link, its file system has no locks, or it is held and `wait`
            is false.
    """
    # Without flock, filelock 4 would create a marker file instead, which waits forever for one of a killed process.
    strict = "fallback_to_soft" in inspect.signature(FileLock.__init__).parameters
    lock = FileLock(path, **({"fallback_to_soft": False} if strict else {}))
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        open_regular(path, "a").close()    # old versions of filelock follow links and empty what they find
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not wait:
                raise InputError(f"another process is {activity}; let it finish, or choose another --output.") from None
            print(f"another process is {activity}; waiting for it to finish", flush=True)
            lock.acquire()
    except (OSError, NotImplementedError) as error:  # filelock raises the latter where there is no flock
        if not wait and getattr(error, "errno", errno.ENOSYS) in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            print(f"{Path(path).parent} is on a disk without file locks; make sure that no other process is {activity}")
            yield
            return
        raise InputError(f"can't lock {path}: {getattr(error, 'strerror', None) or error}; {advice}.") from None
    try:
        yield
    finally:
        lock.release()


def check_writable(folder, option="--output"):
    """Create a folder, and check that files can be written into it, before the work whose results it is for.

    Raises:
        InputError: it can't be created or written; the message names the option.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"can't write into the folder {folder}: {error.strerror or error}; choose another "
                          f"{option}.") from None


def version(path):
    """Return a string that changes when a file does, its size and modification time; "" if there is no such file."""
    try:
        status = os.stat(path)
    except OSError:
        return ""
    return f"{status.st_size} {status.st_mtime_ns}"


def folder(path, content):
    """Return `path` as a Path if it is an existing folder.

    Args:
        content: what the folder should hold, for the error message, such as "LFW images".

    Raises:
        InputError: there is no such folder.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        problem = "is not a folder" if path.exists() else "does not exist"
        raise InputError(f"{path} {problem}; pass the folder that holds {content}.")
    return path


def inside(root, name):
    """Return root / name for a `name` that was read from a file.

    Raises:
        InputError: the name is absolute or climbs out of `root`.
    """
    relative = Path(name)
    if relative.drive or relative.root or ".." in relative.parts:    # on Windows, /a and C:a are not absolute
        raise InputError(f"the path {name!r} leaves {root}; lists may only name files below it.")
    return Path(root) / relative
