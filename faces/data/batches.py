"""Training batches: a new random order every epoch, random flips and shifts, resumable at any step."""
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch

from faces.align import HEIGHT, WIDTH
from faces.device import to_device, to_input

FLIPPING, SAMPLING, SHIFTING = 1, 2, 3    # of random generators; a seed is (seed, step, rank or 0, purpose)
THREADS = 2             # one delivers 100,000 faces/s from memory; several overlap their waits for a disk


class Batches:
    """Batches on the device, one per step, from step `start` to step `steps`: float32 (B, 3, 112, 96) and int64 (B,).

    Which faces a step sees, and how they are flipped and shifted, depends on the seed and the step alone, so a resumed
    run sees what the uninterrupted one would have seen, on any number of processes, of which each gets its share of
    `batch_size` faces. `shift` is the largest shift in pixels. Threads gather the faces of the next batches.
    """

    def __init__(self, faces, batch_size: int, steps: int, device: torch.device, start: int = 0, seed: int = 0,
                 flip: bool = True, shift: int = 0, rank: int = 0, world_size: int = 1):
        self.faces, self.batch_size, self.steps, self.device, self.start = faces, batch_size, steps, device, start
        self.seed, self.flip, self.shift, self.own = seed, flip, shift, slice(rank, None, world_size)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        ahead = deque()
        # By default, a thread that pins memory would open a context on GPU 0.
        initializer = partial(torch.cuda.set_device, self.device) if self.device.type == "cuda" else None
        with ThreadPoolExecutor(THREADS, "batches", initializer) as pool:
            try:
                for step, rows in order(len(self.faces), self.batch_size, self.steps, self.seed, self.start):
                    ahead.append(pool.submit(self._gather, step, rows[self.own]))
                    if len(ahead) > THREADS:
                        yield self._on_device(*ahead.popleft().result())
                while ahead:
                    yield self._on_device(*ahead.popleft().result())
            finally:
                pool.shutdown(cancel_futures=True)

    def _gather(self, step, rows):
        """Return faces and labels on the CPU, which faces to flip, and how far to shift them."""
        images = torch.empty(len(rows), HEIGHT, WIDTH, 3, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        _, labels = self.faces.batch(rows, out=images.numpy())
        flip = shifts = None
        if self.flip:
            random = np.random.default_rng((self.seed, step, 0, FLIPPING))
            flip = torch.from_numpy(random.random(self.batch_size) < 0.5)[self.own]
        if self.shift:
            random = np.random.default_rng((self.seed, step, 0, SHIFTING))
            shifts = random.integers(-self.shift, self.shift, (self.batch_size, 2), endpoint=True)
            shifts = torch.from_numpy(shifts)[self.own]
        return images, torch.from_numpy(labels), flip, shifts

    def _on_device(self, *tensors):
        images, labels, flip, shifts = (tensor if tensor is None else to_device(tensor, self.device)
                                        for tensor in tensors)
        if shifts is not None:
            images = shift_faces(images, shifts)
        return to_input(images, flip), labels    # faces travel as uint8, a quarter of the bytes of float32


def order(images: int, batch_size: int, steps: int, seed: int = 0, start: int = 0) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (step, positions of its batch in the set, int64 (batch_size,)) for each step from `start` to `steps`. Every
    epoch is a new permutation of the set. The images at its end that do not fill a batch are dropped."""
    steps_per_epoch, epoch = images // batch_size, None
    for step in range(start, steps):
        if step // steps_per_epoch != epoch:
            epoch = step // steps_per_epoch
            permutation = np.random.default_rng((seed, epoch, 0)).permutation(images)
        yield step, permutation[step % steps_per_epoch * batch_size:][:batch_size]


def shift_faces(faces: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
    """Shift faces, uint8 (N, 112, 96, 3), by whole pixels, int64 (N, 2), down and to the right. The border is repeated,
    because a black edge would reveal the shift."""
    face = torch.arange(len(faces), device=faces.device)[:, None, None]
    row = (torch.arange(HEIGHT, device=faces.device) - shifts[:, :1]).clamp(0, HEIGHT - 1)      # (N, 112)
    column = (torch.arange(WIDTH, device=faces.device) - shifts[:, 1:]).clamp(0, WIDTH - 1)     # (N, 96)
    return faces[face, row[:, :, None], column[:, None]]
