"""Draw a t-SNE plot of the embeddings of a few identities, and measure how well the identities separate.

    python tools/tsne.py --model FILE --faces DIR                   # CASIA-WebFace, or faces that are already aligned
    python tools/tsne.py --model FILE --lfw DIR
    python tools/tsne.py --model A --model B --title softmax --title CosFace --faces DIR

The seed determines the identities and images, so all models embed the same ones. The silhouette score is computed with
cosine distance on the embeddings, not on the 2-D layout; 1 means well separated, 0 means overlapping. --points FILE
saves the points of the plot.
"""
import csv
import io
import sys
from pathlib import Path, PurePosixPath

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from faces.signals import end_quietly

end_quietly(__name__)    # Ctrl-C during the slow imports below prints no traceback
import numpy as np

from cosFace.net import NETS
from faces.align import load_face
from faces.data.casia import Folder, TrainingList, list_casia
from faces.device import pick_device
from faces.plots import tsne_panels
from faces.files import RUNS, InputError, atomic_write, check_writable, command, folder, read_bytes, script_parser
from faces.images import UnreadableImage
from faces.landmarks import default_list, read_landmarks
from faces.text import count_of, people_count
from faces.verification.embed import embed
from faces.verification.weights import MODEL_HELP, announce, load_net
from faces.verification.weights import add_options as add_model_options

PICTURES = (".png", ".svg", ".pdf")
COLUMNS = ("panel", "identity", "x", "y")
MAX_POINTS = 20 * 10**6    # bytes of a table of points, which can take 20 times that in memory


def list_lfw(root, landmarks=None):
    """List LFW as a faces.data.casia.TrainingList whose labels come from the person folders.

    Args:
        root: folder of Name/Name_0001.jpg.
        landmarks: landmark list; None uses the list that mtcnn/lfw_landmark.py wrote for this folder.
    """
    root = folder(root, "LFW images as Name/Name_0001.jpg")
    listed = read_landmarks(landmarks or default_list(root, "lfw_landmark.txt"), labeled=False)
    labels = np.unique([_person(path) for path in listed.paths], return_inverse=True)[1]
    return TrainingList(Folder(root), listed.paths, labels, listed.points)


def choose_images(labels, identities, per_identity, seed):
    """Choose identities at random, and images of each.

    Args:
        labels: int (N,), one per image.
        identities: number of identities to choose.
        per_identity: number of images of each; identities with fewer are not chosen.
        seed: seed of both choices.

    Returns:
        int (identities, per_identity), indices into `labels`; each row is sorted and belongs to one identity.

    Raises:
        InputError: too few identities have enough images.
    """
    random = np.random.default_rng(seed)
    people, counts = np.unique(labels, return_counts=True)
    candidates = people[counts >= per_identity]
    if len(candidates) < identities:
        possible = np.sort(counts)[-identities] if len(people) >= identities else 0
        advice = f"pass --per-identity {possible} or less, or fewer --identities" if possible > 1 else \
            "lower --identities, and --per-identity too"
        raise InputError(f"only {len(candidates):,} of {people_count(len(people))} have {per_identity} images or "
                         f"more; {advice}.")
    chosen = np.sort(random.choice(candidates, identities, replace=False))
    return np.stack([np.sort(random.choice(np.flatnonzero(labels == person), per_identity, replace=False))
                     for person in chosen])


def read_faces(listing, rows):
    """Read and align some images of a list.

    Args:
        listing: faces.data.casia.TrainingList.
        rows: indices of the images in the list.

    Returns:
        uint8 (len(rows), 112, 96, 3).

    Raises:
        InputError: an image can't be read or aligned.
    """
    faces = []
    for row in rows:
        try:
            faces.append(load_face(*listing.face(row)))
        except (UnreadableImage, ValueError) as error:
            raise InputError(f"can't use {listing.paths[row]} in {listing.source}: {error}; replace or remove the "
                             "image, or try another --seed.") from None
    return np.stack(faces)


