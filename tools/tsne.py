"""Draw a t-SNE of the embeddings of a few identities, and measure how well they separate.

    python tools/tsne.py --model FILE --faces DIR                   # CASIA-WebFace, or faces that are already aligned
    python tools/tsne.py --model FILE --lfw DIR
    python tools/tsne.py --model A --model B --title softmax --title CosFace --faces DIR

The seed determines the identities and images, which are the same for all models. The silhouette score is computed from
the embeddings, with cosine distance, not from the picture: 1 means well separated, 0 means mixed. --points FILE saves
what is drawn.
"""
import argparse
import csv
import sys
from pathlib import Path, PurePosixPath

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np

from cosFace.net import NETS
from faces.align import load_face
from faces.data.casia import Folder, TrainingList, read_casia
from faces.device import pick_device
from faces.figures import tsne_panels
from faces.files import InputError, atomic_write, command, folder
from faces.images import UnreadableImage
from faces.landmarks import default_list, read_landmarks
from faces.verification.embed import embed
from faces.verification.weights import add_options as add_model_options
from faces.verification.weights import load_weights

PICTURES = (".png", ".svg", ".pdf")


def list_faces(root, landmarks=None):
    """List a training set like casia_train.py does; see faces.data.casia.read_casia().

    Args:
        root: folder of person folders, or a zip of them.
        landmarks: landmark list with labels; None uses casia_landmark.txt in the folder, or the list that
            mtcnn/casia_landmark.py wrote for it; without either, the faces must already be aligned.
    """
    root = Path(root).expanduser()
    name = "casia_landmark.txt"
    known = next((path for path in (root / name, default_list(root, name)) if path.is_file()), None)
    return read_casia(root, landmarks or known)


def list_lfw(root, landmarks=None):
    """List LFW as a faces.data.casia.TrainingList, labeled by person folders.

    Args:
        root: folder of Name/Name_0001.jpg.
        landmarks: landmark list; None uses the list that mtcnn/lfw_landmark.py wrote for this folder.
    """
    root = folder(root, "LFW images as Name/Name_0001.jpg")
    listed = read_landmarks(landmarks or default_list(root, "lfw_landmark.txt"), labelled=False)
    labels = np.unique([_person(path) for path in listed.paths], return_inverse=True)[1]
    return TrainingList(Folder(root), listed.paths, labels, listed.points)


def pick(labels, identities, each, seed):
    """Choose identities with enough images, and images of each.

    Args:
        labels: int (N,).
        identities, each: number of identities, and of images of each, at least 2.
        seed: of both choices.

    Returns:
        int (identities, each), rows of `labels` in increasing order, one identity per line.

    Raises:
        InputError: too few identities have enough images.
    """
    random = np.random.default_rng(seed)
    people, counts = np.unique(labels, return_counts=True)
    enough = people[counts >= each]
    if len(enough) < identities:
        raise InputError(f"only {len(enough)} of {len(people)} people have {each} images; "
                         "lower --per-identity or --identities.")
    chosen = np.sort(random.choice(enough, identities, replace=False))
    return np.stack([np.sort(random.choice(np.flatnonzero(labels == person), each, replace=False))
                     for person in chosen])


def read_faces(listing, rows):
    """Read and align the images in some rows of a list: uint8 (len(rows), 112, 96, 3).

    Raises:
        InputError: an image can't be used.
    """
    faces = []
    for row in rows:
        try:
            faces.append(load_face(*listing.face(row)))
        except (UnreadableImage, ValueError) as error:
            raise InputError(f"can't use {listing.paths[row]} in {listing.source}: {error}; replace or remove it, or "
                             "try another --seed.") from None
    return np.stack(faces)


def separate(embeddings, labels, seed):
    """Compute the t-SNE layout of embeddings, and measure how well their identities separate.

    Args:
        embeddings: float (N, D).
        labels: int (N,), at least two identities with at least two embeddings each.
        seed: of the layout.

    Returns:
        (float (N, 2), silhouette score of the embeddings under cosine distance, -1 to 1).

    Raises:
        InputError: an embedding is not finite, or is zero.
    """
    from sklearn.manifold import TSNE  # slow to import
    from sklearn.metrics import silhouette_score
    if not np.isfinite(embeddings).all() or not embeddings.any(1).all():
        raise InputError("the model's embeddings are not finite or zero; its training must have failed.")
    perplexity = min(30, np.bincount(labels).max(), (len(labels) - 1) / 3)  # neighbors: images of one identity
    layout = TSNE(metric="cosine", init="pca", perplexity=perplexity, random_state=seed)
    return layout.fit_transform(embeddings), float(silhouette_score(embeddings, labels, metric="cosine"))


def titles_of(models, methods, given):
    """Return a title for each model: the given one, or its method, with the path of the file if that is ambiguous."""
    if given:
        return given
    names = [method or model.name for model, method in zip(models, methods)]
    return [name if names.count(name) == 1 else f"{name}, {model}" for name, model in zip(names, models)]


