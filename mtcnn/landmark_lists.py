"""Find the landmarks of all images in a folder; shared by lfw_landmark.py and casia_landmark.py.

Results are appended to a journal beside the list, from which an interrupted or killed run continues. The list itself is
written atomically at the end.
"""
import contextlib
import hashlib
from pathlib import Path

import numpy as np
from tqdm import tqdm

from faces.files import InputError, atomic_write, locked, remove_partial, version
from faces.landmarks import is_landmark_list
from faces.signals import resumable
from faces.text import count_of, printable
from mtcnn.detector import Detector, add_options, make_detector
from mtcnn.journal import Journal
from mtcnn.search import ATTEMPTS, RULES, fastest_device, normalize_rule, search

MAX_UNREADABLE = 0.01    # fraction of the images; a run with more of them stops
MAX_SHOWN = 20           # names to print per kind of failure; .failed.txt lists all of them


def median_points(finds):
    """Return the median landmarks of all faces, as fractions of width and height: float (5, 2), or None."""
    fractions = [(np.reshape(f.points, (5, 2)) / f.size).astype(np.float32) for f in finds if f.points]
    return np.median(fractions, axis=0) if fractions else None


def find_landmarks(root, paths, device="auto"):
    """Detect the landmarks of some images without writing a list.

    Args:
        root: the folder.
        paths: N paths below it.
        device: where the networks run, as mtcnn.detector.Detector takes it.

    Returns:
        float32 (N, 5, 2), pixels of the whole images; and the number of images without a face, which get the median
        landmarks of the others.

    Raises:
        InputError: an image can't be read, or none of them has a face.
    """
    detector, finds = Detector(device=device), []
    workers = None if detector.device.type == "cpu" else 0  # starting processes on a GPU would take as long as it saves
    with tqdm(desc="detecting landmarks", total=len(paths), unit=" images") as bar:
        for batch, unreadable in search(root, paths, range(len(paths)), detector, "center", workers=workers):
            if unreadable:
                i, reason = next(iter(unreadable.items()))
                raise InputError(f"can't read {Path(root) / paths[i]}: {reason}; replace it.")
            finds += batch
            bar.update(len(batch))
    median = median_or_stop(finds, root)
    points = [np.reshape(f.points, (5, 2)) if f.points else median * f.size for f in finds]
    return np.array(points, np.float32).reshape(-1, 5, 2), sum(f.points is None for f in finds)


def median_or_stop(finds, root):
    """Return median_points(finds).

    Raises:
        InputError: no image has a face.
    """
    median = median_points(finds)
    if median is None:
        raise InputError(f"no face was found in any image in {root}; pass a folder with photos of faces.")
    return median


def add_list_options(parser):
    """Add the options that both scripts have."""
    parser.add_argument("--output", type=Path, metavar="FILE",
                        help="the list (default: in cache/ of this clone, where training and evaluation look for it)")
    parser.add_argument("--select", type=normalize_rule, choices=RULES, default="center",
                        help="which face of several: nearest the center of the image (default; right for LFW and "
                             "CASIA), the largest, or the one with the highest score")
    parser.add_argument("--batch-size", type=int, default=32, metavar="IMAGES",
                        help="images per batch for a worker process, at least 1 (default: 32)")
    parser.add_argument("--workers", type=int, metavar="N",
                        help="worker processes (default: one per core, but at most 8 with CUDA, which they share; 0 "
                             "with mps)")
    add_options(parser, auto="CUDA if available, else the CPU; also the CPU if it has 32 cores or more, which should "
                             "be as fast as a GPU")


def list_detector(args):
    """Return the Detector that the options ask for; `--device auto` is the device that is likely to be fastest.

    Raises:
        InputError: an option is out of range, or the device is not available.
    """
    if args.batch_size < 1:
        raise InputError(f"--batch-size {args.batch_size} is out of range; it must be at least 1.")
    if args.workers is not None and args.workers < 0:
        raise InputError(f"--workers {args.workers} is out of range; it must be 0 or more.")
    return make_detector(args, fastest_device(args.device))


