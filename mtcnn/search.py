"""Find one face in each of many images, on all cores.

If MTCNN finds no face, the image is searched again inside a black frame, which makes room for a face that is cut by the
border, and then with lower thresholds.
"""
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch

from faces.align import check_inside, similarity_transform
from faces.device import count_cpus
from faces.images import UnreadableImage, read_image
from mtcnn.detector import groups
from mtcnn.processes import in_processes, start_method

# Thresholds of the three networks, and width of the frame as a fraction of the image, for each attempt. On tight crops
# of web photos (89 to 190 pixels), the frame finds nine in ten of the faces that the first attempt misses.
ATTEMPTS = (((0.6, 0.7, 0.7), 0), ((0.6, 0.7, 0.7), 0.25), ((0.5, 0.5, 0.5), 0.25), ((0.3, 0.3, 0.3), 0.25))
RULES = ("center", "largest", "score")
END = object()
# A process with the networks on a GPU spends 1 to 2 ms of the CPU per image of LFW, so it finds the faces in at most
# 400 to 800 images/s. On a CPU, a core does 65 to 125. Several processes therefore share the GPU, up to the number
# whose CUDA contexts (about 0.5 GB each) leave room on a small GPU; from about 32 cores on, the CPU alone is as fast
# as these. This is arithmetic from times on a CPU; on a GPU, only the first seconds were measured.
GPU_PROCESSES = 8
MANY_CORES = 32


class Find(NamedTuple):
    """The face found in one image.

    index: of the image in the list of paths.
    size: (width, height) of the image.
    attempt: index into ATTEMPTS of the successful one; -1 if no face was found.
    points: ten numbers, x and y of each landmark; None if no face was found.
    """
    index: int
    size: tuple
    attempt: int
    points: list | None


def search(root, paths, indices, detector, select="center", batch_size=32, workers=None):
    """Find the face in each image paths[i], for i in `indices`.

    Args:
        root: the folder.
        paths: N paths below it.
        indices: sequence of int.
        detector: mtcnn.detector.Detector.
        select: which face of several, see choose().
        batch_size: images per batch, if several processes search.
        workers: number of processes; default default_workers(). With 0, this process searches, while a thread reads
            the next images.

    Yields:
        For each batch, in order, (list of Find, {index: reason} of images that can't be read).
    """
    job, items = _Job(root, detector, select), [(i, paths[i]) for i in indices]
    if workers is None:
        workers = default_workers(detector.device)
    if workers > 1 and len(items) > batch_size:
        yield from in_processes(job.search, items, batch_size, workers, start_method(detector.device))
    else:
        yield from map(job.find, prefetch(job.groups(items)))


def fastest_device(name):
    """Return the name of the device to search many images on: the CPU for "auto", if it is likely to be faster."""
    return "cpu" if name == "auto" and (not torch.cuda.is_available() or count_cpus() >= MANY_CORES) else name


def default_workers(device):
    """Return how many processes search fastest with the networks on a torch.device."""
    return {"cpu": count_cpus(), "cuda": min(count_cpus(), GPU_PROCESSES)}.get(device.type, 0)


class _Job:
    """The parameters of a search, which every process needs."""

    def __init__(self, root, detector, select):
        self.root, self.detector, self.select = Path(root), detector, select

    def search(self, items):
        """Return (list of Find, {index: reason}) of a batch of (index, path)."""
        finds, unreadable = [], {}
        for group in self.groups(items):
            some_finds, some_unreadable = self.find(group)
            finds += some_finds
            unreadable |= some_unreadable
        return finds, unreadable

    def groups(self, items):
        """Yield lists of (index, image or UnreadableImage) that fit in memory together."""
        return groups(((i, read(self.root, path)) for i, path in items), lambda item: pixels(item[1]))

    def find(self, group):
        """Return (list of Find, {index: reason}) of a list that groups() yields."""
        unreadable = {i: str(image) for i, image in group if isinstance(image, UnreadableImage)}
        readable = [(i, image) for i, image in group if i not in unreadable]
        faces = find_faces(self.detector, [image for _, image in readable], self.select)
        return [Find(i, image.shape[1::-1], *face) for (i, image), face in zip(readable, faces)], unreadable


def normalize_rule(name):
    """Return the name of a rule in RULES; accepts the British spelling of center."""
    return "center" if name == "centre" else name


def prefetch(items):
    """Yield `items`, while a thread prepares the next one."""
    items = iter(items)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(next, items, END)
        while (item := future.result()) is not END:
            future = pool.submit(next, items, END)
            yield item


def read(root, path):
    """Return the image root / path, or an UnreadableImage with the reason."""
    try:
        if "\t" in path or "\\" in path or path.splitlines() != [path]:
            raise UnreadableImage("its name has a character that a list can't hold, such as a tab")
        return read_image(root / path)
    except UnreadableImage as error:
        return error


def pixels(image):
    """Return the number of pixels of what read() returned."""
    return 0 if isinstance(image, UnreadableImage) else image.shape[0] * image.shape[1]


def find_faces(detector, images, select):
    """Return (attempt, ten numbers), or (-1, None), for the face that `select` chooses in each image."""
    results = [(-1, None)] * len(images)
    for attempt, (thresholds, fraction) in enumerate(ATTEMPTS):
        missing = [i for i, (_, points) in enumerate(results) if points is None]
        framed = [frame(images[i], fraction) for i in missing]
        for i, (image, corner), faces in zip(missing, framed, detector.detect([f[0] for f in framed], thresholds)):
            face = choose(faces, image.shape[:2], select, corner)
            if face is not None:
                results[i] = attempt, np.round(faces.landmarks[face] - corner, 2).ravel().tolist()
    return results


def frame(image, fraction):
    """Return an image inside a black frame, `fraction` of its size wide, and the corner (x, y) of the image in it."""
    y, x = (round(fraction * side) for side in image.shape[:2])
    return cv2.copyMakeBorder(image, y, y, x, x, cv2.BORDER_CONSTANT, value=(0, 0, 0)), np.array((x, y), np.float32)


def choose(faces, shape, select, corner=(0, 0)):
    """Return the row of the chosen face in an image's Faces, or None if none can be aligned.

    Args:
        faces: what was found in the image, or in the image inside a frame.
        shape: (height, width) of that.
        select: "center" for the face whose box is nearest the center of the image, which is LFW's rule; "largest"; or
            "score" for the highest probability.
        corner: (x, y) of the image in its frame.
    """
    size = np.asarray(shape) - 2 * np.asarray(corner)[::-1]    # of the image itself
    rows = [row for row, points in enumerate(faces.landmarks) if can_be_aligned(points - corner, size)]
    from_center = (faces.boxes[:, :2] + faces.boxes[:, 2:] - shape[::-1]) / 2
    values = {"center": -(from_center ** 2).sum(1), "largest": (faces.boxes[:, 2:] - faces.boxes[:, :2]).prod(1),
             "score": faces.scores}[select]
    return max(rows, key=lambda row: values[row], default=None)


def can_be_aligned(points, shape):
    """Return whether landmarks can belong to a face that is not mirrored, and are inside an image of this shape."""
    try:
        check_inside(points, shape)
        similarity_transform(points)
    except ValueError:
        return False
    return True
