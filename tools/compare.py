"""Are these two photos the same person?

    python compare.py A.jpg B.jpg --model FILE --scores DIR/scores.tsv

finds the face on each photo, aligns and embeds both, and says how similar they are. The threshold, and how often it
errs, come from the model's own evaluation: DIR is what `lfw_eval.py --model FILE --output DIR` left. In Python:

    compare(net, Detector(), "A.jpg", "B.jpg").similarity
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
from faces.align import align
from faces.device import pick_device
from faces.figures import comparison_picture
from faces.files import InputError, command
from faces.images import UnreadableImage, read_image
from faces.verification.embed import embed
from faces.verification.metrics import best_threshold, similarities
from faces.verification.weights import add_options as add_model_options
from faces.verification.weights import load_weights
from mtcnn.detector import add_options, make_detector
from mtcnn.search import ATTEMPTS, RULES, choose, frame, rule


class Comparison(NamedTuple):
    """Two photos' faces and how alike they are.

    similarity: cosine of the embeddings, each with that of the mirrored face concatenated, -1 to 1.
    crops: uint8 (2, 112, 96, 3), RGB, the aligned faces.
    found: how many faces are on each photo, two numbers of at least 1.
    """
    similarity: float
    crops: np.ndarray
    found: tuple


class Scores(NamedTuple):
    """An evaluation's pairs.

    similarity: float64 (P,).
    same: bool (P,), true for a genuine pair.
    model: the model's file as results.json has it; None where it is not known.
    """
    similarity: np.ndarray
    same: np.ndarray
    model: str | None

    def error_rates(self, threshold):
        """Return (accepted impostor pairs, impostor pairs, rejected genuine pairs, genuine pairs), exact counts."""
        accepted = self.similarity > threshold
        return (int((accepted & ~self.same).sum()), int((~self.same).sum()),
                int((~accepted & self.same).sum()), int(self.same.sum()))


def compare(net, detector, a, b, select="largest"):
    """Compare the faces on two photos.

    Args:
        net: module, float (N, 3, 112, 96) to (N, D), on any device.
        detector: mtcnn.detector.Detector.
        a, b: paths of photos.
        select: which face of several, "largest", "center" or "score".

    Returns:
        Comparison.

    Raises:
        InputError: a photo can't be read or has no face, or the embeddings can't be compared.
    """
    (first, found_a), (second, found_b) = (find_face(detector, photo, select) for photo in (a, b))
    crops = np.stack((first, second))
    embeddings = embed(net, crops, next(net.parameters()).device, mirror="concatenate", progress=False)
    try:
        similarity = similarities(embeddings, np.array([[0, 1]]), np.zeros((1, embeddings.shape[1])))
    except ValueError as error:
        raise InputError(f"the model's embeddings can't be compared: {error}; the training must have failed.") from None
    return Comparison(float(similarity[0, 0]), crops, (found_a, found_b))


def find_face(detector, photo, select="largest"):
    """Return the aligned face of a photo, uint8 (112, 96, 3), and how many faces are on it.

    Raises:
        InputError: the photo can't be read, or has no face.
    """
    try:
        image = read_image(photo)
    except UnreadableImage as error:
        raise InputError(f"can't read {photo}: {error}; give a photo.") from None
    for thresholds, part in ATTEMPTS[:2]:  # as it is, then in a frame; lower thresholds would see faces in anything
        framed, corner = frame(image, part)
        faces = detector.detect(framed, thresholds)
        row = choose(faces, framed.shape[:2], select)
        if row is not None:
            return align(image, faces.landmarks[row] - corner), len(faces.boxes)
    raise InputError(f"no face was found in {photo}; give a photo on which both eyes are seen, or try a smaller "
                     "--min-face-size.")


def read_scores(path):
    """Read the scores.tsv of lfw_eval.py, its columns `same` and `similarity`, and what results.json beside it tells.

    Raises:
        InputError: no such file, another format, no genuine or no impostor pair, or similarities that were not
            computed as compare() does.
    """
    path = Path(path)
    model = _check_protocol(path.with_name("results.json"))
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [(row["same"], row["similarity"]) for row in csv.DictReader(file, delimiter="\t")]
        same = np.array([{"0": False, "1": True}[same] for same, _ in rows], bool)
        similarity = np.array([similarity for _, similarity in rows], np.float64)
    except OSError as error:
        why = error.strerror or error
        raise InputError(f"can't read {path}: {why}; lfw_eval.py --output DIR writes DIR/scores.tsv.") from None
    except (KeyError, TypeError, ValueError, csv.Error):
        raise InputError(f"{path} is not the scores.tsv that lfw_eval.py --output DIR writes; give that one.") from None
    if not np.isfinite(similarity).all() or same.all() or not same.any():
        raise InputError(f"{path} needs genuine and impostor pairs, all with a finite similarity; "
                         "make it anew with lfw_eval.py --output DIR.")
    return Scores(similarity, same, model)


def _check_protocol(results):
    """Refuse an evaluation whose similarities mean something else than compare()'s; return its model, if known."""
    try:
        settings = json.loads(results.read_text(encoding="utf-8"))["settings"]
        other = settings.get("mirror", "concatenate") != "concatenate" or settings.get("subtract_mean", False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # scores without their results.json, or of another origin: nothing says that they don't fit
    if other:
        raise InputError(f"{results} says that its scores come with another --mirror or with --subtract-mean, so that "
                         "they are no measure here; run lfw_eval.py with its defaults.")
    return settings.get("model")


def verdict(similarity, threshold):
    """Return the answer in words."""
    return "the same person" if similarity > threshold else "two people"


def report(args, result, threshold, scores):
    """Return what the command prints."""
    lines = [f"{photo}: {count} faces, and the one compared is by --select {args.select}"
             for photo, count in zip(args.photos, result.found) if count > 1]
    lines.append(f"similarity {result.similarity:.4f}")
    if threshold is None:
        return "\n".join([*lines, "no verdict without a threshold: run lfw_eval.py with this model and --output DIR, "
                                  "then give --scores DIR/scores.tsv here"])
    sign = ">" if result.similarity > threshold else "<="
    lines.append(f"{verdict(result.similarity, threshold)}: {result.similarity:.4f} {sign} threshold {threshold:.4f}")
    if scores is None:
        return "\n".join([*lines, "how often that threshold errs is unknown without --scores"])
    accepted, impostor, rejected, genuine = scores.error_rates(threshold)
    alike = int((scores.similarity[~scores.same] >= result.similarity).sum())
    source = f"{args.scores}, of {scores.model}" if scores.model else str(args.scores)
    return "\n".join([*lines, f"expected errors at this threshold, by {source}:",
                      f"  false accept  {accepted / impostor:8.3%}  {accepted:,} of {impostor:,} impostor pairs",
                      f"  false reject  {rejected / genuine:8.3%}  {rejected:,} of {genuine:,} genuine pairs",
                      f"as alike as these two or more: {alike:,} of {impostor:,} impostor pairs"])


@command
def main(argv=None):
    args = _parser().parse_args(argv)
    scores = read_scores(args.scores) if args.scores else None
    threshold = args.threshold
    if threshold is None and scores is not None:
        threshold = best_threshold(scores.similarity, scores.same)
    if threshold is not None and not -1 <= threshold <= 1:
        raise InputError(f"--threshold {threshold:g} is no cosine; give -1 to 1.")
    net = NETS[args.net]()
    load_weights(net, args.model, args.channels)
    result = compare(net.to(pick_device(args.device)), make_detector(args), *args.photos, args.select)
    print(report(args, result, threshold, scores))
    if args.output:
        words = f"similarity {result.similarity:.3f}"
        if threshold is not None:
            words += f", threshold {threshold:.3f}: {verdict(result.similarity, threshold)}"
        comparison_picture(args.output / "comparison.png", result.crops, [p.name for p in args.photos], words)
        print(f"picture: {args.output / 'comparison.png'}")


def _parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, nargs=2, metavar="PHOTO", help="two image files, of any size")
    parser.add_argument("--model", type=Path, required=True, metavar="FILE",
                        help="checkpoint.pt of casia_train.py, or a public checkpoint of the same network")
    add_model_options(parser, NETS)
    parser.add_argument("--scores", type=Path, metavar="FILE",
                        help="scores.tsv that lfw_eval.py --output left for this model; gives the threshold and its "
                             "error rates, which hold for photos like those of that set, and slightly flatter a "
                             "threshold that is chosen by them")
    parser.add_argument("--threshold", type=float, metavar="T",
                        help="accept when the similarity is greater, -1 to 1; raise it for fewer false accepts "
                             "(default: the most accurate one in --scores)")
    parser.add_argument("--select", type=rule, choices=RULES, default="largest",
                        help="which face of several: the largest (default), nearest the image's center, or the surest")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for comparison.png, both crops side by side")
    add_options(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
