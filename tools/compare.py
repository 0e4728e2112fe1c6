"""Decide whether two photos show the same person.

    python tools/compare.py A.jpg B.jpg --model FILE

prints the cosine similarity of the faces in both photos. The threshold and its error rates come from an evaluation of
the same model: from the folder that `lfw_eval.py --output DIR` wrote (--scores DIR), or else from what
`lfw_eval.py --save-threshold` saved beside the model, or else from the last evaluation of `casia_train.py --lfw DIR`.
In Python:

    compare(Embedder("checkpoint.pt"), "A.jpg", "B.jpg").similarity
"""
import csv
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np

from faces.files import InputError, at_least, check_writable, command, path, read_json, reading, script_parser
from faces.plots import comparison_picture
from faces.verification.threshold import Threshold, choose_threshold, load_threshold
from tools.embedder import Embedder, add_photo_options, make_embedder


class Comparison(NamedTuple):
    """What compare() finds."""
    similarity: float     # cosine, -1 to 1
    crops: np.ndarray     # the aligned faces, uint8 RGB (2, 112, 96, 3)
    face_counts: tuple    # number of faces in each photo


def compare(embedder: Embedder, a, b) -> Comparison:
    """Compare the faces in two photos; for these, and for errors, see Embedder, whose `flip` must be "concatenate"."""
    # One at a time, so that a face is the same to the last bit whatever it is compared with.
    faces = [face for photo in (a, b) for face in embedder.find([photo])[0]]
    crops = np.stack([face.crop for face in faces])
    one, two = embedder.embed(crops).astype(np.float64)
    similarity = np.clip(one @ two / (np.linalg.norm(one) * np.linalg.norm(two)), -1, 1)    # despite rounding
    return Comparison(float(similarity), crops, tuple(face.count for face in faces))


def read_scores(file) -> tuple[np.ndarray, np.ndarray, dict]:
    """Read a scores.tsv that lfw_eval.py wrote, or the one in a folder: the cosines of pairs, float (P,); whether they
    are genuine, bool (P,); and the settings in results.json beside the file. Raises InputError if the cosines are of
    other embeddings than compare()'s."""
    file = path(file) / "scores.tsv" if path(file).is_dir() else path(file)
    settings = read_json(file.with_name("results.json")).get("settings", {})
    if settings.get("flip", "concatenate") != "concatenate" or settings.get("subtract_mean"):
        raise InputError(f"the scores in {file} were computed with another --flip or with --subtract-mean; run "
                         "lfw_eval.py with the defaults of both.")
    with reading(file, "scores.tsv of lfw_eval.py", "pass the folder that `lfw_eval.py --output DIR` wrote"):
        with open(file, encoding="utf-8", errors="surrogateescape", newline="") as lines:
            rows = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
            same, similarity = np.array([(int(row["same"]), float(row["similarity"])) for row in rows]).T
        if set(same) != {0, 1} or not (abs(similarity) < 1.001).all():
            raise ValueError("it must hold genuine and impostor pairs, with similarities from -1 to 1")
    return similarity, same == 1, settings


def pick_threshold(args, scores: tuple | None, loaded: dict) -> Threshold | None:
    """Return the threshold of the command line, the scores, or else the model; its counts are None if unknown."""
    if scores is None:
        given = Threshold(args.threshold, None, None, None, None, "")
        return load_threshold(args.model, loaded) if args.threshold is None else given
    similarity, same, settings = scores
    fingerprint = settings.get("weights", {}).get("fingerprint")
    if fingerprint not in (None, loaded["fingerprint"]):
        raise InputError(f"{args.scores} has the scores of another model ({settings.get('model')}) than {args.model}; "
                         f"run `lfw_eval.py --model {args.model} --output DIR` and pass that DIR.")
    unknown = "" if fingerprint else ", which does not say whether it is of this model"
    return choose_threshold(similarity, same, f"{args.scores}{unknown}", args.threshold)


def report(args, result: Comparison, threshold: Threshold | None, scores: tuple | None):
    """Print the similarity, the verdict, and the error rates to expect."""
    for photo, count in zip(args.photos, result.face_counts):
        if count > 1:
            print(f"{photo}: {count} faces detected; using the one selected by --select {args.select}")
    print(f"similarity {result.similarity:.4f}")
    if threshold is None:
        print(f"no threshold, so no verdict; run `lfw_eval.py --model {args.model} --lfw DIR --save-threshold` once, "
              "which saves one beside the model")
        return
    verdict, sign = ("same person", ">") if result.similarity > threshold.value else ("different people", "<=")
    print(f"{verdict}: {result.similarity:.4f} {sign} threshold {threshold.value:.4f}")
    if threshold.genuine is None:
        print("the error rates at this threshold are unknown; pass --scores to print them")
        return
    print(f"expected errors at this threshold, from {threshold.source}:")
    for name, wrong, count, kind in (("accept", threshold.accepted, threshold.impostor, "impostor"),
                                     ("reject", threshold.rejected, threshold.genuine, "genuine")):
        print(f"  false {name}  {wrong / count:8.3%}  {wrong:,} of {count:,} {kind} pairs")
    if scores is not None:
        as_similar = int((scores[0][~scores[1]] >= result.similarity).sum())
        print(f"impostor pairs at least as similar as this pair: {as_similar:,} of {threshold.impostor:,}")


@command
def main(argv=None):
    parser = script_parser(__doc__)
    option = parser.add_argument
    option("photos", type=path, nargs=2, metavar="PHOTO", help="two image files of any size")
    option("--scores", type=path, metavar="DIR|FILE", help="folder of the model's scores.tsv, by lfw_eval.py --output")
    option("--threshold", type=at_least(-1, float, 1), metavar="T", help="-1 to 1 (default: the most accurate one)")
    option("--output", type=path, metavar="DIR", help="folder for comparison.png, a picture of both faces")
    add_photo_options(parser)
    args = parser.parse_args(argv)
    if args.output:
        check_writable(args.output)
    scores = read_scores(args.scores) if args.scores else None
    embedder = make_embedder(args)
    threshold = pick_threshold(args, scores, embedder.loaded)
    result = compare(embedder, *args.photos)
    report(args, result, threshold, scores)
    if args.output:
        title = f"similarity {result.similarity:.3f}" + (f", threshold {threshold.value:.3f}" if threshold else "")
        comparison_picture(args.output / "comparison.png", result.crops, [p.name for p in args.photos], title)
        print(f"picture: {args.output / 'comparison.png'}")


if __name__ == "__main__":
    sys.exit(main())
