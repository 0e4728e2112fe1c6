"""Decide whether two photos show the same person.

    python tools/compare.py A.jpg B.jpg --model FILE

The script detects the face in each photo, aligns and embeds both faces, and prints their cosine similarity. The
threshold and its error rates come from an evaluation of the same model: --scores DIR names the folder that
`lfw_eval.py --model FILE --output DIR` wrote, or `lfw_eval.py --model FILE --save-threshold` has saved them beside the
model, or the model is a checkpoint of `casia_train.py --lfw DIR`, which stores those of its last evaluation. In Python:

    compare(Embedder("checkpoint.pt"), "A.jpg", "B.jpg").similarity
"""
import csv
import io
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from faces.signals import end_quietly

end_quietly(__name__)    # Ctrl-C during the slow imports below prints no traceback
import numpy as np

from cosFace.net import NETS
from faces.plots import comparison_picture
from faces.files import InputError, check_writable, command, read_bytes, read_json, script_parser
from faces.text import printable
from faces.verification.metrics import similarities
from faces.verification.threshold import choose_threshold, load_threshold
from faces.verification.weights import MODEL_HELP, announce
from faces.verification.weights import add_options as add_model_options
from mtcnn.detector import add_options, make_detector
from tools.embedder import NO_FACE, Embedder, add_select_option, find_faces

