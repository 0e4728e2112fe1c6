"""How scripts end on Ctrl-C, on SIGTERM (the end of a job), and on SIGHUP (the end of a terminal)."""
import contextlib
import os
import signal
import threading


class Stopped(KeyboardInterrupt):
    """A signal, whose number is `number`, asks the script to end."""

    def __init__(self, number):
        super().__init__()
        self.number = number


def end_quietly(name):
    """Let Ctrl-C end a script without a traceback while it imports and exits; between, faces.files.command does.

    Args:
        name: __name__ of the script; if that is imported, nothing happens.
    """
    if name == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def stop_signals():
    """Return the signals that ask a script to end, except those that it was told to ignore, as nohup does."""
    names = ("SIGINT", "SIGTERM", "SIGHUP")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]    # Windows has no SIGHUP
    return [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]


@contextlib.contextmanager
def stopped_by_signals():
    """In this block, a signal raises Stopped in the main thread, so that files and processes are cleaned up.

    During that cleanup, a second Ctrl-C ends the script at once, and further SIGTERMs and SIGHUPs are ignored.
    """
    before = {number: signal.getsignal(number) for number in stop_signals()}

    def stop(number, _):
        for other, handler in before.items():
            signal.signal(other, handler if other == signal.SIGINT else signal.SIG_IGN)
        leave_lost_terminal()
        raise Stopped(number)

    if threading.current_thread() is not threading.main_thread():    # Python handles signals only there
        before = {}
    try:
        for number in before:
            signal.signal(number, stop)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def resumable():
    """If a signal ends this block, let faces.files.command say that the same command continues where it stopped."""
    try:
        yield
    except KeyboardInterrupt as stop:
        stop.resumable = True
        raise


def leave_lost_terminal():
    """Discard further output if the terminal has been closed, because writing to it would be an error."""
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")
        except OSError:
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
