"""Build the aligned-face cache and read it back at random, beside bare OpenCV on the same threads.

    python aligned_cache.py --casia DIR                    the first 18,000 images of a set with casia_landmark.txt
    python aligned_cache.py --casia DIR --side 250         the same, enlarged to CASIA-WebFace's size

The peer is what can't be left out: cv2.imread and cv2.warpAffine by matrices computed beforehand, in as many threads,
its faces left in memory. Ours reads, checks, decodes, aligns and stores. Both run in turn on files that have been read
once before, so that neither waits for the disk, and their faces are compared. Random reads are what training asks of
the cache: batches of positions in no order.
"""
import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from faces.align import HEIGHT, WIDTH, similarity_transform
from faces.data.cache import AlignedFaces, build
from faces.data.casia import Folder, TrainingList, read_casia
from faces.device import count_cpus
from faces.files import InputError, command

BATCH = 256


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Speed of the aligned-face cache.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--casia", type=Path, required=True, metavar="DIR", help="folder of person folders")
    parser.add_argument("--landmarks", type=Path, metavar="FILE", help="(default: casia_landmark.txt in --casia)")
    parser.add_argument("--images", type=int, default=18_000, metavar="N", help="of the list, from its start")
    parser.add_argument("--side", type=int, metavar="PIXELS", help="first write the images anew with this height, as "
                        "JPEG; CASIA-WebFace's have 250, and checks cost the less the larger an image is")
    parser.add_argument("--reads", type=int, default=50_000, metavar="N", help="faces read at random")
    parser.add_argument("--repeats", type=int, default=5, help="builds of each kind; the median is printed")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="where to build (default: the system's temporary "
                        "folder); a folder on the disk that the cache would lie on")
    return parser.parse_args(argv)


def resized(listing, side, folder):
    """The same list over images of another height."""
    points = []
    for path, landmarks in zip(listing.paths, listing.points):
        image = cv2.imread(listing.source.open(path))
        scale = side / len(image)
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / path), cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC))
        points.append(scale * landmarks)
    return TrainingList(Folder(folder), listing.paths, listing.labels, np.stack(points))


def bare(files, matrices):
    """Aligned faces (N, 112, 96, 3), BGR, the shortest way."""
    def block(start):
        return [cv2.warpAffine(cv2.imread(file), matrix, (WIDTH, HEIGHT), flags=cv2.INTER_LINEAR)
                for file, matrix in zip(files[start:start + 32], matrices[start:start + 32])]
    with ThreadPoolExecutor(count_cpus()) as pool:
        return sum(pool.map(block, range(0, len(files), 32)), [])


def quietly_build(listing, folder):
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        return build(listing, folder)


def timed(function, *args):
    start = time.perf_counter()
    result = function(*args)
    return time.perf_counter() - start, result


def compare_builds(listing, folder, repeats):
    """Median images per second of ours and of the bare way, which must give the same faces."""
    files = [str(listing.source.open(path)) for path in listing.paths]
    matrices = [similarity_transform(points) for points in listing.points]
    bare(files, matrices)  # so that every file is in memory
    ours, theirs = [], []
    for repeat in range(repeats):
        seconds, faces = timed(bare, files, matrices)
        theirs.append(len(files) / seconds)
        seconds, (images, failed) = timed(quietly_build, listing, folder / str(repeat))
        ours.append(len(files) / seconds)
        if failed or not all(np.array_equal(image, face[..., ::-1]) for image, face in zip(images, faces)):
            raise InputError(f"{listing.source}: OpenCV alone gives other faces, or none for {len(failed)} images; "
                             "take a set without unusable or EXIF-turned images.")
    return statistics.median(ours), statistics.median(theirs), images


def random_reads(faces, count):
    """Images per second in batches of positions drawn at random."""
    random = np.random.default_rng(0)
    batches = [random.integers(len(faces), size=BATCH) for _ in range(max(1, count // BATCH))]
    faces.batch(np.arange(len(faces)))
    seconds, _ = timed(lambda: [faces.batch(index)[0].shape for index in batches])
    return len(batches) * BATCH / seconds


@command
def main(argv=None):
    args = parse_args(argv)
    listing = read_casia(args.casia, args.landmarks or args.casia / "casia_landmark.txt")
    listing = TrainingList(listing.source, listing.paths[:args.images], listing.labels[:args.images],
                           listing.points[:args.images])
    with tempfile.TemporaryDirectory(dir=args.cache) as folder:
        if args.side:
            listing = resized(listing, args.side, Path(folder) / "images")
        ours, theirs, images = compare_builds(listing, Path(folder), args.repeats)
        faces = AlignedFaces(images, listing, np.arange(len(listing.paths)))
        rate = random_reads(faces, args.reads)
    print(f"{len(listing.paths):,} images, {count_cpus()} thread(s), OpenCV {cv2.__version__}, median of "
          f"{args.repeats}")
    print(f"imread and warpAffine alone   {theirs:8,.0f} images/s")
    print(f"building the cache            {ours:8,.0f} images/s, {ours / theirs:.0%} of that; the same faces")
    print(f"random reads, one process     {rate:8,.0f} images/s, {rate * HEIGHT * WIDTH * 3 / 1e6:,.0f} MB/s")


if __name__ == "__main__":
    sys.exit(main())
