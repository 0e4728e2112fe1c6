"""Run a function on batches in several processes."""
import contextlib
import multiprocessing
import pickle
import signal
import sys
import time
import traceback
from multiprocessing import resource_tracker
from multiprocessing.connection import wait

import cv2
import torch

from faces.files import InputError
from faces.images import one_opencv_thread
from faces.signals import stop_signals

AHEAD = 8    # batches per process that may be finished before the one that is due, which bounds the memory


def in_processes(function, items, batch_size, workers, method):
    """Yield function(batch) for the batches of `items`, in order.

    Each process has one thread and a pipe to this one. There is no shared memory, which is scarce in containers, and no
    lock that a killed process could keep. A process ends when its pipe closes, which happens even if this process is
    killed.

    Args:
        function: takes a slice of `items`; it and its results must be picklable. Each process unpickles it once.
        items: sequence that can be sliced.
        batch_size: items per batch.
        workers: number of processes.
        method: how processes are started, see start_method().

    Raises:
        InputError: a process died or can't be started, or the GPU's memory is full.
        Exception: whatever the function raises.
    """
    starts = range(0, len(items), batch_size)
    processes = {}  # by pipe
    try:
        _start(processes, min(workers, len(starts)), method)
        for pipe in processes:
            _send(pipe, function, processes)
        idle, running, finished, sent = list(processes), {}, {}, 0
        for due in range(len(starts)):
            while True:
                while idle and sent < min(len(starts), due + AHEAD * len(processes)):
                    _send(idle[-1], items[starts[sent]:starts[sent] + batch_size], processes)
                    running[idle.pop()] = sent
                    sent += 1
                if due in finished:
                    break
                for pipe in wait(list(running)):
                    finished[running.pop(pipe)] = _receive(pipe, processes)
                    idle.append(pipe)
            yield finished.pop(due)
    finally:
        for process in processes.values():
            process.kill()
        for pipe, process in processes.items():
            process.join()
            pipe.close()


def start_method(device):
    """Return how to start processes with networks on a torch.device: "fork", or "spawn", which takes seconds.

    CUDA can't be used in a process that was forked after CUDA had started, and macOS does not support forks well.
    """
    return "fork" if torch.device(device).type == "cpu" and sys.platform == "linux" else "spawn"


def _start(processes, count, method):
    """Start processes and add them to the dict `processes`, by pipe."""
    context = multiprocessing.get_context(method)
    # A fork would wait forever for the threads that OpenCV has in this process.
    with one_opencv_thread(), _without_signals(method):
        for _ in range(count):
            try:
                pipe, other_end = context.Pipe()
                process = context.Process(target=_work, args=(other_end, pipe), daemon=True)
                process.start()
            except OSError as error:
                raise InputError(f"can't start {count} worker processes: {error.strerror or error}; pass fewer "
                                 "--workers.") from None
            processes[pipe] = process
            other_end.close()


@contextlib.contextmanager
def _without_signals(method):
    """Keep Ctrl-C and the like from processes that start inside a `with` block, until _work() decides what they do."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    if method == "spawn":
        resource_tracker.ensure_running()  # or else the first spawn would start it and then unblock the signal
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _send(pipe, value, processes):
    try:
        pipe.send(value)
    except OSError:
        raise _death(processes[pipe]) from None


def _receive(pipe, processes):
    try:
        worked, result, trace = pipe.recv()
    except (EOFError, OSError):
        raise _death(processes[pipe]) from None
    if worked:
        return result
    if isinstance(result, torch.cuda.OutOfMemoryError):
        raise InputError(f"the memory of the GPU is too small for {len(processes)} processes; pass fewer --workers.")
    raise result from RuntimeError(f"in a worker process:\n{trace}")


def _death(process):
    """Return an InputError that says how a process ended."""
    process.join(10)
    code = process.exitcode
    if code == -signal.SIGTERM:
        time.sleep(1)    # whoever ended it may be ending all processes of this job, and this one will hear of it now
    how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with status {code}"
    return InputError(f"worker process {process.pid} {how}; run the command again, with fewer --workers if memory ran "
                      "out.")


def _work(pipe, other_end):
    """Receive the function and then batches; send (True, result, "") or (False, exception, traceback) for each."""
    other_end.close()  # or else this process would keep its own pipe open when the other one is killed
    for number in stop_signals():    # Ctrl-C and a closed terminal stop the other process, which ends this one
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    function = None
    with contextlib.suppress(EOFError, ConnectionError):  # the other process has ended
        while True:
            message = pipe.recv_bytes()
            try:
                if function is None:
                    function = pickle.loads(message)
                    continue
                answer = True, function(pickle.loads(message)), ""
            except Exception as error:
                answer = False, error, traceback.format_exc()
            pipe.send(answer)
