"""Paths, atomic writes, locks, and mistakes of the user as one sentence."""
import argparse
import contextlib
import errno
import functools
import json
import os
import pickle
import secrets
import signal
import stat
import sys
import tempfile
import threading
import warnings
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]    # the clone
CACHE = ROOT / "cache"                        # landmark lists, aligned faces, compiled kernels
RUNS = ROOT / "runs"                          # training runs
CHECKPOINT = "faces-checkpoint-1"             # the entry "format" of a checkpoint of this project
MAX_WEIGHTS = 16 * 10**9                      # bytes of a file of weights that can't be mapped into memory


class InputError(Exception):
    """A mistake the user can fix. The message is one sentence that names the file and says what to do."""

    status = 2    # exit status of the script

    def __str__(self):
        return super().__str__().replace("\n", "\\n")    # in the name of a file


class TemporaryError(InputError):
    """A failure that is not the user's: the same command may succeed later."""

    status = 75    # EX_TEMPFAIL of sysexits.h, for job scripts that try again


def command(main):
    """Decorate a script's main(): InputError prints `script: sentence` and exits with its status. So do Ctrl-C, SIGTERM
    and SIGHUP, with 128 plus the number of the signal. What can't be printed, because there is no console or the reader
    of a pipe has ended, is dropped. Any other exception is a bug and keeps its traceback."""
    @functools.wraps(main)
    def run(*args, **kwargs):
        sys.stdout, sys.stderr = Output(sys.stdout, 1), Output(sys.stderr, 2)
        script = os.path.basename(sys.argv[0])
        try:
            with on_signals(_stop):
                return main(*args, **kwargs)
        except InputError as error:
            message, status = str(error), error.status
        except KeyboardInterrupt as stop:
            message, status = "interrupted.", 128 + (stop.args[0] if stop.args else signal.SIGINT)
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":    # torch's, which is not imported everywhere
                raise
            message, status = "the GPU has too little free memory; free some, or pass --device cpu.", 2
        finally:
            sys.stdout.flush()
            sys.stdout, sys.stderr = sys.stdout.stream, sys.stderr.stream
        if sys.stderr:
            with contextlib.suppress(OSError):
                print(f"{script}: {message}", file=sys.stderr, flush=True)
        sys.exit(status)
    return run


class Output:
    """Standard output or error that drops what can't be written: to no console, a closed terminal, a dead pipe."""

    def __init__(self, stream, descriptor: int):
        self.stream, self.descriptor = stream, descriptor    # the stream is None in a program without a console
        if hasattr(stream, "reconfigure"):    # names of files may have letters that the console lacks
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        self._try("write", text)
        return len(text)

    def flush(self):
        self._try("flush")

    def _try(self, method, *args):
        try:
            if self.stream is not None:
                getattr(self.stream, method)(*args)
        except OSError:
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.descriptor)

    def __getattr__(self, name):
        return getattr(self.stream, name)


def _stop(number, _):
    """Signal handler that ends the script in order; a second signal ends it at once."""
    signal.signal(number, signal.SIG_DFL)
    raise KeyboardInterrupt(number)


@contextlib.contextmanager
def on_signals(handler):
    """Context in which Ctrl-C, SIGTERM and SIGHUP call handler(number, frame), except those that nohup has disabled."""
    signals = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    in_main = threading.current_thread() is threading.main_thread()    # Python handles signals only there
    before = {n: signal.getsignal(n) for n in signals if in_main and signal.getsignal(n) != signal.SIG_IGN}
    try:
        for number in before:
            signal.signal(number, handler)
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def script_parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser whose --help shows a script's docstring, and after each option its default."""
    summary, _, details = (doc or "").partition("\n\n")    # python -OO removes docstrings
    return _Parser(description=summary, epilog=details, formatter_class=_Help)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; --help lists the options.\n")


class _Help(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        default = action.default
        if default is False or default in (None, [], argparse.SUPPRESS) or "default" in action.help:
            return action.help
        if isinstance(default, Path) and default.is_relative_to(ROOT):
            default = default.relative_to(ROOT)
        if isinstance(default, (list, tuple)):
            default = " ".join(map(str, default))
        return f"{action.help} (default: {default})"


def path(text: str | os.PathLike) -> Path:
    """Return a path in which a leading ~ is the home folder; the type of all options that are paths."""
    return Path(text).expanduser()


def at_least(minimum: float, kind: type = int, maximum: float = float("inf")):
    """Return the type of an option that is a number of at least `minimum`, for argparse."""
    def number(text):
        value = kind(text)
        if not minimum <= value <= maximum or value == float("inf"):
            most = "" if maximum == float("inf") else f" and at most {maximum:g}"
            least = "greater than 0" if 0 < minimum < 1e-6 else f"at least {minimum:g}"
            raise argparse.ArgumentTypeError(f"must be {least}{most}, not {text}")
        return value
    return number


@contextlib.contextmanager
def reading(file, what: str, advice: str = "download or create it again"):
    """Context in which any exception of a parser becomes InputError, one sentence that names the file, says what it
    should be, such as "landmark list", and what to do if it is damaged."""
    try:
        yield
    except InputError:
        raise
    except MemoryError:
        raise InputError(f"{file} needs more memory than there is.") from None
    except OSError as error:
        raise InputError(f"can't read the {what} {file}: {error.strerror or error}.") from None
    except Exception as error:    # parsers raise every kind
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise InputError(f"{file} is damaged or not a {what} ({reason}); {advice}.") from error


@contextlib.contextmanager
def atomic_write(file, mode: str = "wb", **kwargs):
    """Open a temporary file beside `file`; on success it is flushed to disk and renamed to `file`. On any error, it is
    deleted and whatever was at `file` stays. If it can't be written, that is an InputError. Text may contain names of
    files that are not UTF-8."""
    file = path(file)
    if "b" not in mode:
        kwargs = {"encoding": "utf-8", "errors": "surrogateescape", **kwargs}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}.partial")
        try:
            with open(temporary, mode.replace("w", "x"), **kwargs) as output:
                yield output
                output.flush()
                os.fsync(output.fileno())
            os.replace(temporary, file)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        free = "free some space or " if error.errno == errno.ENOSPC else ""
        raise InputError(f"can't write {file}: {error.strerror or error}; {free}choose another place.") from None


