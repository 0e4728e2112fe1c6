"""Find one face in each of many images, on all cores. An image without one is searched again in a black frame, which
makes room for a face that the border cuts, and then with lower thresholds."""
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from faces.align import check_inside, similarity_transform
from faces.device import count_cpus
from faces.images import UnreadableImage, read_image
from mtcnn.detector import Detector, Faces, groups
from mtcnn.processes import in_processes

# Thresholds of the three networks, and width of the frame as a fraction of the image, for each attempt. On tight crops
# of web photos (89 to 190 pixels), the frame finds nine in ten of the faces that the first attempt misses.
ATTEMPTS = (((0.6, 0.7, 0.7), 0), ((0.6, 0.7, 0.7), 0.25), ((0.5, 0.5, 0.5), 0.25), ((0.3, 0.3, 0.3), 0.25))
RULES = ("center", "largest", "score")
NO_FACE = -1
BATCH = 32             # images per batch of a worker process
GPU_PROCESSES = 8      # that share a GPU; each needs about 0.5 GB of its memory


class Find(NamedTuple):
    """What was found in one image."""
    index: int                           # of the image in the list of paths
    size: tuple                          # (width, height)
    attempt: int = NO_FACE               # index into ATTEMPTS of the successful one
    points: list = [[0.0, 0.0]] * 5      # x and y of each landmark
    problem: str | None = None           # why the image can't be read, or None


def search(root: Path | str, items: list[tuple[int, str]], detector: Detector, select: str = "center",
           workers: int | None = None) -> Iterator[list[Find]]:
    """Find the face in each image, given its index and path below `root`; yield lists of Find, in order.

    `select` is which face of several, see choose(). `workers` is the number of processes, None for one per core but at
    most GPU_PROCESSES with CUDA and none with MPS. With 0 or 1, this process searches, and a thread reads ahead.
    """
    if workers is None:
        workers = {"cpu": count_cpus(), "cuda": min(count_cpus(), GPU_PROCESSES)}.get(detector.device.type, 0)
    if workers > 1 and len(items) > BATCH:
        batches = (items[start:start + BATCH] for start in range(0, len(items), BATCH))
        yield from in_processes(partial(find_all, root, detector, select), batches, workers, detector.device)
    else:
        yield from (find(detector, select, group) for group in prefetch(read_groups(root, items)))


def prefetch(items: Iterable) -> Iterator:
    """Yield `items`, while a thread prepares the next one."""
    items, end = iter(items), object()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(next, items, end)
        while (item := future.result()) is not end:
            future = pool.submit(next, items, end)
            yield item


def read_groups(root, items):
    """Yield lists of (index, image or UnreadableImage) that fit in memory together, given (index, path)."""
    def read(path):
        if "\t" in path or "\\" in path or path.splitlines() != [path]:
            return UnreadableImage("its name has a character that a list can't hold, such as a tab")
        try:
            return read_image(Path(root, path))
        except UnreadableImage as error:
            return error

    return groups(((i, read(path)) for i, path in items), lambda item: getattr(item[1], "size", 0) // 3)


def find_all(root, detector, select, items):
    """Return a Find for each (index, path)."""
    return [found for group in read_groups(root, items) for found in find(detector, select, group)]


def find(detector, select, group):
    """Return a Find for each (index, image or UnreadableImage)."""
    images = {i: image for i, image in group if not isinstance(image, UnreadableImage)}
    finds = {i: Find(i, image.shape[1::-1]) if i in images else Find(i, (0, 0), problem=str(image))
             for i, image in group}
    for attempt, (thresholds, width) in enumerate(ATTEMPTS):
        missing = [i for i in images if finds[i].attempt == NO_FACE]
        framed = [frame(images[i], width) for i in missing]
        for i, (image, corner), faces in zip(missing, framed, detector.detect([f[0] for f in framed], thresholds)):
            row = choose(faces, image.shape[:2], select, corner)
            if row is not None:
                points = np.round(faces.landmarks[row] - corner, 2).tolist()
                finds[i] = finds[i]._replace(attempt=attempt, points=points)
    return list(finds.values())


def frame(image: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Return an image inside a black frame, `fraction` of its size wide, and the corner (x, y) of the image in it."""
    y, x = (round(fraction * side) for side in image.shape[:2])
    return cv2.copyMakeBorder(image, y, y, x, x, cv2.BORDER_CONSTANT, value=(0, 0, 0)), np.array((x, y), np.float32)


def choose(faces: Faces, shape: tuple, select: str, corner=(0, 0)) -> int | None:
    """Return the row of the chosen face in an image's Faces, or None if none can be aligned.

    `select` is "center" for the face nearest the center, which is LFW's rule, "largest", or "score" for the highest
    probability. `shape` is (height, width), also of a frame, in which the image is at `corner`, (x, y).
    """
    size = np.asarray(shape) - 2 * np.asarray(corner)[::-1]    # of the image itself
    rows = [row for row, points in enumerate(faces.landmarks) if can_be_aligned(points - corner, size)]
    from_center = (faces.boxes[:, :2] + faces.boxes[:, 2:] - shape[::-1]) / 2
    values = {"center": -(from_center ** 2).sum(1), "largest": (faces.boxes[:, 2:] - faces.boxes[:, :2]).prod(1),
             "score": faces.scores}[select]
    return max(rows, key=lambda row: values[row], default=None)


def can_be_aligned(points: np.ndarray, shape) -> bool:
    """Return whether landmarks are inside an image of this shape and belong to a face that is not flipped."""
    try:
        check_inside(points, shape)
        return similarity_transform(points) is not None
    except ValueError:
        return False
