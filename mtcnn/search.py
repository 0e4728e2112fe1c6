"""Find faces in photos, and one in each of many images, on all cores. An image without one is searched again in a black
frame, which makes room for a face that the border cuts, and then with lower thresholds."""
import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from joblib import cpu_count

from faces.align import check_inside, similarity_transform
from faces.images import UnreadableImage, read_image
from mtcnn.detector import Detector, Faces, groups
from mtcnn.processes import in_processes

# Thresholds of the three networks, and width of the frame as a fraction of the image, for each attempt. On tight crops
# of web photos (89 to 190 pixels), the frame finds nine in ten of the faces that the first attempt misses.
ATTEMPTS = (((0.6, 0.7, 0.7), 0), ((0.6, 0.7, 0.7), 0.25), ((0.5, 0.5, 0.5), 0.25), ((0.3, 0.3, 0.3), 0.25))
RULES = ("center", "largest", "score")
NO_FACE = -1
# What is found in an image, its (width, height) included. The attempt is an index into ATTEMPTS, or NO_FACE.
LANDMARKS = np.dtype([("index", np.int64), ("size", np.int32, 2), ("attempt", np.int8), ("points", np.float64, (5, 2))])
BATCH = 32             # images per batch of a worker process
GPU_PROCESSES = 8      # that share a GPU; each needs about 0.5 GB of its memory


class Found(NamedTuple):
    """The faces in one image."""
    index: int                    # of the image in the list of photos
    image: np.ndarray | str       # uint8 (H, W, 3), or why it can't be read
    faces: Faces | None = None    # all that the successful attempt found, in pixels of the image
    rows: list = []               # of those that can be aligned, the selected one first
    attempt: int = NO_FACE        # index into ATTEMPTS


def search(root: Path | str, items: list[tuple[int, str]], detector: Detector, select: str = "center",
           workers: int | None = None) -> Iterator[tuple[np.ndarray, dict[int, str]]]:
    """Find the face in each image, given its index and path below `root`. Yield LANDMARKS (n,) of a few images at a
    time, in order, and {index: reason} of those that can't be read. `select` is which face of several, see choose();
    `workers` the number of processes: None is one per core, but at most GPU_PROCESSES with CUDA and none with MPS."""
    if workers is None:
        workers = {"cpu": cpu_count(), "cuda": min(cpu_count(), GPU_PROCESSES)}.get(detector.device.type, 0)
    if workers > 1 and len(items) > BATCH:
        batches = (items[start:start + BATCH] for start in range(0, len(items), BATCH))
        for results in in_processes(partial(_search_all, root, detector, select), batches, workers, detector.device):
            yield from results
    else:
        yield from _search(root, detector, select, items)


def _search_all(*args):
    return list(_search(*args))


def _search(root, detector, select, items):
    def read(path):
        if "\t" in path or "\\" in path or path.splitlines() != [path]:
            return "its name has a character that a list can't hold, such as a tab"
        return image_or_reason(Path(root, path))

    for group in find_faces(((i, read(path)) for i, path in items), detector, select):
        rows = [(found.index, found.image.shape[1::-1], found.attempt,
                 np.round(found.faces.landmarks[found.rows[0]], 2) if found.rows else np.zeros((5, 2)))
                for found in group if not isinstance(found.image, str)]
        yield np.array(rows, LANDMARKS), {found.index: found.image for found in group if isinstance(found.image, str)}


def image_or_reason(photo) -> np.ndarray | str:
    """Return read_image(photo), or why it can't be read."""
    try:
        return read_image(photo)
    except UnreadableImage as error:
        return str(error)


def find_faces(images: Iterable, detector: Detector, select: str, attempts: tuple = ATTEMPTS) -> Iterator[list[Found]]:
    """Find the faces in each image, given (index, image_or_reason()); yield lists of Found, in order. Few images are in
    memory at a time; a thread reads the next ones."""
    for group in prefetch(groups(itertools.starmap(Found, images), lambda found: getattr(found.image, "size", 0) // 3)):
        for attempt, (thresholds, width) in enumerate(attempts):
            missing = [i for i, found in enumerate(group) if not found.rows and not isinstance(found.image, str)]
            framed = [frame(group[i].image, width) for i in missing]
            for i, (_, corner), faces in zip(missing, framed, detector.detect([f[0] for f in framed], thresholds)):
                faces = faces._replace(boxes=faces.boxes - np.tile(corner, 2), landmarks=faces.landmarks - corner)
                if rows := choose(faces, group[i].image.shape[:2], select):
                    group[i] = group[i]._replace(faces=faces, rows=rows, attempt=attempt)
        yield group


def prefetch(items: Iterable) -> Iterator:
    """Yield `items`, while a thread prepares the next one."""
    items, end = iter(items), object()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(next, items, end)
        while (item := future.result()) is not end:
            future = pool.submit(next, items, end)
            yield item


def frame(image: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Return an image inside a black frame, `fraction` of its size wide, and the corner (x, y) of the image in it."""
    y, x = (round(fraction * side) for side in image.shape[:2])
    return cv2.copyMakeBorder(image, y, y, x, x, cv2.BORDER_CONSTANT, value=(0, 0, 0)), np.array((x, y), np.float32)


def choose(faces: Faces, shape: tuple, select: str) -> list[int]:
    """Return the rows of the Faces in an image of the shape (height, width) that can be aligned, the best one first:
    with `select`, the one nearest the "center", which is LFW's rule, the "largest", or that of the highest "score"."""
    from_center = (faces.boxes[:, :2] + faces.boxes[:, 2:] - shape[::-1]) / 2
    values = {"center": -(from_center ** 2).sum(1), "largest": (faces.boxes[:, 2:] - faces.boxes[:, :2]).prod(1),
             "score": faces.scores}[select]
    rows = [row for row, points in enumerate(faces.landmarks) if can_be_aligned(points, shape)]
    return sorted(rows, key=lambda row: -values[row])


def can_be_aligned(points: np.ndarray, shape: tuple) -> bool:
    """Return whether landmarks, float (5, 2), are inside an image and have a similarity transform to the template."""
    try:
        check_inside(points, shape)
        similarity_transform(points)
    except ValueError:
        return False
    return True
