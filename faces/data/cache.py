"""The aligned-face cache: every face is read, decoded and aligned once, and is a row of a memory map ever after.

A cache is a folder: faces.u8 holds N faces of 112x96x3 bytes in the order of the list, failed.txt what could not be
used. While it is built, journal.jsonl says which chunks of faces.u8 are done, so that a killed build goes on where it
was; cache.json appears last and makes it whole. Its name carries a hash of the list and the template: another list
is another cache.
"""
import hashlib
import json
import os
import re
import shutil
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from faces.align import HEIGHT, TEMPLATE, WIDTH, crop_aligned, similarity_transforms, warp
from faces.data.casia import read_casia, without_lfw_overlap
from faces.device import count_cpus
from faces.files import CACHE, InputError, atomic_write, locked, write_json
from faces.images import UnreadableImage, one_opencv_thread, read_image
from faces.landmarks import default_list

SHAPE, FACE = (HEIGHT, WIDTH, 3), HEIGHT * WIDTH * 3    # of a face, and its bytes
NAME = "casia_landmark.txt"
CHUNK = 1024                # faces between two lines of the journal: at most this many are aligned again after a kill
BLOCK = 32                  # faces that a thread takes at a time
MAX_FAILED = 0.01           # of the list; more is no accident but a wrong folder


class AlignedFaces:
    """Aligned faces with labels.

    Attributes:
        images: uint8 (M, 112, 96, 3) memory map, RGB; only `rows` of it are used.
        rows: int64 (N,), rows of `images`.
        labels: int64 (N,), 0..classes-1.
        classes: number of identities.
        fingerprint: hash of the images' names, landmarks and labels: what training depends on.
    """

    def __init__(self, images, listing, rows, summary=""):
        self.images, self.rows, self.summary = images, rows, summary
        # Renumbering closes the gaps that dropped people leave.
        people, self.labels = np.unique(listing.labels[rows], return_inverse=True)
        self.classes = len(people)
        self.fingerprint = _hash_list([listing.paths[row] for row in rows], self.labels,
                                      None if listing.points is None else listing.points[rows])

    def __len__(self):
        return len(self.rows)

    def __str__(self):
        return self.summary

    def __getstate__(self):  # a reader process opens the map itself; pickled, a memory map would be copied whole
        return {**vars(self), "images": (self.images.filename, self.images.shape)}

    def __setstate__(self, state):
        file, shape = state.pop("images")
        vars(self).update(state, images=np.memmap(file, np.uint8, "r", shape=shape))

    def batch(self, index):
        """Return (uint8 (B, 112, 96, 3), int64 (B,)) for an int array of B positions."""
        return self.images[self.rows[index]], self.labels[index]


def load_casia(root, landmarks=None, cache=CACHE, drop_lfw_overlap=False, labels=None):
    """Aligned faces of a training set (see faces.data.casia.read_casia), through the cache.

    An image that can't be used is counted, listed in the cache's failed.txt and left out; a person left without any
    image is no class. str() of the result says what was found.

    Raises:
        InputError: a bad data set, more than 1 % of it unusable, or no room for the cache.
    """
    listing = read_casia(root, landmarks or (None if labels else _known_landmarks(root)), labels)
    images, failed = build(listing, cache)
    keep = np.ones(len(listing.paths), bool)
    keep[[row for row, _ in failed]] = False
    overlap = ~without_lfw_overlap(listing) if drop_lfw_overlap else np.zeros_like(keep)
    rows = np.flatnonzero(keep & ~overlap)
    if not len(rows):
        raise InputError(f"{listing.source} has no image left to train on.")
    summary = f"{listing.source}: {len(rows):,} faces of {len(np.unique(listing.labels[rows])):,} people"
    if failed:
        summary += f"; {len(failed)} unusable images left out, see failed.txt in the cache"
    if drop_lfw_overlap:
        summary += f"; {overlap.sum():,} images of people in LFW dropped"
    return AlignedFaces(images, listing, rows, summary)


def build(listing, cache=CACHE):
    """Make or find the cache of a faces.data.casia.TrainingList.

    Returns:
        (uint8 (N, 112, 96, 3) read-only memory map, list of (row, reason) of the unusable images).
    """
    name = Path(str(listing.source)).resolve()
    key = _hash_list([str(name), *listing.paths], None, listing.points)[:12]
    folder = Path(cache).expanduser() / f"{name.stem}-{key}"
    if not (folder / "cache.json").is_file():
        with locked(folder / ".lock", f"aligning these faces into {folder}"):
            if not (folder / "cache.json").is_file():    # another process may have built it while this one waited
                _build(listing, folder)
    failed = json.loads((folder / "cache.json").read_text())["failed"]
    shape = (len(listing.paths), *SHAPE)
    if (folder / "faces.u8").stat().st_size != np.prod(shape):
        raise InputError(f"{folder} is damaged (faces.u8 has another size); delete the folder and start again.")
    return np.memmap(folder / "faces.u8", np.uint8, "r", shape=shape), failed


def _known_landmarks(root):
    """The list in the folder, or the one casia_landmark.py wrote for it; None where there is neither."""
    root = Path(root).expanduser()
    return next((p for p in (root / NAME, default_list(root, NAME)) if p.is_file()), None)


