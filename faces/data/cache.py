"""The aligned-face cache: every face is read, decoded and aligned once, and memory-mapped from then on.

A cache is a folder. faces.u8 holds N faces of 112x96x3 bytes in the order of the list, and failed.txt lists the images
that could not be used. During the build, journal.jsonl records which chunks of faces.u8 are done, so a killed build
continues where it stopped. cache.json is written last and marks the cache as complete. The folder's name contains a
hash of the list and the template, and another one of the sizes and modification times of the images, so each list has
its own cache, and a changed image makes a new one.
"""
import hashlib
import json
import os
import re
import shutil
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from tqdm import tqdm

from faces.align import (
    HEIGHT,
    TEMPLATE,
    WIDTH,
    check_inside,
    crop_aligned,
    position_problem,
    similarity_transforms,
    warp,
)
from faces.data.casia import Folder, list_casia, without_lfw_overlap
from faces.device import count_cpus
from faces.files import (
    CACHE,
    InputError,
    atomic_write,
    count_of,
    locked,
    read_bytes,
    read_json,
    write_json,
)
from faces.images import UnreadableImage, one_opencv_thread, read_image, summarize

FACE_SHAPE, FACE_BYTES = (HEIGHT, WIDTH, 3), HEIGHT * WIDTH * 3
CHUNK = 1024                # faces per line of the journal; a build that was killed repeats its unfinished chunks
BLOCK = 32                  # faces per task of a thread
MAX_FAILED = 0.01           # fraction of the list; more failures suggest a wrong folder or list


class AlignedFaces:
    """Aligned faces with labels.

    Attributes:
        images: uint8 (M, 112, 96, 3) memory map, RGB, which may contain more faces than this set.
        rows: int64 (N,), the rows of `images` that belong to this set.
        labels: int64 (N,), 0..classes-1.
        classes: number of identities.
        fingerprint: hash of everything that training depends on: names, landmarks and labels of the images.
    """

    def __init__(self, images, listing, rows, summary=""):
        self.images, self.rows, self.summary = images, rows, summary
        # People without any image left would leave gaps in the labels, so they are renumbered.
        people, self.labels = np.unique(listing.labels[rows], return_inverse=True)
        self.classes = len(people)
        self.fingerprint = _hash_list([listing.paths[row] for row in rows], self.labels,
                                      None if listing.points is None else listing.points[rows])

    def __len__(self):
        return len(self.rows)

    def __str__(self):
        return self.summary

    def batch(self, index, out=None):
        """Return the faces and labels at an int array of B positions.

        Args:
            index: the positions.
            out: where to copy the faces to, uint8 (B, 112, 96, 3); None makes a new array.

        Returns:
            (uint8 (B, 112, 96, 3), int64 (B,)).
        """
        # With mode="clip", numpy copies without a buffer. The positions are valid, so nothing is clipped.
        return np.take(self.images, self.rows[index], axis=0, out=out, mode="clip"), self.labels[index]


def load_casia(root, landmarks=None, cache=CACHE, drop_lfw_overlap=False, label_list=None):
    """Return the aligned faces of a training set, from its cache, which is built on first use.

    Images that can't be used are counted, listed in the cache's failed.txt and left out; people without any image left
    get no class. str() of the result summarizes the set.

    Args:
        root, landmarks, label_list: see faces.data.casia.list_casia().
        cache: the folder of all caches.
        drop_lfw_overlap: whether to leave out the people who are also in LFW.

    Raises:
        InputError: the data set is malformed, more than 1 % of it is unusable, or the cache does not fit on the disk.
    """
    listing = list_casia(root, landmarks, label_list)
    images, failed = build(listing, cache)
    keep = np.ones(len(listing.paths), bool)
    keep[[row for row, _ in failed]] = False
    overlap = ~without_lfw_overlap(listing) if drop_lfw_overlap else np.zeros_like(keep)
    rows = np.flatnonzero(keep & ~overlap)
    if not len(rows):
        raise InputError(f"{listing.source} has no images left to train on; leave out --drop-lfw-overlap or "
                         "choose another set.")
    people = np.unique(listing.labels[rows])
    summary = f"{listing.source}: {count_of(len(rows), 'face~')} of {count_of(len(people), 'person')}{listing.gaps}"
    if failed:
        summary += f"; {count_of(len(failed), 'unusable image~')} left out, see failed.txt in the cache"
    if drop_lfw_overlap:
        summary += f"; {count_of(overlap.sum(), 'image~')} of people in LFW dropped"
    return AlignedFaces(images, listing, rows, "\n  ".join((summary, *listing.notes, _describe(images))))