def write_json(file, value):
    """Write `value` as indented JSON, atomically."""
    with atomic_write(file, "w") as output:
        output.write(json.dumps(value, indent=2, default=str) + "\n")    # paths as text


def read_json(file) -> dict:
    """Return the dict in a JSON file, {} if there is no such file; see reading() for errors."""
    with reading(file, "JSON file", "correct it, or delete it and repeat the command that wrote it"):
        try:
            return dict(json.loads(read_bytes(file, 64 << 20)))
        except FileNotFoundError:
            return {}


def read_bytes(file, limit: int) -> bytes:
    """Return the content of a regular file; raise OSError if it is none or has more than `limit` bytes."""
    status = os.stat(file)
    if not stat.S_ISREG(status.st_mode):    # opening a named pipe would wait for a writer forever
        raise OSError(0, "not a regular file")
    if status.st_size > limit:
        raise OSError(0, f"over {limit // 10**6} MB")
    return Path(file).read_bytes()


def load_tensors(file):
    """Read a file of torch.save() onto the CPU with torch's restricted unpickler, which builds only data. It is mapped
    into memory if possible, so that only the tensors that are used are read. Raises InputError if it is no torch file,
    would run code, or is too large to be read."""
    import torch  # slow to import, and most users of this module do not need it
    advice = "pass a checkpoint or a state dict"
    with reading(file, "file of tensors that can be loaded safely", advice), warnings.catch_warnings():
        warnings.simplefilter("ignore")    # about unusual pickle protocols
        try:
            with contextlib.suppress(RuntimeError):    # an old or compressed file can't be mapped
                return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            if os.path.getsize(file) > MAX_WEIGHTS:
                raise ValueError(f"over {MAX_WEIGHTS // 10**9} GB and not as torch.save() writes it today")
            return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:    # torch's message recommends to load it all the same
            raise ValueError("it holds something else, which could run code") from None


@contextlib.contextmanager
def locked(file, activity: str, wait: bool = True, option: str = "--output"):
    """Hold the lock file `file`. If another process holds it, wait, or raise InputError if `wait` is false. `activity`
    is what the holder is doing, for the message, such as "building the cache DIR". The file's folder is created; if it
    can't be written, that is an InputError, which names the option."""
    check_writable(path(file).parent, option)
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            raise InputError(f"another process is {activity}; let it finish, or choose another {option}.") from None
        print(f"another process is {activity}; waiting for it to finish", flush=True)
        lock.acquire()
    except (OSError, NotImplementedError) as error:    # some network disks have no locks
        print(f"can't lock {file} ({error}); make sure that no other process is {activity}", flush=True)
    try:
        yield
    finally:
        lock.release()


def check_writable(folder, option: str = "--output"):
    """Create a folder, and raise InputError, which names the option, if files can't be written into it."""
    try:
        path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"can't write into the folder {folder}: {error.strerror or error}; choose another "
                         f"{option}.") from None


def progress_bar(*args, disable: bool = False, **options) -> tqdm:
    """Return tqdm(*args, **options) on stderr; where that is a file, as in batch jobs, it is updated every 30 s."""
    terminal = getattr(sys.stderr, "isatty", bool)()    # bool() is false: without a console, there is no isatty
    if not terminal and not options.get("leave", True):    # a bar that is cleared leaves a line of spaces in a file
        options |= {"leave": True, "delay": 30}
    return tqdm(*args, disable=disable or sys.stderr is None, dynamic_ncols=True, miniters=1,
                mininterval=0.1 if terminal else 30, **options)


def existing_folder(name, content: str) -> Path:
    """Return `name` as a Path if it is a folder; raise InputError, which says what it should hold, if it is none."""
    folder = path(name)
    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "does not exist"
        raise InputError(f"{folder} {problem}; pass the folder that holds {content}.")
    return folder


def count_of(number: int, kind: str) -> str:
    """Return a count and its noun: "1 link" or "2 links" for the kind "link~", "2 people" for "person"."""
    plural = "people" if kind == "person" else kind.replace("~", "s")
    return f"{number:,} {kind.replace('~', '') if number == 1 else plural}"


def shorten(items, separator: str = ", ", count: int = 3) -> str:
    """Return the first `count` items as text, followed by an ellipsis if there are more."""
    return separator.join(map(str, items[:count])) + (f"{separator}..." if len(items) > count else "")
