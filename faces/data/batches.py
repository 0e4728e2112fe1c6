"""Training batches: a new random order every epoch, random mirroring and shifts, resumable at any step."""
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from faces.align import HEIGHT, WIDTH
from faces.device import to_input

MIRROR, SHIFT = 1, 3    # what a random generator is for; its seed is (seed, step, rank, purpose)


class Batches:
    """Batches on the device, one per step, from step `start` to step `steps`.

    Which faces a step sees, which of them are mirrored and how far they are shifted depends on the seed, the step and
    the rank alone, so a resumed run sees what the uninterrupted one would have seen.

    Args:
        faces: faces.data.cache.AlignedFaces.
        batch_size: images per step over all processes.
        steps: number of steps of the whole run.
        device: torch.device.
        start: step to begin with.
        seed: of order, mirroring and shifts.
        mirror: whether to flip half of the faces.
        jitter: shift each face by up to this many pixels along both axes.
        workers: processes that read batches; 0 reads in this one; None takes 4 with CUDA and 0 otherwise.
        rank, world_size: index of this process, and number of processes.

    Yields:
        (float32 (B, 3, 112, 96), int64 (B,)): network input and labels of this process's share of the batch.
    """

    def __init__(self, faces, batch_size, steps, device, start=0, seed=0, mirror=True, jitter=0, workers=None,
                 rank=0, world_size=1):
        self.order = Order(len(faces), batch_size, steps, seed, start, rank, world_size)
        self.faces, self.device = faces, device
        self.workers = workers if workers is not None else 4 if device.type == "cuda" else 0
        self.seed, self.mirror, self.jitter, self.rank = seed, mirror, jitter, rank

    def __iter__(self):
        loader = DataLoader(_Rows(self.faces), sampler=self.order, batch_size=None, num_workers=self.workers,
                            pin_memory=self.device.type == "cuda", prefetch_factor=4 if self.workers else None)
        for step, (images, labels) in enumerate(loader, self.order.start):
            images = images.to(self.device, non_blocking=True)    # uint8: a quarter of the bytes of float32
            yield self._augment(images, step), labels.to(self.device, non_blocking=True)

    def _augment(self, images, step):
        if self.jitter:
            shifts = self._random(step, SHIFT).integers(-self.jitter, self.jitter, (len(images), 2), endpoint=True)
            images = shift_faces(images, torch.from_numpy(shifts).to(self.device, non_blocking=True))
        if not self.mirror:
            return to_input(images)
        mirror = self._random(step, MIRROR).random(len(images)) < 0.5
        return to_input(images, torch.from_numpy(mirror).to(self.device, non_blocking=True))

    def _random(self, step, purpose):
        return np.random.default_rng((self.seed, step, self.rank, purpose))


class Order:
    """Yields, for each step from `start`, this process's share of the batch as positions in the set, int64 (B,).

    Every epoch is a new permutation of the set. The images at its end that do not fill a batch are dropped.
    """

    def __init__(self, images, batch_size, steps, seed=0, start=0, rank=0, world_size=1):
        self.images, self.batch_size, self.steps, self.seed, self.start = images, batch_size, steps, seed, start
        self.rank, self.world_size = rank, world_size

    def __len__(self):
        return self.steps - self.start

    def __iter__(self):
        steps_per_epoch, epoch = self.images // self.batch_size, None
        for step in range(self.start, self.steps):
            if step // steps_per_epoch != epoch:
                epoch = step // steps_per_epoch
                order = np.random.default_rng((self.seed, epoch, 0)).permutation(self.images)
            first = step % steps_per_epoch * self.batch_size
            yield order[first + self.rank:first + self.batch_size:self.world_size]


class _Rows(Dataset):
    def __init__(self, faces):
        self.faces = faces

    def __getitem__(self, rows):
        images, labels = self.faces.batch(rows)
        return torch.from_numpy(images), torch.from_numpy(labels)


def shift_faces(faces, shifts):
    """Shift faces by whole pixels. The border is repeated, because a black edge would reveal the shift.

    Args:
        faces: uint8 (N, 112, 96, 3), on any device.
        shifts: int64 (N, 2), pixels down and to the right.

    Returns:
        uint8 (N, 112, 96, 3).
    """
    face = torch.arange(len(faces), device=faces.device)[:, None, None]
    row = (torch.arange(HEIGHT, device=faces.device) - shifts[:, :1]).clamp(0, HEIGHT - 1)      # (N, 112)
    column = (torch.arange(WIDTH, device=faces.device) - shifts[:, 1:]).clamp(0, WIDTH - 1)     # (N, 96)
    return faces[face, row[:, :, None], column[:, None]]