def _hash_list(names, labels, points):
    digest = hashlib.sha256(b"aligned-1" + TEMPLATE.tobytes())
    digest.update("\n".join(names).encode())
    for array in (labels, points):
        digest.update(b"" if array is None else array.tobytes())
    return digest.hexdigest()


def _build(listing, folder):
    total = len(listing.paths)
    _allocate(folder, total * FACE)
    done, failed = _read_journal(folder), []
    chunks = (range(start, min(start + CHUNK, total)) for start in range(0, total, CHUNK))
    missing = [rows for rows in chunks if rows not in done]
    print(f"aligning {total:,} faces of {listing.source} into {folder}, once")
    try:
        with open(folder / "faces.u8", "r+b") as file, open(folder / "journal.jsonl", "a") as journal, \
                one_opencv_thread(), ThreadPoolExecutor(count_cpus()) as pool, ThreadPoolExecutor(1) as writer, \
                tqdm(total=total, unit="img", unit_scale=True, dynamic_ncols=True) as bar:
            stored = writer.submit(int)
            bar.update(total - sum(map(len, missing)))
            for rows, chunk, chunk_failed in _align(listing, missing, pool):
                failed += chunk_failed
                if len(failed) > MAX_FAILED * total:
                    raise InputError(_too_many(listing, failed))
                stored.result()  # the disk takes a chunk while the next ones are aligned, and no more than one waits
                stored = writer.submit(_store, chunk, rows, file, None if chunk_failed else journal)
                bar.update(len(rows))
            stored.result()
    except OSError as error:
        raise _unwritable(folder, error) from None
    with atomic_write(folder / "failed.txt", "w", encoding="utf-8") as file:
        file.writelines(f"{listing.paths[row]}\t{reason}\n" for row, reason in failed)
    write_json(folder / "cache.json", {"faces": total, "failed": failed})
    (folder / "journal.jsonl").unlink()


def _allocate(folder, size):
    path = folder / "faces.u8"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        present = path.stat().st_size if path.exists() else 0
        if size - present > shutil.disk_usage(folder).free:
            raise InputError(f"{folder} needs {size / 1e9:.1f} GB for the aligned faces and the disk has less; choose "
                             "a larger disk with --cache.")
        with open(path, "ab") as file:
            file.truncate(size)
    except OSError as error:
        raise _unwritable(folder, error) from None


def _unwritable(folder, error):
    return InputError(f"can't write the cache {folder}: {error.strerror}; choose another place with --cache, or free "
                      "some space and start again, which goes on from here.")


def _align(listing, chunks, pool):
    """Align chunks of rows: yield (rows, uint8 (len(rows), 112, 96, 3), list of (row, reason) of those that can't be).

    A chunk is begun before the one ahead of it is waited for, so that no thread of the pool runs out of work. Every
    processor has a thread of ours, in whose way OpenCV's own would get.
    """
    begun = deque()
    for rows in chunks:
        chunk = np.empty((len(rows), *SHAPE), np.uint8)
        blocks = [slice(first, first + BLOCK) for first in range(0, len(rows), BLOCK)]
        begun.append((rows, chunk, [pool.submit(_fill_block, chunk[b], listing, rows[b]) for b in blocks]))
        if len(begun) > 1:
            yield _finished(*begun.popleft())
    yield from (_finished(*chunk) for chunk in begun)


def _finished(rows, chunk, blocks):
    return rows, chunk, sum((block.result() for block in blocks), [])


def _fill_block(faces, listing, rows):
    """What a thread does at a time; decoding and warping free the interpreter, for which all the rest waits in turn."""
    transforms = reasons = [None] * len(rows)
    if listing.points is not None:
        transforms, reasons = similarity_transforms(listing.points[rows.start:rows.stop])
    return [(row, reason) for face, row, *transform in zip(faces, rows, transforms, reasons)
            if (reason := _fill(face, listing, row, *transform))]


def _fill(face, listing, row, transform, reason):
    """Align the face of a row into `face`; return None, or why it can't be."""
    try:
        if reason:
            raise ValueError(reason)
        image = read_image(listing.source.open(listing.paths[row]))
        if transform is None:
            face[:] = crop_aligned(image)
        else:
            warp(image, transform, out=face)
    except (UnreadableImage, ValueError) as error:
        face[:] = 0
        return str(error)


def _store(chunk, rows, file, journal):
    """Write a chunk to the disk, then note it; one with failures is tried again by the next build."""
    file.seek(rows.start * FACE)
    file.write(chunk)
    file.flush()
    os.fsync(file.fileno())
    if journal:
        journal.write(json.dumps([rows.start, rows.stop]) + "\n")
        journal.flush()


def _read_journal(folder):
    """The set of chunks, as ranges of rows, that are on the disk."""
    try:
        lines = (folder / "journal.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return set()
    found = (re.fullmatch(r"\[(\d+), (\d+)\]", line) for line in lines)   # a line that was torn is none
    return {range(int(match[1]), int(match[2])) for match in found if match}


def _too_many(listing, failed):
    shown = "; ".join(f"{listing.paths[row]}: {reason}" for row, reason in failed[:3])
    return (f"more than {MAX_FAILED:.0%} of the {len(listing.paths):,} images of {listing.source} can't be used "
            f"({shown}); check the folder and the landmark list.")