def layout_and_silhouette(embeddings, labels, seed):
    """Compute a t-SNE layout of embeddings, and a score of how well their identities separate.

    Args:
        embeddings: float (N, D).
        labels: int (N,), at least two identities with at least two embeddings each.
        seed: seed of the layout.

    Returns:
        (layout, float (N, 2); silhouette score of the embeddings with cosine distance, -1 to 1).

    Raises:
        InputError: an embedding is not finite, or is zero.
    """
    from sklearn.manifold import TSNE  # imported here because it is slow to import
    from sklearn.metrics import silhouette_score
    if not np.isfinite(embeddings).all() or not embeddings.any(1).all():
        raise InputError("an embedding of the model is not finite or is zero, so its training must have failed; pass "
                         "another --model.")
    # The perplexity is about the number of neighbors of a point, so the images of one identity should suffice.
    perplexity = min(30, np.bincount(labels).max(), (len(labels) - 1) / 3)
    tsne = TSNE(metric="cosine", init="pca", perplexity=perplexity, random_state=seed)
    return tsne.fit_transform(embeddings), float(silhouette_score(embeddings, labels, metric="cosine"))


def panel_titles(models, methods, titles):
    """Return the title of each panel: from `titles` if given, else the model's method, plus its path if ambiguous.

    Args:
        models: paths of the models.
        methods: the method of each model, None if unknown; the name of the file then replaces it.
        titles: list of titles, or None.
    """
    if titles:
        return titles
    names = [method or model.name for model, method in zip(models, methods)]
    return [name if names.count(name) == 1 else f"{name}, {model}" for name, model in zip(names, models)]