def build(listing, cache=CACHE):
    """Build the cache of a faces.data.casia.TrainingList, unless it exists.

    Args:
        listing: the TrainingList.
        cache: the folder of all caches.

    Returns:
        (uint8 (N, 112, 96, 3) read-only memory map, list of (row, reason) of unusable images).
    """
    name = Path(str(listing.source)).resolve()
    key = _hash_list([str(name), *listing.paths], None, listing.points)[:12]
    versions = hashlib.sha256(listing.source.versions(listing.paths).tobytes()).hexdigest()[:8]
    folder = Path(cache).expanduser() / f"{name.stem}-{key}-{versions}"
    shape = (len(listing.paths), *FACE_SHAPE)
    failed = _read_failed(folder, shape[0])
    if failed is None:
        with locked(folder / ".lock", f"aligning the faces of {listing.source} into {folder}"):
            failed = _read_failed(folder, shape[0])    # another process may have built it while this one waited
            if failed is None:
                failed = _build(listing, folder)
    faces = folder / "faces.u8"
    if not faces.is_file() or faces.stat().st_size != np.prod(shape):
        raise InputError(f"{folder} is damaged (faces.u8 is missing or has the wrong size); delete the folder and "
                         "start again.")
    return np.memmap(faces, np.uint8, "r", shape=shape), failed


def _read_failed(folder, total):
    """Return the unusable images that cache.json lists, or None if the cache is not complete.

    Raises:
        InputError: cache.json is damaged, or is that of another list.
    """
    advice = "delete it, and the faces are aligned again"
    content = read_json(folder / "cache.json")
    if content is None:
        return None
    failed = content.get("failed")
    rows = isinstance(failed, list) and all(
        isinstance(item, list) and [type(value) for value in item] == [int, str] and 0 <= item[0] < total
        for item in failed)
    if not rows or content.get("faces") != total:
        raise InputError(f"{folder / 'cache.json'} is damaged; {advice}.")
    return failed


def _describe(images):
    """Return when a cache was built, and where it is."""
    folder = Path(images.filename).parent
    finished = time.localtime((folder / "cache.json").stat().st_mtime)
    return f"aligned on {time.strftime('%Y-%m-%d at %H:%M', finished)}, cache {folder}"


def _outdated(folder):
    """Return the complete caches of the same list from before its images changed."""
    list_name = folder.name.rpartition("-")[0]
    return [other for other in sorted(folder.parent.iterdir()) if other != folder and (other / "cache.json").is_file()
            and other.name.rpartition("-")[0] == list_name]


def _hash_list(names, labels, points):
    digest = hashlib.sha256(b"aligned-1" + TEMPLATE.tobytes())
    digest.update("\n".join(names).encode(errors="surrogateescape"))    # names of files need not be UTF-8
    for array in (labels, points):
        digest.update(b"" if array is None else array.tobytes())
    return digest.hexdigest()


def _build(listing, folder):
    """Align all faces into the cache, or continue a build; return a list of (row, reason) of unusable images."""
    total = len(listing.paths)
    for other in _outdated(folder):
        print(f"the images have changed since the cache {other} was built; delete it unless you need it")
    _allocate(folder, total * FACE_BYTES)
    done, failed = _read_journal(folder), []
    chunks = (range(start, min(start + CHUNK, total)) for start in range(0, total, CHUNK))
    missing = [rows for rows in chunks if rows not in done]
    sizes = np.full((total, 2), np.nan, np.float32)    # width and height of every image
    print(f"aligning {count_of(total, 'face~')} of {listing.source} into the cache {folder}")
    try:
        # The pool already has a thread per CPU, with which OpenCV's own threads would compete.
        with open(folder / "faces.u8", "r+b") as file, open(folder / "journal.jsonl", "a") as journal, \
                one_opencv_thread(), ThreadPoolExecutor(count_cpus()) as pool, \
                ThreadPoolExecutor(1) as writer, \
                tqdm(total=total, unit=" images", unit_scale=True, dynamic_ncols=True) as bar, ExitStack() as stack:
            stack.callback(pool.shutdown, cancel_futures=True)  # an interrupted build does not wait for what is queued
            pending_write = writer.submit(int)  # returns at once: the first chunk has no write to wait for
            bar.update(total - sum(map(len, missing)))
            for rows, chunk, chunk_failed in _align(listing, missing, pool, sizes):
                failed += chunk_failed
                if len(failed) > MAX_FAILED * total:
                    raise InputError(_failure_message(listing, failed))
                if listing.points is not None and (problem := position_problem(listing.points.mean(1) / sizes)):
                    raise InputError(_position_message(listing, problem))
                pending_write.result()  # a chunk is written while the next one is aligned; at most one write is pending
                pending_write = writer.submit(_store, chunk, rows, file, None if chunk_failed else journal)
                bar.update(len(rows))
            pending_write.result()
    except OSError as error:
        raise _write_error(folder, error) from None
    with atomic_write(folder / "failed.txt", "w", encoding="utf-8") as file:
        file.writelines(f"{listing.paths[row]}\t{reason}\n" for row, reason in failed)
    write_json(folder / "cache.json", {"faces": total, "failed": failed})
    (folder / "journal.jsonl").unlink()
    return failed


