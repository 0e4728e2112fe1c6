"""Decide whether two photos show the same person.

    python tools/compare.py A.jpg B.jpg --model FILE --scores DIR/scores.tsv

The script detects the face in each photo, aligns and embeds both faces, and prints their cosine similarity. The
threshold and its error rates come from an evaluation of the same model: DIR is the folder that
`lfw_eval.py --model FILE --output DIR` wrote. In Python:

    compare(Embedder("checkpoint.pt"), "A.jpg", "B.jpg").similarity
"""
import argparse
import csv
import json
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np

from cosFace.net import NETS
from faces.figures import comparison_picture
from faces.files import InputError, command
from faces.verification.metrics import best_threshold, similarities
from faces.verification.weights import MODEL_HELP, announce
from faces.verification.weights import add_options as add_model_options
from mtcnn.detector import add_options, make_detector
from mtcnn.search import RULES, normalize_rule
from tools.embedder import Embedder, find_faces


class Comparison(NamedTuple):
    """The result of compare().

    similarity: cosine similarity of concatenated original and flipped embeddings, -1 to 1.
    crops: uint8 (2, 112, 96, 3), RGB, the aligned faces.
    face_counts: number of faces detected in each photo, at least 1.
    """
    similarity: float
    crops: np.ndarray
    face_counts: tuple


class Scores(NamedTuple):
    """The scored pairs of an evaluation.

    similarity: float64 (P,), cosine similarity of each pair.
    same: bool (P,), True for a genuine pair.
    model: path of the evaluated model according to results.json; None if unknown.
    """
    similarity: np.ndarray
    same: np.ndarray
    model: str | None

    def error_counts(self, threshold):
        """Return the numbers of accepted impostor pairs, impostor pairs, rejected genuine pairs and genuine pairs."""
        accepted = self.similarity > threshold
        return (int((accepted & ~self.same).sum()), int((~self.same).sum()),
                int((~accepted & self.same).sum()), int(self.same.sum()))


def compare(embedder, a, b):
    """Compare the faces in two photos.

    Args:
        embedder: Embedder with the default `mirror`.
        a, b: photos, see Embedder.

    Returns:
        Comparison.

    Raises:
        InputError: a photo can't be read, no face is detected in it, or an embedding is not finite or is zero.
    """
    # One at a time, so that a photo's face is the same to the last bit whatever it is compared with.
    faces = [find_faces([photo], embedder.detector, embedder.select)[0] for photo in (a, b)]
    for photo, face in zip((a, b), faces):
        if isinstance(face, str):
            name = photo if isinstance(photo, (str, Path)) else "a photo"
            raise InputError(f"can't compare {name}: {face}; pass a photo in which both eyes are visible, or lower "
                             "--min-face-size.")
    crops = np.stack([face.crop for face in faces])
    embeddings = embedder.embed(crops)
    try:
        similarity = similarities(embeddings, np.array([[0, 1]]), np.zeros((1, embeddings.shape[1])))
    except ValueError as error:
        raise InputError(f"the model's embeddings can't be compared: {error}; its training must have failed.") from None
    return Comparison(float(similarity[0, 0]), crops, tuple(face.count for face in faces))


def read_scores(path):
    """Read a scores.tsv that lfw_eval.py wrote, and check the evaluation's settings in results.json beside it.

    Returns:
        Scores.

    Raises:
        InputError: the file can't be read or has a different format, has no genuine or no impostor pairs or a
            similarity that is not finite, or the similarities were computed differently from compare()'s.
    """
    path = Path(path)
    model = _check_settings(path.with_name("results.json"))
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [(row["same"], row["similarity"]) for row in csv.DictReader(file, delimiter="\t")]
        same = np.array([{"0": False, "1": True}[same] for same, _ in rows], bool)
        similarity = np.array([similarity for _, similarity in rows], np.float64)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"can't read {path}: {reason}; run `lfw_eval.py --output DIR`, which writes "
                         "DIR/scores.tsv.") from None
    except (KeyError, TypeError, ValueError, csv.Error):
        raise InputError(f"{path} is not a scores.tsv of lfw_eval.py; pass the DIR/scores.tsv that `lfw_eval.py "
                         "--output DIR` wrote.") from None
    if not np.isfinite(similarity).all() or same.all() or not same.any():
        raise InputError(f"{path} must contain genuine and impostor pairs with finite similarities; write it "
                         "again with `lfw_eval.py --output DIR`.")
    return Scores(similarity, same, model)