def write_points(path, panels, labels, names):
    """Write the points that tsne_panels() draws as a tab-separated table with columns panel, identity, x and y.

    Args:
        path: the file, written atomically.
        panels, labels, names: see faces.plots.tsne_panels().
    """
    with atomic_write(path, "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, delimiter="\t", lineterminator="\n")
        table.writerow(COLUMNS)
        for title, points in panels:
            table.writerows((title, names[label], f"{x:.2f}", f"{y:.2f}") for label, (x, y) in zip(labels, points))


def read_points(path):
    """Return the panels, labels and names that write_points() wrote to a file.

    Raises:
        InputError: the file can't be read, or is not such a table.
    """
    try:
        text = io.StringIO(read_bytes(path, MAX_POINTS).decode(errors="surrogateescape"), newline="")
        rows = [[row[name] for name in COLUMNS] for row in csv.DictReader(text, delimiter="\t")]
        (names, identities), (titles, panels) = (_numbered([row[i] for row in rows]) for i in (1, 0))
        points = np.array([row[2:] for row in rows], np.float64).reshape(len(titles), -1, 2)
        identities, panels = (labels.reshape(points.shape[:2]) for labels in (identities, panels))
        if (panels != panels[:, :1]).any() or (identities != identities[0]).any() or not np.isfinite(points).all():
            raise ValueError
    except OSError as error:
        raise InputError(f"can't read {path}: {error.strerror or error}; pass a file that tools/tsne.py --points "
                         "wrote.") from None
    except (KeyError, TypeError, ValueError, IndexError, csv.Error):
        raise InputError(f"{path} is not a whole table of points; write it again with tools/tsne.py "
                         "--points.") from None
    return list(zip(titles, points)), identities[0], names


def _numbered(values):
    """Return the distinct values in the order in which they appear first, and the number of each value, int (N,)."""
    numbers = {value: number for number, value in enumerate(dict.fromkeys(values))}
    return list(numbers), np.array([numbers[value] for value in values], int)


@command
def main(argv=None):
    args = _parser().parse_args(argv)
    _check_options(args)
    device = pick_device(args.device)
    listing = list_lfw(args.lfw, args.landmarks) if args.lfw else list_casia(args.faces, args.landmarks)
    rows = choose_images(listing.labels, args.identities, args.per_identity, args.seed)
    faces = read_faces(listing, rows.ravel())
    labels = np.repeat(np.arange(args.identities), args.per_identity)
    layouts, methods = [], []
    for model in args.model:
        net, loaded = load_net(model, NETS, args.net, args.channels)
        announce(model, loaded)
        methods.append(loaded["method"])
        layouts.append(layout_and_silhouette(embed(net, faces, device, args.batch_size), labels, args.seed))
    titles = panel_titles(args.model, methods, args.title)
    for title, (_, silhouette) in zip(titles, layouts):
        print(f"silhouette {silhouette:.4f}  {title}  ({args.identities} identities, {args.per_identity} images each)")
    panels = [(f"{title}: silhouette {silhouette:.2f}", points) for title, (points, silhouette) in zip(titles, layouts)]
    names = [_person(listing.paths[row]).replace("_", " ") or f"label {listing.labels[row]}" for row in rows[:, 0]]
    if args.points:
        write_points(args.points, panels, labels, names)
    tsne_panels(args.output, panels, labels, names)
    print(f"picture: {args.output}")


def _check_options(args):
    for name, value in (("--identities", args.identities), ("--per-identity", args.per_identity)):
        if value < 2:
            raise InputError(f"{name} {value} is too small; choose at least 2.")
    if args.identities > 70:
        raise InputError(f"--identities {args.identities} is more than a plot can distinguish; choose 2 to 70.")
    if args.seed < 0 or (args.batch_size is not None and args.batch_size < 1):
        raise InputError("--seed must be at least 0 and --batch-size at least 1; change the option that is too small.")
    if args.title and len(args.title) != len(args.model):
        raise InputError(f"--title was given {count_of(len(args.title), 'time~')} and --model "
                         f"{count_of(len(args.model), 'time~')}; pass one title per model, in the same order.")
    if args.output.suffix.lower() not in PICTURES:
        raise InputError(f"--output {args.output} has an unsupported extension; choose a name that ends in "
                         f"{', '.join(PICTURES[:-1])} or {PICTURES[-1]}.")
    for path, option in ((args.output, "--output"), (args.points or args.output, "--points")):
        check_writable(path.parent, option)


def _person(path):
    return PurePosixPath(path).parent.name


def _parser():
    parser = script_parser(__doc__)
    parser.add_argument("--model", type=Path, action="append", required=True, metavar="FILE|DIR",
                        help=f"{MODEL_HELP}; repeat --model to draw one panel per model")
    parser.add_argument("--title", action="append", metavar="TEXT",
                        help="title of a panel; repeat it once per --model, in the same order (default: the method)")
    add_model_options(parser, NETS)
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--faces", type=Path, metavar="DIR",
                      help="CASIA-WebFace, as person folders or a zip of them; if no landmark list exists, the faces "
                           "must already be aligned")
    data.add_argument("--lfw", type=Path, metavar="DIR", help="folder of Name/Name_0001.jpg")
    parser.add_argument("--landmarks", type=Path, metavar="FILE",
                        help="landmark list (default: casia_landmark.txt in --faces, or else the list that "
                             "casia_landmark.py or lfw_landmark.py in mtcnn/ wrote for the folder)")
    parser.add_argument("--identities", type=int, default=10, metavar="N",
                        help="number of identities, 2 to 70; up to 10 are easy to tell apart (default: 10)")
    parser.add_argument("--per-identity", type=int, default=20, metavar="N",
                        help="images per identity, at least 2; people with fewer are not chosen (default: 20)")
    parser.add_argument("--seed", type=int, default=0,
                        help="seed of the choice of identities and images and of the layout, at least 0 (default: 0)")
    parser.add_argument("--output", type=Path, default=RUNS / "tsne.png", metavar="FILE",
                        help="picture to write, .png, .svg or .pdf (default: runs/tsne.png in the clone)")
    parser.add_argument("--points", type=Path, metavar="FILE",
                        help="also write the points, as a tab-separated table of panel, identity, x and y")
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu (default: auto)")
    parser.add_argument("--batch-size", type=int, metavar="N",
                        help="faces per batch, at least 1; affects only the speed (default: 256, or 32 on a CPU)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
