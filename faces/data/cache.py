"""The aligned-face cache: every face is read, decoded and aligned once, and memory-mapped from then on.

A cache is a folder. faces.u8 holds N faces of 112x96x3 bytes in the order of the list, and failed.txt lists the images
that could not be used. During the build, journal.jsonl records which chunks of faces.u8 are done, so a killed build
continues where it stopped. cache.json is written last and marks the cache as complete. The folder's name contains a
hash of the list and the template, so a different list gets a different cache.
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

SHAPE, FACE = (HEIGHT, WIDTH, 3), HEIGHT * WIDTH * 3    # of a face, and its size in bytes
NAME = "casia_landmark.txt"
CHUNK = 1024                # faces per line of the journal; a killed build repeats unfinished chunks
BLOCK = 32                  # faces that a thread aligns at a time
MAX_FAILED = 0.01           # fraction of the list; more failures suggest a wrong folder or list


class AlignedFaces:
    """Aligned faces with labels.

    Attributes:
        images: uint8 (M, 112, 96, 3) memory map, RGB, of which only `rows` are used.
        rows: int64 (N,), rows of `images`.
        labels: int64 (N,), 0..classes-1.
        classes: number of identities.
        fingerprint: hash of all that training depends on: names, landmarks and labels of the images.
    """

    def __init__(self, images, listing, rows, summary=""):
        self.images, self.rows, self.summary = images, rows, summary
        # Renumber the labels, because dropped people leave gaps.
        people, self.labels = np.unique(listing.labels[rows], return_inverse=True)
        self.classes = len(people)
        self.fingerprint = _hash_list([listing.paths[row] for row in rows], self.labels,
                                      None if listing.points is None else listing.points[rows])

    def __len__(self):
        return len(self.rows)

    def __str__(self):
        return self.summary

    def __getstate__(self):  # worker processes open the map themselves, because pickling would copy all of it
        return {**vars(self), "images": (self.images.filename, self.images.shape)}

    def __setstate__(self, state):
        file, shape = state.pop("images")
        vars(self).update(state, images=np.memmap(file, np.uint8, "r", shape=shape))

    def batch(self, index):
        """Return (uint8 (B, 112, 96, 3), int64 (B,)) for an int array of B positions."""
        return self.images[self.rows[index]], self.labels[index]


def load_casia(root, landmarks=None, cache=CACHE, drop_lfw_overlap=False, labels=None):
    """Return the aligned faces of a training set, from the cache; see faces.data.casia.read_casia().

    Images that can't be used are counted, listed in the cache's failed.txt and left out; people without any image left
    get no class. str() of the result summarizes the set.

    Raises:
        InputError: the data set is malformed, more than 1 % of it is unusable, or the cache does not fit on the disk.
    """
    listing = read_casia(root, landmarks or (None if labels else _known_landmarks(root)), labels)
    images, failed = build(listing, cache)
    keep = np.ones(len(listing.paths), bool)
    keep[[row for row, _ in failed]] = False
    overlap = ~without_lfw_overlap(listing) if drop_lfw_overlap else np.zeros_like(keep)
    rows = np.flatnonzero(keep & ~overlap)
    if not len(rows):
        raise InputError(f"{listing.source} has no images left to train on; check the options that leave images out.")
    summary = f"{listing.source}: {len(rows):,} faces of {len(np.unique(listing.labels[rows])):,} people"
    if failed:
        summary += f"; {len(failed)} unusable images left out, see failed.txt in the cache"
    if drop_lfw_overlap:
        summary += f"; {overlap.sum():,} images of people in LFW dropped"
    return AlignedFaces(images, listing, rows, summary)


def build(listing, cache=CACHE):
    """Build or find the cache of a faces.data.casia.TrainingList.

    Returns:
        (uint8 (N, 112, 96, 3) read-only memory map, list of (row, reason) of unusable images).
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
        raise InputError(f"{folder} is damaged (faces.u8 has the wrong size); delete the folder and start again.")
    return np.memmap(folder / "faces.u8", np.uint8, "r", shape=shape), failed


def _known_landmarks(root):
    """Return the list in the folder, or else the one that casia_landmark.py wrote for it, or else None."""
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
    print(f"aligning {total:,} faces of {listing.source} into the cache {folder}")
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
                stored.result()  # a chunk is written while the next one is aligned, and no more than one waits
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
            raise InputError(f"{folder} needs {size / 1e9:.1f} GB for the aligned faces, but the disk has less; "
                             "choose a larger disk with --cache.")
        with open(path, "ab") as file:
            file.truncate(size)
    except OSError as error:
        raise _unwritable(folder, error) from None


def _unwritable(folder, error):
    return InputError(f"can't write the cache {folder}: {error.strerror}; choose another place with --cache, or free "
                      "some space and start again to continue from here.")


def _align(listing, chunks, pool):
    """Align chunks of rows; yield (rows, uint8 (len(rows), 112, 96, 3), list of (row, reason) of unusable images).

    Each chunk is submitted before the previous one is complete, so that the threads of the pool never run out of work.
    """
    pending = deque()
    for rows in chunks:
        chunk = np.empty((len(rows), *SHAPE), np.uint8)
        blocks = [slice(first, first + BLOCK) for first in range(0, len(rows), BLOCK)]
        pending.append((rows, chunk, [pool.submit(_fill_block, chunk[b], listing, rows[b]) for b in blocks]))
        if len(pending) > 1:
            yield _collect(*pending.popleft())
    yield from (_collect(*chunk) for chunk in pending)


def _collect(rows, chunk, blocks):
    return rows, chunk, sum((block.result() for block in blocks), [])


def _fill_block(faces, listing, rows):
    """Align a block of faces at a time, because only decoding and warping release the interpreter lock."""
    transforms = reasons = [None] * len(rows)
    if listing.points is not None:
        transforms, reasons = similarity_transforms(listing.points[rows.start:rows.stop])
    return [(row, reason) for face, row, *transform in zip(faces, rows, transforms, reasons)
            if (reason := _fill(face, listing, row, *transform))]


def _fill(face, listing, row, transform, reason):
    """Align the image of a row into `face`; return None, or the reason why it can't be used."""
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
    """Write a chunk to disk, then record it in the journal; a chunk with failures is tried again by the next build."""
    file.seek(rows.start * FACE)
    file.write(chunk)
    file.flush()
    os.fsync(file.fileno())
    if journal:
        journal.write(json.dumps([rows.start, rows.stop]) + "\n")
        journal.flush()


def _read_journal(folder):
    """Return the chunks that are on disk, as a set of ranges of rows."""
    try:
        lines = (folder / "journal.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return set()
    found = (re.fullmatch(r"\[(\d+), (\d+)\]", line) for line in lines)   # skips an incomplete line
    return {range(int(match[1]), int(match[2])) for match in found if match}


def _too_many(listing, failed):
    shown = "; ".join(f"{listing.paths[row]}: {reason}" for row, reason in failed[:3])
    return (f"more than {MAX_FAILED:.0%} of the {len(listing.paths):,} images of {listing.source} can't be used "
            f"({shown}); check the folder and the landmark list.")
