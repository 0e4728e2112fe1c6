"""Draw a t-SNE plot of the embeddings of a few identities, and measure how well the identities separate.

    python tools/tsne.py --model FILE --faces DIR                   # CASIA-WebFace, or faces that are already aligned
    python tools/tsne.py --model A --model B --title softmax --title CosFace --lfw DIR

All models embed the same images. The silhouette score is computed with cosine distance on the embeddings, not on the
2-D layout; 1 means well separated, 0 means overlapping.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np

from cosFace.net import NETS
from faces.data.casia import TrainingList, list_casia, person
from faces.data.sources import open_photos
from faces.files import RUNS, InputError, at_least, check_writable, command, path, script_parser, write_json
from faces.landmarks import found_list, read_landmarks
from faces.plots import tsne_panels
from faces.verification.lfw import load_faces
from faces.verification.weights import add_model_options, model_titles
from tools.embedder import Embedder


def list_lfw(root: Path, landmarks: Path | None = None) -> TrainingList:
    """List LFW like a training set, with labels by person folder; without a landmark list, the faces are aligned."""
    source = open_photos(root)
    landmarks = landmarks or found_list(source, "lfw_landmark.txt")
    names, _, points = read_landmarks(landmarks, False, source.root) if landmarks else (source.names(), None, None)
    names = [name.removeprefix(source.wrapper) for name in names]
    return TrainingList(source, names, np.unique(list(map(person, names)), return_inverse=True)[1], points)


def choose_images(labels: np.ndarray, identities: int, per_identity: int, seed: int) -> np.ndarray:
    """Choose identities and images of each at random, int (identities, per_identity), indices into `labels`."""
    random = np.random.default_rng(seed)
    people, counts = np.unique(labels, return_counts=True)
    candidates = people[counts >= per_identity]
    if len(candidates) < identities:
        raise InputError(f"only {len(candidates):,} of {len(people):,} people have {per_identity} images or more; "
                         "lower --per-identity or --identities.")
    chosen = np.sort(random.choice(candidates, identities, replace=False))
    return np.stack([np.sort(random.choice(np.flatnonzero(labels == label), per_identity, replace=False))
                     for label in chosen])


def layout_and_silhouette(embeddings: np.ndarray, labels: np.ndarray, seed: int) -> tuple[np.ndarray, float]:
    """Return a t-SNE layout of embeddings, float (N, 2), and their silhouette score with cosine distance, -1 to 1."""
    from sklearn.manifold import TSNE  # imported here because it is slow to import
    from sklearn.metrics import silhouette_score
    # The perplexity is about the number of neighbors of a point, so the images of one identity should suffice.
    perplexity = min(30, np.bincount(labels).max(), (len(labels) - 1) / 3)
    tsne = TSNE(metric="cosine", init="pca", perplexity=perplexity, random_state=seed)
    return tsne.fit_transform(embeddings), float(silhouette_score(embeddings, labels, metric="cosine"))


@command
def main(argv=None):
    args = _parse(argv)
    listing = list_lfw(args.lfw, args.landmarks) if args.lfw else list_casia(args.faces, args.landmarks)
    rows = choose_images(listing.labels, args.identities, args.per_identity, args.seed)
    points = None if listing.points is None else listing.points[rows.ravel()]
    faces = load_faces(listing.source, [listing.paths[row] for row in rows.ravel()], points)
    labels = np.repeat(np.arange(args.identities), args.per_identity)
    panels = []
    for title, model in zip(args.title or model_titles(args.model), args.model):
        embedder = Embedder(model, args.device, net=args.net, channels=args.channels)
        layout, silhouette = layout_and_silhouette(embedder.embed(faces), labels, args.seed)
        print(f"silhouette {silhouette:.4f}  {title}  ({args.identities} identities, {args.per_identity} images each)")
        panels.append((f"{title}: silhouette {silhouette:.2f}", layout))
    names = [Path(person(listing.paths[row])).name.replace("_", " ") or f"label {listing.labels[row]}"
             for row in rows[:, 0]]
    if args.points:
        points = [(title, layout.astype(float).round(2).tolist()) for title, layout in panels]
        write_json(args.points, {"panels": points, "labels": labels.tolist(), "names": names})
    tsne_panels(args.output, panels, labels, names)
    print(f"picture: {args.output}")


def _parse(argv):
    parser = script_parser(__doc__)
    option = parser.add_argument
    add_model_options(parser, NETS, action="append")
    option("--title", action="append", metavar="TEXT", help="title of a panel, once per --model")
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--faces", type=path, metavar="DIR", help="training set, as for casia_train.py")
    data.add_argument("--lfw", type=path, metavar="DIR", help="folder of Name/Name_0001.jpg")
    option("--landmarks", type=path, metavar="FILE", help="landmark list (default: as in training and evaluation)")
    option("--identities", type=at_least(2, int, 70), default=10, metavar="N", help="2 to 70; 10 can be told apart")
    option("--per-identity", type=at_least(2), default=20, metavar="N", help="images per identity")
    option("--seed", type=at_least(0), default=0, help="of the choice of identities and images")
    option("--output", type=path, default=RUNS / "tsne.png", metavar="FILE", help=".png, .svg or .pdf")
    option("--points", type=path, metavar="FILE", help="also write the points, as JSON")
    option("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu")
    args = parser.parse_args(argv)
    if args.title and len(args.title) != len(args.model):
        parser.error("pass --title once per --model, in the same order")
    if args.output.suffix.lower() not in (".png", ".svg", ".pdf"):
        parser.error(f"--output {args.output} must end in .png, .svg or .pdf")
    for file in filter(None, (args.output, args.points)):
        check_writable(file.parent)
    return args


if __name__ == "__main__":
    sys.exit(main())
