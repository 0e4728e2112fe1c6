"""Run a function on one batch after the other, on every core."""
import cv2
from torch.utils.data import DataLoader, Dataset

from faces.images import one_opencv_thread


def in_processes(function, items, batch_size, workers):
    """Yield function(batch) for the batches of `items`, in order.

    The processes are those of a torch DataLoader: with one thread each, gone when this process is, even by SIGKILL.

    Args:
        function: of a part of `items`; what it refers to and what it returns must be such as can be pickled.
        items: sequence that can be sliced.
        batch_size: items that a process is given at a time.
        workers: number of processes.
    """
    batches = [items[start:start + batch_size] for start in range(0, len(items), batch_size)]
    with one_opencv_thread():  # a forked process would wait for ever for those that OpenCV had begun in this one
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
    cv2.setNumThreads(1)  # where processes are not forked; torch's own number, the loader sets