def _allocate(folder, size):
    path = folder / "faces.u8"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        allocated = path.stat().st_size if path.exists() else 0
        if size - allocated > shutil.disk_usage(folder).free:
            raise InputError(f"{folder} needs {size / 1e9:.1f} GB for the aligned faces, but less is free; free "
                             "some space or choose a larger disk with --cache.")
        if allocated != size:    # what a journal says about another file, or about one that was deleted, is void
            (folder / "journal.jsonl").unlink(missing_ok=True)
        with open(path, "ab") as file:
            file.truncate(size)
    except OSError as error:
        raise _write_error(folder, error) from None


def _write_error(folder, error):
    return InputError(f"can't write the cache {folder}: {error.strerror}; choose another folder with --cache, or free "
                      "some space and start again, and the build will continue where it stopped.")


def _align(listing, chunks, pool, sizes):
    """Align chunks of rows; yield (rows, uint8 (len(rows), 112, 96, 3), list of (row, reason) of unusable images).

    Each chunk is submitted before the previous one is complete, so that the threads of the pool never run out of work.
    """
    pending = deque()
    for rows in chunks:
        chunk = np.empty((len(rows), *FACE_SHAPE), np.uint8)
        blocks = [slice(start, start + BLOCK) for start in range(0, len(rows), BLOCK)]
        tasks = [pool.submit(_fill_block, chunk[block], listing, rows[block], sizes) for block in blocks]
        pending.append((rows, chunk, tasks))
        if len(pending) > 1:
            yield _collect(*pending.popleft())
    yield from (_collect(*item) for item in pending)


def _collect(rows, chunk, tasks):
    return rows, chunk, sum((task.result() for task in tasks), [])


def _fill_block(faces, listing, rows, sizes):
    """Align the images of `rows` into `faces`; return a list of (row, reason) of unusable images.

    The width and height of each image go into `sizes`. Only decoding and warping release the interpreter lock, so the
    transforms are computed for all rows at once.
    """
    transforms = reasons = [None] * len(rows)
    if listing.points is not None:
        transforms, reasons = similarity_transforms(listing.points[rows.start:rows.stop])
    failed = []
    for face, row, transform, reason in zip(faces, rows, transforms, reasons):
        reason = reason or _fill(face, listing, row, transform, sizes)
        if reason:
            face[:] = 0
            failed.append((row, reason))
    return failed


def _fill(face, listing, row, transform, sizes):
    """Align the image of a row into `face`; return None, or the reason why the image can't be used."""
    try:
        image = read_image(listing.source.open(listing.paths[row]))
        if transform is None:
            face[:] = crop_aligned(image)
        else:
            check_inside(listing.points[row], image.shape)
            warp(image, transform, out=face)
            sizes[row] = image.shape[1::-1]
    except (UnreadableImage, ValueError) as error:
        return str(error)


def _store(chunk, rows, file, journal):
    """Write a chunk to disk, then record it in the journal; a chunk with failures is tried again by the next build."""
    file.seek(rows.start * FACE_BYTES)
    file.write(chunk)
    file.flush()
    os.fsync(file.fileno())
    if journal:
        journal.write(json.dumps([rows.start, rows.stop]) + "\n")
        journal.flush()


def _read_journal(folder):
    """Return the chunks that are on disk, as a set of ranges of rows."""
    try:
        lines = read_bytes(folder / "journal.jsonl", 10**7).decode("latin-1").split("\n")
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise InputError(f"can't read {folder / 'journal.jsonl'}: {error.strerror or error}; delete it, and the "
                         "faces are aligned again.") from None
    # A build that was killed may have left an incomplete last line, which does not match and is ignored.
    matches = (re.fullmatch(r"\[([0-9]{1,18}), ([0-9]{1,18})\]", line) for line in lines)
    return {range(int(match[1]), int(match[2])) for match in matches if match}


def _failure_message(listing, failed):
    examples = summarize([(listing.paths[row], reason) for row, reason in failed])
    total = len(listing.paths)
    if listing.points is None and "landmarks are needed" in examples and isinstance(listing.source, Folder):
        return (f"{listing.source} has photos that are not aligned faces ({examples}); run "
                f"`python mtcnn/casia_landmark.py --casia {listing.source}` first.")
    suspects = "folder" if listing.points is None else "folder and the landmark list"
    return (f"more than {MAX_FAILED:.0%} of the {count_of(total, 'image~')} of {listing.source} can't "
            f"be used ({examples}); check the {suspects}.")


def _position_message(listing, problem):
    return (f"the landmarks of {listing.source} are in {problem}; use the images that the landmark list was made for, "
            "or create a list for these with mtcnn/casia_landmark.py.")
