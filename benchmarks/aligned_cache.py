"""Measure the speed of building the aligned-face cache, compared with bare OpenCV.

    python benchmarks/aligned_cache.py --casia DIR              the first 18,000 images of a set
    python benchmarks/aligned_cache.py --casia DIR --side 250   the same, enlarged to the size of CASIA-WebFace

The reference does only what can't be left out: cv2.imread, and cv2.warpAffine with precomputed matrices, on the same
number of threads; its faces stay in memory. Ours reads, checks, decodes, aligns and stores the faces. Both run in turn
on files that have been read once before, so neither waits for the disk, and it is an error if their faces differ.
"""
import contextlib
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from faces.signals import end_quietly

end_quietly(__name__)    # Ctrl-C during the slow imports below prints no traceback
import cv2
import numpy as np

from faces.align import HEIGHT, WIDTH, similarity_transform
from faces.data.cache import build
from faces.data.casia import Folder, TrainingList, list_casia
from faces.device import count_cpus
from faces.files import InputError, check_writable, command, script_parser


def parse_args(argv=None):
    parser = script_parser(__doc__)
    parser.add_argument("--casia", type=Path, required=True, metavar="DIR", help="folder of person folders")
    parser.add_argument("--landmarks", type=Path, metavar="FILE",
                        help="landmark list, `path label x1 y1 ... x5 y5` (default: as for casia_train.py)")
    parser.add_argument("--images", type=int, default=18_000, metavar="N",
                        help="number of images, from the start of the list (default: 18,000)")
    parser.add_argument("--side", type=int, metavar="PIXELS",
                        help="first resize the images to this height and save them as JPEG; CASIA-WebFace has 250; the "
                             "larger the images, the smaller the relative cost of the checks (default: as they are)")
    parser.add_argument("--repeats", type=int, default=5,
                        help="builds of each kind; the median is printed (default: 5)")
    parser.add_argument("--cache", type=Path, metavar="DIR",
                        help="where to build; choose a folder on the disk that would hold the cache (default: the "
                             "system's temporary folder)")
    args = parser.parse_args(argv)
    if min(args.images, args.repeats) < 1:
        parser.error("--images and --repeats must be at least 1")
    return args


def resized(listing, side, folder):
    """Save the images of a list in `folder`, resized to a height of `side` pixels; return the list of these."""
    points = []
    for path, landmarks in zip(listing.paths, listing.points):
        image = cv2.imread(listing.source.open(path))
        scale = side / len(image)
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / path), cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC))
        points.append(scale * landmarks)
    return TrainingList(Folder(folder), listing.paths, listing.labels, np.stack(points))


def align_with_opencv(files, matrices):
    """Return the aligned faces as a list of uint8 (112, 96, 3), BGR, made with the least possible work."""
    def align_block(start):
        return [cv2.warpAffine(cv2.imread(file), matrix, (WIDTH, HEIGHT), flags=cv2.INTER_LINEAR)
                for file, matrix in zip(files[start:start + 32], matrices[start:start + 32])]
    with ThreadPoolExecutor(count_cpus()) as pool:
        return sum(pool.map(align_block, range(0, len(files), 32)), [])


def build_quietly(listing, folder):
    """Build the cache without printing anything."""
    with open(os.devnull, "w") as devnull, contextlib.redirect_stdout(devnull), contextlib.redirect_stderr(devnull):
        return build(listing, folder)


def timed(function, *args):
    """Return the seconds that a call takes, and its result."""
    start = time.perf_counter()
    result = function(*args)
    return time.perf_counter() - start, result


def compare_builds(listing, folder, repeats):
    """Build the cache and align with OpenCV alone, in turn, and check that both give the same faces.

    Returns:
        (median images/s of building the cache, median images/s of OpenCV alone).

    Raises:
        InputError: the faces differ, or the cache left some out.
    """
    _, failed = build_quietly(listing, folder / "check")    # brings every file into the system's page cache, too
    if failed:
        raise InputError(f"{len(failed)} images of {listing.source} can't be used, such as "
                         f"{listing.paths[failed[0][0]]}; choose a set without such images.")
    files = [str(listing.source.open(path)) for path in listing.paths]
    matrices = [similarity_transform(points) for points in listing.points]
    ours, reference = [], []
    for repeat in range(repeats):
        seconds, faces = timed(align_with_opencv, files, matrices)
        reference.append(len(files) / seconds)
        seconds, (images, _) = timed(build_quietly, listing, folder / str(repeat))
        ours.append(len(files) / seconds)
        if not all(np.array_equal(image, face[..., ::-1]) for image, face in zip(images, faces)):
            raise InputError(f"{listing.source}: the faces of the cache and of OpenCV differ; choose a set "
                             "without EXIF rotation.")
    return statistics.median(ours), statistics.median(reference)


@command
def main(argv=None):
    args = parse_args(argv)
    listing = list_casia(args.casia, args.landmarks)
    if not isinstance(listing.source, Folder) or listing.points is None:
        raise InputError(f"{args.casia} is not a folder with a landmark list; run mtcnn/casia_landmark.py first, or "
                         "pass --landmarks.")
    if args.cache:
        check_writable(args.cache)
    listing = TrainingList(listing.source, listing.paths[:args.images], listing.labels[:args.images],
                           listing.points[:args.images])
    with tempfile.TemporaryDirectory(dir=args.cache) as folder:
        if args.side:
            listing = resized(listing, args.side, Path(folder) / "images")
        ours, reference = compare_builds(listing, Path(folder), args.repeats)
    print(f"{len(listing.paths):,} images, {count_cpus()} thread(s), OpenCV {cv2.__version__}, median of "
          f"{args.repeats}")
    print(f"imread and warpAffine alone   {reference:8,.0f} images/s")
    print(f"building the cache            {ours:8,.0f} images/s, {ours / reference:.0%} of that; the same faces")


if __name__ == "__main__":
    sys.exit(main())