def _check_settings(results):
    """Return the model that results.json names, or None; raise InputError if its scores were computed differently."""
    try:
        settings = json.loads(results.read_text(encoding="utf-8"))["settings"]
        different = settings.get("mirror", "concatenate") != "concatenate" or settings.get("subtract_mean", False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # the settings are unknown without a valid results.json
    if different:
        raise InputError(f"{results} says that the scores were computed with another --mirror or with --subtract-mean, "
                         "which makes them unusable here; run lfw_eval.py with the defaults of both.")
    return settings.get("model")


def verdict(similarity, threshold):
    """Return the verdict as text."""
    return "same person" if similarity > threshold else "different people"


def report(args, result, threshold, scores):
    """Return the text to print for a Comparison.

    Args:
        args: the command line's options.
        result: Comparison.
        threshold: float; None if the user gave neither a threshold nor scores.
        scores: Scores, or None.
    """
    lines = [f"{photo}: {count} faces detected; using the one selected by --select {args.select}"
             for photo, count in zip(args.photos, result.face_counts) if count > 1]
    lines.append(f"similarity {result.similarity:.4f}")
    if threshold is None:
        return "\n".join([*lines, "no verdict without a threshold; run lfw_eval.py with this model and --output DIR, "
                                  "then pass --scores DIR/scores.tsv"])
    sign = ">" if result.similarity > threshold else "<="
    lines.append(f"{verdict(result.similarity, threshold)}: {result.similarity:.4f} {sign} threshold {threshold:.4f}")
    if scores is None:
        return "\n".join([*lines, "the error rates at this threshold are unknown; pass --scores to print them"])
    accepted, impostor, rejected, genuine = scores.error_counts(threshold)
    at_least_as_similar = int((scores.similarity[~scores.same] >= result.similarity).sum())
    source = f"{args.scores} ({scores.model})" if scores.model else str(args.scores)
    return "\n".join([*lines, f"expected errors at this threshold, from {source}:",
                      f"  false accept  {accepted / impostor:8.3%}  {accepted:,} of {impostor:,} impostor pairs",
                      f"  false reject  {rejected / genuine:8.3%}  {rejected:,} of {genuine:,} genuine pairs",
                      f"impostor pairs at least as similar as this pair: {at_least_as_similar:,} of {impostor:,}"])


@command
def main(argv=None):
    args = _parser().parse_args(argv)
    scores = read_scores(args.scores) if args.scores else None
    threshold = args.threshold
    if threshold is None and scores is not None:
        threshold = best_threshold(scores.similarity, scores.same)
    if threshold is not None and not -1 <= threshold <= 1:
        raise InputError(f"--threshold {threshold:g} is not a cosine similarity; choose a value from -1 to 1.")
    embedder = Embedder(args.model, args.device, args.select, net=args.net, channels=args.channels,
                        detector=make_detector(args))
    announce(args.model, embedder.loaded)
    result = compare(embedder, *args.photos)
    print(report(args, result, threshold, scores))
    if args.output:
        title = f"similarity {result.similarity:.3f}"
        if threshold is not None:
            title += f", threshold {threshold:.3f}: {verdict(result.similarity, threshold)}"
        comparison_picture(args.output / "comparison.png", result.crops, [p.name for p in args.photos], title)
        print(f"picture: {args.output / 'comparison.png'}")


def _parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, nargs=2, metavar="PHOTO", help="two image files of any size")
    parser.add_argument("--model", type=Path, required=True, metavar="FILE|DIR", help=MODEL_HELP)
    add_model_options(parser, NETS)
    parser.add_argument("--scores", type=Path, metavar="FILE",
                        help="scores.tsv that lfw_eval.py --output wrote for this model; provides the threshold and "
                             "its error rates, which hold for photos like those of the evaluated set and are "
                             "slightly optimistic, because the threshold is chosen on the same scores")
    parser.add_argument("--threshold", type=float, metavar="T",
                        help="accept the pair if its similarity is greater than T, -1 to 1; raise it for fewer false "
                             "accepts (default: the threshold with the highest accuracy on --scores)")
    parser.add_argument("--select", type=normalize_rule, choices=RULES, default="largest",
                        help="which face to use if a photo shows several: the largest, the one nearest the center, or "
                             "the one with the highest score (default: largest)")
    parser.add_argument("--output", type=Path, metavar="DIR",
                        help="folder for comparison.png, which shows both crops side by side")
    add_options(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