MAX_SCORES = 200 * 10**6    # bytes of a scores.tsv: over two million pairs; LFW's 6,000 take half a million bytes
MAX_LINE = 16_384            # characters; two paths and three numbers are shorter


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
    fingerprint: of the evaluated network, see faces.verification.weights.fingerprint(); None if unknown.
    """
    similarity: np.ndarray
    same: np.ndarray
    model: str | None
    fingerprint: str | None


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
            advice = "in which both eyes are visible, or lower --min-face-size" if face == NO_FACE else "that opens"
            raise InputError(f"can't compare {name}: {face}; pass a photo {advice}.")
    crops = np.stack([face.crop for face in faces])
    embeddings = embedder.embed(crops)
    try:
        similarity = similarities(embeddings, np.array([[0, 1]]), np.zeros((1, embeddings.shape[1])))
    except ValueError as error:
        raise InputError(f"the model's embeddings can't be compared: {error}; its training must have failed.") from None
    return Comparison(float(similarity[0, 0]), crops, tuple(face.count for face in faces))


def read_scores(path):
    """Read a scores.tsv that lfw_eval.py wrote, and check the evaluation's settings in results.json beside it.

    Args:
        path: the file, or the folder that holds it.

    Returns:
        Scores.

    Raises:
        InputError: the file can't be read or has a different format, has no genuine or no impostor pairs or a
            similarity that is not finite, or the similarities were computed differently from compare()'s.
    """
    path = Path(path) / "scores.tsv" if Path(path).is_dir() else Path(path)
    model, fingerprint = _check_settings(path.with_name("results.json"))
    try:
        lines = io.TextIOWrapper(io.BytesIO(read_bytes(path, MAX_SCORES)), "utf-8", "surrogateescape", newline="")
        rows = csv.DictReader(iter(partial(lines.readline, MAX_LINE), ""), delimiter="\t", quoting=csv.QUOTE_NONE)
        table = np.fromiter((({"0": False, "1": True}[row["same"]], float(row["similarity"])) for row in rows),
                            [("same", bool), ("similarity", np.float64)])
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"can't read {path}: {reason}; run `lfw_eval.py --output DIR`, which writes "
                         "DIR/scores.tsv.") from None
    except (KeyError, TypeError, ValueError, csv.Error):
        raise InputError(f"{path} is not a scores.tsv of lfw_eval.py; pass the folder that `lfw_eval.py --output DIR` "
                         "wrote.") from None
    same, similarity = table["same"], table["similarity"]
    if not (abs(similarity) < 1.001).all() or same.all() or not same.any():
        raise InputError(f"{path} must contain genuine and impostor pairs with similarities from -1 to 1; write it "
                         "again with `lfw_eval.py --output DIR`.")
    return Scores(similarity, same, model, fingerprint)


def _check_settings(results):
    """Return the model that results.json names, and its fingerprint, or None for what it does not say.

    Raises:
        InputError: the scores were computed differently from compare()'s.
    """
    content = read_json(results, "run `lfw_eval.py --output DIR` again, which writes it")
    if content is None:
        return None, None    # without results.json, the settings are unknown
    try:
        settings = content["settings"]
        different = settings.get("mirror", "concatenate") != "concatenate" or settings.get("subtract_mean", False)
        weights = settings.get("weights") or {}
        model, fingerprint = printable(settings.get("model") or ""), weights.get("fingerprint")
    except (KeyError, TypeError, AttributeError):
        raise InputError(f"{results} is not a results.json of one model; pass the folder of one model that "
                         "`lfw_eval.py --output DIR` wrote.") from None
    if different:
        raise InputError(f"{results} says that the scores were computed with another --mirror or with --subtract-mean, "
                         "which makes them unusable here; run lfw_eval.py with the defaults of both.")
    return model or None, fingerprint


def pick_threshold(args, scores, loaded):
    """Return the threshold to use, and the Threshold that has its error counts; None for what is unknown.

    Args:
        args: the command line's options.
        scores: Scores, or None.
        loaded: dict that describes the model; see faces.verification.weights.load_weights().

    Raises:
        InputError: --threshold is out of range, or the scores or the saved threshold are those of another model.
    """
    if args.threshold is not None and not -1 <= args.threshold <= 1:
        raise InputError(f"--threshold {args.threshold:g} is not a cosine similarity; choose a value from -1 to 1.")
    if scores is not None:
        if scores.fingerprint not in (None, loaded["fingerprint"]):
            raise InputError(f"{args.scores} has the scores of another model ({scores.model}) than {args.model}; run "
                             f"`lfw_eval.py --model {args.model} --output DIR` and pass that DIR.")
        source = f"{args.scores} ({scores.model})" if scores.model else str(args.scores)
        if scores.fingerprint is None:
            source += ", which does not say whether it is of this model"
        errors = choose_threshold(scores.similarity, scores.same, source, args.threshold)
    else:
        errors = load_threshold(args.model, loaded) if args.threshold is None else None
    return errors.value if args.threshold is None and errors else args.threshold, errors


def verdict(similarity, threshold):
    """Return the verdict as text."""
    return "same person" if similarity > threshold else "different people"


def report(args, result, threshold, errors, scores):
    """Return the text to print for a Comparison.

    Args:
        args: the command line's options.
        result: Comparison.
        threshold, errors: see pick_threshold().
        scores: Scores, or None.
    """
    lines = [f"{photo}: {count} faces detected; using the one selected by --select {args.select}"
             for photo, count in zip(args.photos, result.face_counts) if count > 1]
    lines.append(f"similarity {result.similarity:.4f}")
    if threshold is None:
        return "\n".join([*lines, "no verdict without a threshold; run `lfw_eval.py --model "
                                  f"{args.model} --lfw DIR --save-threshold` once, which saves one beside the model"])
    sign = ">" if result.similarity > threshold else "<="
    lines.append(f"{verdict(result.similarity, threshold)}: {result.similarity:.4f} {sign} threshold {threshold:.4f}")
    if errors is None:
        return "\n".join([*lines, "the error rates at this threshold are unknown; pass --scores to print them"])
    lines += [f"expected errors at this threshold, from {errors.source}:",
              f"  false accept  {errors.accepted / errors.impostor:8.3%}  {errors.accepted:,} of {errors.impostor:,} "
              "impostor pairs",
              f"  false reject  {errors.rejected / errors.genuine:8.3%}  {errors.rejected:,} of {errors.genuine:,} "
              "genuine pairs"]
    if scores is not None:
        as_similar = int((scores.similarity[~scores.same] >= result.similarity).sum())
        lines.append(f"impostor pairs at least as similar as this pair: {as_similar:,} of {errors.impostor:,}")
    return "\n".join(lines)


@command
def main(argv=None):
    args = _parser().parse_args(argv)
    if args.output:
        check_writable(args.output)
    scores = read_scores(args.scores) if args.scores else None
    embedder = Embedder(args.model, args.device, args.select, net=args.net, channels=args.channels,
                        detector=make_detector(args))
    announce(args.model, embedder.loaded)
    threshold, errors = pick_threshold(args, scores, embedder.loaded)
    result = compare(embedder, *args.photos)
    print(report(args, result, threshold, errors, scores))
    if args.output:
        title = f"similarity {result.similarity:.3f}"
        if threshold is not None:
            title += f", threshold {threshold:.3f}: {verdict(result.similarity, threshold)}"
        comparison_picture(args.output / "comparison.png", result.crops, [p.name for p in args.photos], title)
        print(f"picture: {args.output / 'comparison.png'}")


def _parser():
    parser = script_parser(__doc__)
    parser.add_argument("photos", type=Path, nargs=2, metavar="PHOTO", help="two image files of any size")
    parser.add_argument("--model", type=Path, required=True, metavar="FILE|DIR", help=MODEL_HELP)
    add_model_options(parser, NETS)
    parser.add_argument("--scores", type=Path, metavar="DIR|FILE",
                        help="folder that lfw_eval.py --output wrote for this model, or its scores.tsv; provides the "
                             "threshold and its error rates, which hold for photos like those of the evaluated set "
                             "and are slightly optimistic, because the threshold is chosen on the same scores "
                             "(default: the threshold that lfw_eval.py --save-threshold saved beside the model, or "
                             "else the one that casia_train.py --lfw stored in the checkpoint)")
    parser.add_argument("--threshold", type=float, metavar="T",
                        help="accept the pair if its similarity is greater than T, -1 to 1; raise it for fewer false "
                             "accepts (default: the threshold with the highest accuracy in the evaluation)")
    add_select_option(parser)
    parser.add_argument("--output", type=Path, metavar="DIR",
                        help="folder for comparison.png, which shows both crops side by side")
    add_options(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
