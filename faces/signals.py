"""How scripts end on Ctrl-C, on SIGTERM (the end of a job), and on SIGHUP (the end of a terminal)."""
import contextlib
import os
import signal
import sys
import threading


class Stopped(KeyboardInterrupt):
    """A signal, whose number is `number`, asks the script to end."""

    def __init__(self, number):
        super().__init__()
        self.number = number


def end_quietly(name):
    """Let Ctrl-C end a script without a traceback during imports and exit; faces.files.command handles it in between.

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

    During that cleanup, a second signal has the effect it had before, which in a script is to end it at once.
    """
    if threading.current_thread() is not threading.main_thread():    # Python handles signals only there
        yield
        return
    before = {number: signal.getsignal(number) for number in stop_signals()}
    hook, received = sys.unraisablehook, []

    def stop(number, _):
        received.append(number)
        set_handlers(before)
        leave_lost_terminal()
        raise Stopped(number)

    def again(ignored):    # Python ignores an exception in a callback, such as a destructor: raise it after that
        if not isinstance(ignored.exc_value, Stopped):
            return hook(ignored)
        set_handlers(dict.fromkeys(before, stop))
        arguments = threading.get_ident(), ignored.exc_value.number
        threading.Timer(0.1, signal.pthread_kill, arguments).start()

    try:
        set_handlers(dict.fromkeys(before, stop))
        sys.unraisablehook = again
        yield
    except Exception as error:
        if received:    # a function in C may turn Stopped into another exception
            raise Stopped(received[-1]) from error
        raise
    finally:
        set_handlers(before)
        sys.unraisablehook = hook


@contextlib.contextmanager
def handled_by(handler):
    """In this block, stop_signals() call handler(number, frame)."""
    before = {number: signal.getsignal(number) for number in stop_signals()}
    try:
        set_handlers(dict.fromkeys(before, handler))
        yield
    finally:
        set_handlers(before)


def set_handlers(handlers):
    """Install a dict of signal handlers by number."""
    for number, handler in handlers.items():
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
