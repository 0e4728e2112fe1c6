"""Run a function on batches in several processes."""
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice

import cv2
import torch

from faces.files import InputError, on_signals
from faces.images import one_opencv_thread

AHEAD = 4    # batches in flight per process, which bounds the memory


def in_processes(function: Callable, batches: Iterable, workers: int, device: torch.device) -> Iterator:
    """Yield function(batch) for each batch, in order; everything must be picklable. Each process has one thread. It is
    forked for a CPU on Linux and otherwise spawned, which takes seconds: CUDA doesn't work in a fork, and macOS doesn't
    support forks well. A killed process is an InputError."""
    forked = device.type == "cpu" and sys.platform == "linux"
    context = multiprocessing.get_context("fork" if forked else "spawn")
    lifeline, held = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, context, _prepare, (function, lifeline, held))
    batches, results = iter(batches), deque()
    try:
        # OpenCV's threads would block a fork. Workers inherit that signals are ignored; this process ends them.
        with one_opencv_thread(), on_signals(signal.SIG_IGN):
            results.extend(pool.submit(_run, batch) for batch in islice(batches, AHEAD * workers))
        while results:
            yield results.popleft().result()
            results.extend(pool.submit(_run, batch) for batch in islice(batches, 1))
    except BrokenProcessPool:
        raise InputError("a worker process was killed; run the same command again, with fewer --workers if memory ran "
                         "out.") from None
    except torch.cuda.OutOfMemoryError:
        raise InputError(f"the GPU has too little memory for {workers} processes; pass fewer --workers.") from None
    finally:
        held.close()    # ends the workers, even if they are busy; so does the end of this process, even by SIGKILL
        pool.shutdown(cancel_futures=True)
        lifeline.close()


def _prepare(function, lifeline, held):
    """Initialize a worker process."""
    global _function
    _function = function
    held.close()    # or else this process would keep its own lifeline open
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)


def _end_with(lifeline):
    """End this process when the other end of a pipe is closed."""
    lifeline.poll(None)
    os._exit(1)


def _run(batch):
    return _function(batch)