def write_points(path, panels, labels, names):
    """Write the points of tsne_panels() as a tab-separated table: panel, identity, x, y.

    Args:
        path: the table; written atomically.
        panels, labels, names: see faces.figures.tsne_panels.
    """
    with atomic_write(path, "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, delimiter="\t", lineterminator="\n")
        table.writerow(("panel", "identity", "x", "y"))
        for title, points in panels:
            table.writerows((title, names[label], f"{x:.2f}", f"{y:.2f}") for label, (x, y) in zip(labels, points))


def read_points(path):
    """Return (panels, labels, names) as write_points() wrote them."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    names = list(dict.fromkeys(row["identity"] for row in rows))
    titles = list(dict.fromkeys(row["panel"] for row in rows))
    points = np.array([(row["x"], row["y"]) for row in rows], np.float64).reshape(len(titles), -1, 2)
    labels = np.array([names.index(row["identity"]) for row in rows[:points.shape[1]]])    # the same in every panel
    return list(zip(titles, points)), labels, names


@command
def main(argv=None):
    args = _parser().parse_args(argv)
    _check(args)
    device = pick_device(args.device)
    listing = list_lfw(args.lfw, args.landmarks) if args.lfw else list_faces(args.faces, args.landmarks)
    rows = pick(listing.labels, args.identities, args.per_identity, args.seed)
    faces = read_faces(listing, rows.ravel())
    labels = np.repeat(np.arange(args.identities), args.per_identity)
    layouts, methods = [], []
    for model in args.model:
        net = NETS[args.net]()
        methods.append(load_weights(net, model, args.channels)["method"])
        layouts.append(separate(embed(net, faces, device, args.batch_size), labels, args.seed))
    titles = titles_of(args.model, methods, args.title)
    for title, (_, silhouette) in zip(titles, layouts):
        print(f"silhouette {silhouette:.4f}  {title}  ({args.identities} identities of {args.per_identity} images)")
    panels = [(f"{title}: silhouette {silhouette:.2f}", points) for title, (points, silhouette) in zip(titles, layouts)]
    names = [_person(listing.paths[row]).replace("_", " ") or f"label {listing.labels[row]}" for row in rows[:, 0]]
    if args.points:
        write_points(args.points, panels, labels, names)
    tsne_panels(args.output, panels, labels, names)
    print(f"picture: {args.output}")


def _check(args):
    for name, value in (("--identities", args.identities), ("--per-identity", args.per_identity)):
        if value < 2:
            raise InputError(f"{name} {value} is too small; it must be at least 2.")
    if args.identities > 70:
        raise InputError(f"--identities {args.identities} can't be distinguished in a picture; choose 2 to 70.")
    if args.seed < 0 or (args.batch_size is not None and args.batch_size < 1):
        raise InputError("--seed must be at least 0, and --batch-size at least 1.")
    if args.title and len(args.title) != len(args.model):
        raise InputError(f"{len(args.title)} --title for {len(args.model)} --model; pass one per model, in their "
                         "order.")
    if args.output.suffix.lower() not in PICTURES:
        raise InputError(f"--output {args.output} is not a picture; its name must end in {', '.join(PICTURES)}.")


def _person(path):
    return PurePosixPath(path).parent.name


def _parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, action="append", required=True, metavar="FILE",
                        help="checkpoint.pt of casia_train.py, or a public checkpoint of the same network; one per "
                             "panel")
    parser.add_argument("--title", action="append", metavar="TEXT",
                        help="title of a panel, in the order of --model (default: the method)")
    add_model_options(parser, NETS)
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--faces", type=Path, metavar="DIR",
                      help="CASIA-WebFace, person folders or a zip of them; without a landmark list, the faces must "
                           "already be aligned")
    data.add_argument("--lfw", type=Path, metavar="DIR", help="folder of Name/Name_0001.jpg")
    parser.add_argument("--landmarks", type=Path, metavar="FILE",
                        help="landmark list (default: the one in the folder, or the one that mtcnn/ wrote for it)")
    parser.add_argument("--identities", type=int, default=10, metavar="N", help="number of identities, 2 to 70; up to "
                                                                                "10 are easy to read (default: 10)")
    parser.add_argument("--per-identity", type=int, default=20, metavar="N",
                        help="images per identity, at least 2; people with fewer are not chosen (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the identities, the images and the layout "
                                                            "(default: 0)")
    parser.add_argument("--output", type=Path, default=Path("tsne.png"), metavar="FILE",
                        help="the picture, .png, .svg or .pdf (default: tsne.png)")
    parser.add_argument("--points", type=Path, metavar="FILE",
                        help="also write a tab-separated table of panel, identity, x and y of every point")
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu (default: auto)")
    parser.add_argument("--batch-size", type=int, metavar="N",
                        help="faces at a time; affects only the speed (default: 256, or 32 on a CPU)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
