"""Run a function on batches in several processes."""
import cv2
from torch.utils.data import DataLoader, Dataset

from faces.images import one_opencv_thread


def in_processes(function, items, batch_size, workers):
    """Yield function(batch) for the batches of `items`, in order.

    The processes are the workers of a torch DataLoader: they have one thread each, and end when this process ends, even
    by SIGKILL.

    Args:
        function: takes a slice of `items`; it and its results must be picklable.
        items: sequence that can be sliced.
        batch_size: items per batch.
        workers: number of processes.
    """
    batches = [items[start:start + batch_size] for start in range(0, len(items), batch_size)]
    with one_opencv_thread():  # a forked process would wait forever for threads that OpenCV started in this one
        yield from DataLoader(_Results(function, batches), batch_size=None, num_workers=min(workers, len(batches)),
                              collate_fn=_unchanged, worker_init_fn=_one_thread)


class _Results(Dataset):
    def __init__(self, function, batches):
        self.function, self.batches = function, batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, k):
        return self.function(self.batches[k])


def _unchanged(batch):
    return batch


def _one_thread(_):
    cv2.setNumThreads(1)  # needed if processes are not forked; the DataLoader sets the threads of torch
