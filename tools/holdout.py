"""Hold out some people of a training set: write a training list without them, and a verification set of their pairs.

    python tools/holdout.py --casia DIR --output holdout
    python cosFace/casia_train.py --casia DIR --landmarks holdout/train.txt --lfw holdout/heldout.bin

Use the pairs, not LFW, to choose options such as the learning rate. In the end, train once more on all people.

The pairs form ten folds with different people in each, and half of them are genuine. People take turns in contributing
genuine pairs, so that a few people with many photos do not dominate. heldout.bin has the format of InsightFace's
lfw.bin. If the faces of the set are already aligned, pass train.txt as --list instead.
"""
import itertools
import pickle
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cv2
import numpy as np

from faces.data.cache import build
from faces.data.casia import list_casia
from faces.data.recordio import Records
from faces.files import CACHE, InputError, at_least, atomic_write, command, count_of, locked, path, script_parser
from faces.landmarks import write_landmarks
from faces.verification.binset import MAX_IMAGES
from faces.verification.pairs import FOLDS

MAX_OF_PERSON, MAX_OF_FOLD = 50, 2000    # photos that pairs are drawn from, so that all pairs can be listed


def draw_pairs(labels: np.ndarray, rows: np.ndarray, people: np.ndarray, count: int, rng: np.random.Generator) -> tuple:
    """Draw the pairs of a fold of `people` from the usable images `rows`, int (K,): int (count, 2) rows, and bool
    (count,), whether a pair is genuine."""
    photos = [rng.permutation(rows[labels[rows] == person])[:MAX_OF_PERSON] for person in people]
    genuine = [rng.permutation(list(itertools.combinations(own, 2))) for own in photos]
    genuine = [pair for turn in itertools.zip_longest(*genuine) for pair in turn if pair is not None]    # take turns
    some = rng.permutation(np.concatenate(photos))[:MAX_OF_FOLD]
    left, right = np.triu_indices(len(some), 1)
    impostor = np.flatnonzero(labels[some[left]] != labels[some[right]])
    half = count // 2
    if min(len(genuine), len(impostor)) < half:
        raise InputError(f"a fold of {len(people)} people has {len(genuine):,} genuine and {len(impostor):,} impostor "
                         f"pairs, fewer than {half:,}; lower --pairs, or raise --people.")
    impostor = rng.choice(impostor, half, replace=False)
    impostor = np.stack((some[left[impostor]], some[right[impostor]]), 1)
    return np.concatenate((genuine[:half], impostor)), np.arange(count) < half


@command
def main(argv=None):
    args = _parse(argv)
    with locked(args.output / ".lock", f"writing into {args.output}", wait=False):
        hold_out(args)


def hold_out(args):
    """Choose people and pairs, write both files, and print what is in them."""
    pairs_file, list_file = args.output / "heldout.bin", args.output / "train.txt"
    if list_file.exists():    # models may have been trained on it
        raise InputError(f"{list_file} already exists; choose another --output, or delete it.")
    listing = list_casia(args.casia, args.landmarks, args.list)
    if isinstance(listing.source, Records):
        raise InputError(f"no people of {args.casia} can be held out, because a RecordIO set takes no list; extract "
                         "its images into person folders first.")
    images, failed, _ = build(listing, args.cache)
    rows = np.setdiff1d(np.arange(len(listing.paths)), [row for row, _ in failed])
    everyone, counts = np.unique(listing.labels[rows], return_counts=True)
    candidates = everyone[counts > 1]
    if args.people > min(len(candidates), len(everyone) - 2):
        raise InputError(f"--people {args.people} is too many; {len(candidates):,} of {len(everyone):,} people have "
                         "two images or more, and at least two people must be left to train on.")
    rng = np.random.default_rng(args.seed)
    people = rng.choice(candidates, args.people, replace=False)
    folds = [draw_pairs(listing.labels, rows, some, args.pairs // FOLDS, rng) for some in np.array_split(people, FOLDS)]
    pairs, same = map(np.concatenate, zip(*folds))
    train = rows[~np.isin(listing.labels[rows], people)]
    encoded = {row: cv2.imencode(".png", images[row][..., ::-1])[1].tobytes() for row in np.unique(pairs)}
    with atomic_write(pairs_file) as file:    # an image of several pairs is one object, which is written once
        pickle.dump(([encoded[row] for row in pairs.ravel()], same.tolist()), file, protocol=4)
    labels = np.unique(listing.labels[train], return_inverse=True)[1]    # from 0
    points = np.empty((len(train), 0)) if listing.points is None else listing.points[train]    # none, or five each
    write_landmarks(list_file, zip([listing.paths[row] for row in train], labels, points))
    print(f"{pairs_file}: {len(pairs):,} pairs of {len(people):,} people",
          f"{list_file}: {count_of(len(train), 'image~')} of the other {len(np.unique(listing.labels[train])):,}",
          *listing.notes, sep="\n")
    if failed:
        print(f"left out: {count_of(len(failed), 'unusable image~')}, see failed.txt in the cache")


def _parse(argv):
    parser = script_parser(__doc__)
    option = parser.add_argument
    option("--casia", type=path, required=True, metavar="DIR", help="training set, as for casia_train.py")
    option("--landmarks", type=path, metavar="FILE", help="landmark list (default: as for casia_train.py)")
    option("--list", type=path, metavar="FILE", help="list of aligned faces, `path label`")
    option("--cache", type=path, default=CACHE, metavar="DIR", help="folder for aligned faces")
    option("--people", type=at_least(2 * FOLDS), default=300, metavar="N", help="people to hold out")
    option("--pairs", type=at_least(2 * FOLDS, int, MAX_IMAGES // 2), default=6000, metavar="N",
           help=f"number of pairs, a multiple of {2 * FOLDS}")
    option("--seed", type=at_least(0), default=0, help="random seed for people and pairs")
    option("--output", type=path, required=True, metavar="DIR", help="folder of train.txt and heldout.bin")
    args = parser.parse_args(argv)
    if args.pairs % (2 * FOLDS):
        parser.error(f"--pairs must be a multiple of {2 * FOLDS}")
    return args


if __name__ == "__main__":
    sys.exit(main())