@contextlib.contextmanager
def reserved(output):
    """Keep other processes from making the list `output` in a `with` block.

    Raises:
        InputError: another process is making it, it is a folder, or it exists and is not a landmark list.
    """
    if output.is_dir():
        raise InputError(f"{output} is a folder; pass a file as --output, such as {output / 'landmarks.txt'}.")
    with resumable(), locked(output.with_name(f".{output.name}.lock"), f"making {output}", wait=False,
                             advice="choose another --output, on a writable local disk"):
        if output.exists() and output.stat().st_size and not is_landmark_list(output):
            raise InputError(f"{output} exists and is not a landmark list; pass another file as --output.")
        remove_partial(output, _failed_list(output))
        yield


def find_all(root, paths, output, detector, args):
    """Find the faces in all images of a folder, continuing the journal beside `output`.

    Args:
        root: the folder.
        paths: N paths below it.
        output: the list that is being made.
        detector: mtcnn.detector.Detector.
        args: has select, batch_size and workers; see add_list_options().

    Returns:
        Journal, complete except for unreadable images, and {index: reason} of those.

    Raises:
        InputError: more than MAX_UNREADABLE of the images can't be read.
    """
    settings = {"folder": str(root.resolve()), "images": digest(paths),
                "photos": digest(version(root / path) for path in paths),
                "select": args.select, "min_face_size": detector.min_face_size, "factor": detector.factor,
                "attempts": ATTEMPTS, "device": detector.device.type}    # a GPU adds in another order
    journal, unreadable = Journal(output, settings, len(paths)), {}
    indices = journal.missing()
    if 0 < len(indices) < len(paths):
        print(f"continuing: {len(paths) - len(indices):,} of {count_of(len(paths), 'image~')} already done")
    with tqdm(desc="landmarks", total=len(paths), initial=len(paths) - len(indices), unit=" images") as bar:
        for finds, bad in search(root, paths, indices, detector, args.select, args.batch_size, args.workers):
            journal.add(finds)
            unreadable.update(bad)
            if len(unreadable) > MAX_UNREADABLE * len(paths):
                examples = "; ".join(f"{printable(paths[i])}: {why}" for i, why in list(unreadable.items())[:5])
                raise InputError(f"{len(unreadable):,} of {count_of(len(paths), 'image~')} in {root} can't be read, "
                                 f"more than {MAX_UNREADABLE:.0%} ({examples}); replace or remove them and run the "
                                 "command again.")
            bar.update(len(finds) + len(bad))
    if journal.missing() != sorted(unreadable):
        raise InputError(f"{journal.path} is incomplete; run the command again.")
    return journal, unreadable


def _failed_list(output):
    return output.with_name(f"{output.stem}.failed.txt")


def digest(lines):
    """Return a hash of some lines, joined by newlines."""
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()


def report(paths, journal, unreadable, output, fate):
    """Print a summary; list the images that needed a retry or failed on the terminal and in .failed.txt.

    Args:
        fate: what happened to images without a face, such as "median landmarks".
    """
    retried = [paths[find.index] for find in journal.finds() if find.attempt > 0]
    faceless = [paths[find.index] for find in journal.finds() if find.attempt < 0]
    bad = [f"{paths[i]}: {unreadable[i]}" for i in sorted(unreadable)]
    kinds = {"found only in a frame or with lower thresholds": retried, f"no face found, {fate}": faceless,
             "unreadable, left out": bad}
    failed = _failed_list(output)
    failed.unlink(missing_ok=True)
    if retried or faceless or bad:
        with atomic_write(failed, "w", encoding="utf-8") as file:
            file.writelines(f"{kind}\t{printable(name)}\n" for kind, names in kinds.items() for name in names)
    print(f"{count_of(len(paths), 'image~')}: a face in {len(paths) - len(faceless) - len(bad)}")
    for kind, names in kinds.items():
        print(f"  {kind}: {len(names)}")
        for name in names[:MAX_SHOWN]:
            print(f"    {printable(name)}")
        if len(names) > MAX_SHOWN:
            print(f"    and {len(names) - MAX_SHOWN} more, see {failed}")
    print(f"landmarks: {output}")
