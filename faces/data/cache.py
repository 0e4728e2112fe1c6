"""The aligned-face cache: every face is read, decoded and aligned once, and memory-mapped from then on.

A cache is a folder. faces.u8 holds N faces of 112x96x3 bytes in the order of the list, and gets its name when all else
is done; failed.txt lists the images that could not be used. The folder's name contains a hash of the list and the
template, and another one of the sizes and times of the images: each list has its own cache, a changed image a new one.
"""
import contextlib
import hashlib
import shutil
import time
from pathlib import Path

import numpy as np

from faces import align
from faces.align import HEIGHT, WIDTH
from faces.data.casia import TrainingList, list_casia, without_lfw_overlap
from faces.data.sources import Folder
from faces.files import CACHE, InputError, atomic_write, count_of, locked, path, progress_bar, reading
from faces.images import summarize

CHUNK = 2048                # faces that are aligned before they are written, 66 MB
MAX_FAILED = 0.01           # fraction of the list; more failures suggest a wrong folder or list


class AlignedFaces:
    """Aligned faces: rows `rows`, int64 (N,), of `images`, uint8 (M, 112, 96, 3), RGB, usually a memory map; with
    labels, int64 (N,), 0..classes-1. `fingerprint` is a hash of what training depends on: names, landmarks, labels."""

    def __init__(self, images: np.ndarray, listing: TrainingList, rows: np.ndarray, summary: str = ""):
        self.images, self.rows, self.summary = images, rows, summary
        # People without any image left would leave gaps in the labels, so they are renumbered.
        people, self.labels = np.unique(listing.labels[rows], return_inverse=True)
        self.classes = len(people)
        self.fingerprint = _hash_list([listing.paths[row] for row in rows], self.labels,
                                      None if listing.points is None else listing.points[rows])

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        return self.summary

    def batch(self, index: np.ndarray, out: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return faces, uint8 (B, 112, 96, 3), in `out` if that is given, and labels, int64 (B,), at B positions."""
        # With mode="clip", numpy copies without a buffer. The positions are valid, so nothing is clipped.
        return np.take(self.images, self.rows[index], axis=0, out=out, mode="clip"), self.labels[index]


def load_casia(root, landmarks=None, cache=CACHE, drop_lfw_overlap: bool = False, label_list=None) -> AlignedFaces:
    """Return the aligned faces of a training set, see list_casia(), from its cache, which is built in the folder
    `cache` on first use. Images that can't be used are counted, listed in the cache's failed.txt and left out; people
    without any image left get no class. str() of the result summarizes the set. Raises InputError if the set is
    malformed, more than 1 % of it can't be used, or the cache does not fit on the disk."""
    listing = list_casia(root, landmarks, label_list)
    images, failed, folder = build(listing, cache)
    keep = np.ones(len(listing.paths), bool)
    keep[[row for row, _ in failed]] = False
    overlap = ~without_lfw_overlap(listing) if drop_lfw_overlap else np.zeros_like(keep)
    rows = np.flatnonzero(keep & ~overlap)
    people = np.unique(listing.labels[rows])
    summary = f"{listing.source}: {count_of(len(rows), 'face~')} of {count_of(len(people), 'person')}{listing.gaps}"
    if failed:
        summary += f"; {count_of(len(failed), 'unusable image~')} left out, see failed.txt in the cache"
    if drop_lfw_overlap:
        summary += f"; {count_of(overlap.sum(), 'image~')} of people in LFW dropped"
    finished = time.strftime("%Y-%m-%d at %H:%M", time.localtime((folder / "faces.u8").stat().st_mtime))
    lines = summary, *listing.notes, f"aligned on {finished}, cache {folder}"
    return AlignedFaces(images, listing, rows, "\n  ".join(lines))


def build(listing: TrainingList, cache=CACHE) -> tuple[np.ndarray, list[tuple[int, str]], Path]:
    """Build the cache of a training set in the folder of all caches, unless it exists. Return the faces, uint8
    (N, 112, 96, 3), not to be changed; (row, reason) of each unusable image; and the folder of the cache."""
    root = Path(listing.source.root).resolve()
    key = _hash_list([str(root), *listing.paths], listing.points)[:12]
    versions = hashlib.sha256(listing.source.versions(listing.paths).tobytes()).hexdigest()[:8]
    folder = path(cache) / f"{root.stem}-{key}-{versions}"
    faces, shape = folder / "faces.u8", (len(listing.paths), HEIGHT, WIDTH, 3)
    if not faces.is_file():
        with locked(folder / ".lock", f"aligning the faces of {listing.source} into {folder}", option="--cache"):
            if not faces.is_file():    # another process may have built it while this one waited
                _build(listing, folder)
    with reading(faces, "cache of aligned faces", f"delete {folder} and start again"):
        if faces.stat().st_size != np.prod(shape):
            raise ValueError("wrong size")
        rows = {name: row for row, name in enumerate(listing.paths)}
        with open(folder / "failed.txt", encoding="utf-8", errors="surrogateescape", newline="\n") as lines:
            failed = [(rows[name], reason.rstrip()) for name, _, reason in (line.rpartition("\t") for line in lines)]
        for mode in ("r", "c"):    # some network disks can map files only privately, or not at all
            with contextlib.suppress(OSError):
                return np.memmap(faces, np.uint8, mode, shape=shape), failed, folder
        return np.fromfile(faces, np.uint8).reshape(shape), failed, folder


def _hash_list(names, *arrays):
    digest = hashlib.sha256(b"aligned-1" + align.TEMPLATE.tobytes())
    digest.update("\n".join(names).encode(errors="surrogateescape"))    # names of files need not be UTF-8
    for array in arrays:
        digest.update(b"" if array is None else array.tobytes())
    return digest.hexdigest()


def _build(listing, folder):
    """Align all faces into the cache."""
    total, size, failed = len(listing.paths), len(listing.paths) * HEIGHT * WIDTH * 3, []
    for other in folder.parent.glob(f"{folder.name.rpartition('-')[0]}-*/faces.u8"):
        print(f"the images have changed since the cache {other.parent} was built; delete it unless you need it")
    for leftover in folder.glob(".*.partial"):    # of a build that was killed
        leftover.unlink()
    if size > shutil.disk_usage(folder).free:
        raise InputError(f"{folder} needs {size / 1e9:.1f} GB for the aligned faces, but less is free; free "
                         "some space or choose a larger disk with --cache.")
    print(f"aligning {count_of(total, 'face~')} of {listing.source} into the cache {folder}")
    centers = np.full((total, 2), np.nan)    # of the landmarks, as fractions of the image
    with atomic_write(folder / "faces.u8") as file, progress_bar(total=total, unit=" images", unit_scale=True) as bar:
        for start in range(0, total, CHUNK):
            part = slice(start, start + CHUNK)
            points = None if listing.points is None else listing.points[part]
            faces, centers[part], bad = align.align_all(listing.source, listing.paths[part], points)
            failed += [(start + row, reason) for row, reason in bad]
            file.write(faces)
            bar.update(len(faces))
            _check(listing, failed, centers)
        with atomic_write(folder / "failed.txt", "w") as report:
            report.writelines(f"{listing.paths[row]}\t{' '.join(reason.split())}\n" for row, reason in failed)


def _check(listing, failed, centers):
    """Raise InputError if too many images have failed, or if the landmarks are those of copies of another size."""
    source, total = listing.source, len(listing.paths)
    if len(failed) > MAX_FAILED * total:
        failures = [(listing.paths[row], reason) for row, reason in failed]
        most = summarize(failures, 1)
        if listing.points is None and "landmarks are needed" in most and isinstance(source, Folder):
            raise InputError(f"{source} has photos that are not aligned faces ({most}); run "
                             f"`python mtcnn/casia_landmark.py --casia {source}` first.")
        raise InputError(f"more than {MAX_FAILED:.0%} of the {count_of(total, 'image~')} of {source} can't be used "
                         f"({summarize(failures)}); check the folder, or replace these images and delete their lines "
                         "in the list.")
    align.check_positions(centers, source)
