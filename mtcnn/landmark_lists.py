"""Find the landmarks of all images of a data set. A run that was killed continues."""
import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from faces import files
from faces.data.sources import Folder
from faces.files import InputError, at_least, atomic_write, count_of, locked, path, shorten
from faces.images import summarize
from faces.landmarks import default_list, photos_digest, write_landmarks
from faces.rows import Rows
from mtcnn.detector import Detector, add_detector_options, make_detector
from mtcnn.search import ATTEMPTS, LANDMARKS, NO_FACE, RULES, search

MAX_UNREADABLE = 0.01    # fraction of the images; a run with more of them stops
UNKNOWN = -2             # instead of an index into ATTEMPTS, if an image can't be read


def find_landmarks(root: Path | str, paths: list[str], device="auto") -> tuple[np.ndarray, int]:
    """Return the landmarks of the images `paths` below `root`, float32 (N, 5, 2), and the number without a face, which
    get the median of the others. An image that can't be read is an InputError."""
    detector = Detector(device=device)
    workers = None if detector.device.type == "cpu" else 0    # starting processes on a GPU takes as long as it saves
    found, _ = find_all(root, paths, detector, "center", workers, max_unreadable=0)
    return median_filled(found).astype(np.float32), int((found["attempt"] == NO_FACE).sum())


def median_filled(found: np.ndarray) -> np.ndarray:
    """Return the points in LANDMARKS (N,), with the median landmarks of all faces where no face was found."""
    points, has_face = found["points"].copy(), found["attempt"] > NO_FACE
    relative = (points[has_face] / found["size"][has_face, None]).astype(np.float32)
    points[~has_face] = np.median(relative, axis=0) * found["size"][~has_face, None]
    return points


def list_parser(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the options of both scripts to a parser, and return it."""
    option = parser.add_argument
    option("--output", type=path, metavar="FILE", help="the list (default: in cache/, where other scripts look for it)")
    option("--select", choices=RULES, default="center", help="which face to keep if several are found")
    option("--workers", type=at_least(0), metavar="N", help="processes (default: one per core, 8 on CUDA, 0 on mps)")
    add_detector_options(parser)
    return parser


def make_list(source: Folder, paths: list[str], name: str, args: argparse.Namespace, rows: Callable, fate: str):
    """Find the landmarks of the photos `paths` of a source, write their list, and print a summary. `name` is the list's
    default name, `rows` makes its rows from what find_all() returns, and `fate` is that of images without a face."""
    if args.device == "auto" and not torch.cuda.is_available():
        args.device = "cpu"    # many processes are faster than MPS
    detector, output = make_detector(args), args.output or default_list(source.root, name)
    if output.is_dir():
        raise InputError(f"--output {output} is a folder; pass the name of the list, such as {output / name}.")
    with locked(output.with_name(f".{output.name}.lock"), f"making {output}", wait=False):
        digest = photos_digest(source)
        # Devices round differently.
        partial = Rows(output, (digest, args.select, detector.min_face_size, ATTEMPTS, detector.device.type), LANDMARKS)
        found, problems = find_all(source.root, paths, detector, args.select, args.workers, partial)
        write_landmarks(output, rows(found, problems), made_from=digest)
        report(paths, found["attempt"], problems, output, fate)
        partial.delete()


def find_all(root, paths: list[str], detector: Detector, select: str, workers: int | None, partial: Rows | None = None,
             max_unreadable: float = MAX_UNREADABLE) -> tuple[np.ndarray, dict[int, str]]:
    """Find the landmarks of N images as search() does; return LANDMARKS (N,), and why each unreadable image is that, of
    which more than the fraction `max_unreadable` are an InputError. `partial` has the results of a run that was killed,
    and gets the others."""
    found, problems = np.zeros(len(paths), LANDMARKS), {}
    found["attempt"] = UNKNOWN
    if partial:
        rows = partial.read()
        found[rows["index"]] = rows
    missing = np.flatnonzero(found["attempt"] == UNKNOWN).tolist()
    done = len(paths) - len(missing)
    if done:
        print(f"continuing: {done:,} of {count_of(len(paths), 'image~')} already done")
    with files.progress_bar(desc="landmarks", total=len(paths), initial=done, unit=" images") as bar:
        for rows, unreadable in search(root, [(i, paths[i]) for i in missing], detector, select, workers):
            problems |= unreadable    # a later run tries them again
            found[rows["index"]] = rows
            if partial:
                partial.append(rows)
            bar.update(len(rows) + len(unreadable))
            if len(problems) > max_unreadable * len(paths):
                raise InputError(f"{len(problems):,} of {count_of(len(paths), 'image~')} in {root} can't be read "
                                 f"({summarize([(paths[i], why) for i, why in problems.items()])}); replace or remove "
                                 "them and run the command again.")
    if (found["attempt"] <= NO_FACE).all():
        raise InputError(f"no face was found in {count_of(len(paths), 'image~')} in {root}; pass photos of faces.")
    return found, problems


def report(paths: list[str], attempts: np.ndarray, problems: dict[int, str], output: Path, fate: str):
    """Print a summary; name the images that needed a retry or failed in NAME.failed.txt beside the list."""
    names = np.array(paths, object)
    kinds = {"found only in a frame or with lower thresholds": names[attempts > 0].tolist(),
             f"no face found, {fate}": names[attempts == NO_FACE].tolist(),
             "unreadable, left out": [f"{paths[i]}: {problem}" for i, problem in sorted(problems.items())]}
    failed = output.with_name(f"{output.stem}.failed.txt")
    failed.unlink(missing_ok=True)
    if any(kinds.values()):
        with atomic_write(failed, "w") as file:
            file.writelines(f"{kind}\t{name}\n" for kind, names in kinds.items() for name in names)
    print(f"{count_of(len(paths), 'image~')}: a face in {(attempts > NO_FACE).sum():,}")
    for kind, names in kinds.items():
        print(f"  {kind}: {len(names):,}" + (f" ({shorten(names)}; all are in {failed})" if names else ""))
    print(f"landmarks: {output}")
