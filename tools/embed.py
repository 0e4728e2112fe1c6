"""Embed the face in each photo, or in each image of a folder, and write embeddings and landmarks to one .npz file.

    python tools/embed.py PHOTO-or-FOLDER... --model FILE --output faces.npz

The file holds one row per photo with a face; photos without one, and unreadable ones, are named and counted. It has the
arrays:

    names        path of the photo, as it was given or below the folder that was given; bytes that are not UTF-8 are
                 kept as os.fsdecode() does, so open() takes it, and print(ascii(name)) shows it
    embeddings   float32 (N, 1024), or (N, 512) with --mirror none or sum; not normalized
    boxes, scores, landmarks    float32 (N, 4), (N,), (N, 5, 2), in pixels of the photo
    chosen, faces               int64 (N,): which of the detected faces it is, by decreasing score from 0, and how many
                                there are
    model        SHA-256 of the network's weights; equal models have equal ones

With --aligned, it has no boxes, scores, landmarks, chosen and faces. An interrupted or killed run is continued by the
same command: results are kept in .NAME.parts beside the output until it is complete.
"""
import argparse
import io
import shutil
import sys
import zipfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from faces.signals import end_quietly, resumable

end_quietly(__name__)    # Ctrl-C during the slow imports below prints no traceback
import numpy as np
from tqdm import tqdm

from cosFace.net import NETS
from faces.device import count_cpus
from faces.files import (
    InputError,
    atomic_write,
    command,
    locked,
    read_bytes,
    read_json,
    remove_partial,
    script_parser,
    version,
    write_json,
)
from faces.images import list_images
from faces.text import count_of, printable
from faces.verification.embed import MIRROR, optimized_copy
from faces.verification.weights import MODEL_HELP, announce
from faces.verification.weights import add_options as add_model_options
from mtcnn.detector import add_options, make_detector
from mtcnn.landmark_lists import digest
from mtcnn.processes import in_processes, start_method
from tools.embedder import Embedder, add_select_option, crop_faces, find_faces

PART = 64      # photos per part; an interrupted run loses at most two per process
MAX_PART = 10**8    # bytes of a part; it has 64 rows of about 4 KB
FIELDS = {"box": "boxes", "score": "scores", "landmarks": "landmarks", "chosen": "chosen", "count": "faces"}
ROWS = {"boxes": (4,), "scores": (), "landmarks": (5, 2), "chosen": (), "faces": ()}    # shape of a row


def list_photos(paths):
    """Return the photos among and below some paths, in order and without duplicates.

    Raises:
        InputError: a path does not exist, or a folder contains no images.
    """
    photos = []
    for path in paths:
        images = [str(path / image) for image in list_images(path)] if path.is_dir() else [str(path)]
        if not path.exists():
            raise InputError(f"{path} does not exist; pass photos, or folders of photos.")
        if not images:
            raise InputError(f"the folder {path} contains no images; pass a folder of photos.")
        photos += images
    return list(dict.fromkeys(photos))


class Parts:
    """The results so far, in a folder beside the output. A run with other photos, model or options starts anew.

    Args:
        output: path of the file that is being made.
        settings: everything that results depend on, as JSON.
        count: number of photos.
        width: number of values of an embedding.
    """

    def __init__(self, output, settings, count, width):
        self.folder = output.with_name(f".{output.name}.parts")
        self.starts, self.count, self.width = range(0, count, PART), count, width
        if self.folder.is_symlink() or self.folder.is_file():
            raise InputError(f"{self.folder} is a link or a file; remove it.")
        try:
            known = read_json(self.folder / "settings.json", "the interrupted run is started anew")
        except InputError as error:
            print(error)
            known = None
        if known != settings:
            if known is not None:
                print("the photos, the model or the options have changed since the interrupted run; starting anew")
            shutil.rmtree(self.folder, ignore_errors=True)
            write_json(self.folder / "settings.json", settings)

    def read(self, start):
        """Return the arrays of the part that starts with photo `start`, or None if there is no such part yet."""
        try:
            data = io.BytesIO(read_bytes(self._path(start), MAX_PART))
            with zipfile.ZipFile(data) as archive:    # np.load doesn't always check the checksums
                if sum(entry.file_size for entry in archive.infolist()) > MAX_PART or archive.testzip():
                    return None
            data.seek(0)
            with np.load(data, allow_pickle=False) as part:
                arrays = dict(part)
            return arrays if self._is_whole(start, **arrays) else None
        except Exception:    # numpy and zipfile raise many kinds on damaged files; the part is made again
            return None

    def _is_whole(self, start, index, skipped, reasons, **columns):
        """Return whether each photo of a part is either skipped or has a row in all columns, of the right shape."""
        photos = np.concatenate([index, skipped])
        shapes = {name: (len(index), *shape) for name, shape in {"embeddings": (self.width,), **ROWS}.items()}
        return (photos.dtype == np.int64 and reasons.dtype.kind == "U" and reasons.shape == skipped.shape
                and sorted(photos.tolist()) == list(range(start, min(start + PART, self.count)))
                and (len(index) == 0 or "embeddings" in columns)
                and all(np.isfinite(column).all() and column.shape == shapes[name] for name, column in columns.items()))

    def write(self, start, arrays):
        with atomic_write(self._path(start)) as file:
            np.savez(file, **arrays)

    def names(self):
        """Return the names of the arrays, and the index of every photo with a face, int64 (N,)."""
        parts = [(list(part), part["index"]) for part in map(self.read, self.starts) if len(part["index"])]
        return (parts[0][0], np.concatenate([index for _, index in parts])) if parts else ([], np.empty(0, int))

    def column(self, name):
        """Yield one array of each part that has any faces."""
        for part in map(self.read, self.starts):
            if len(part["index"]):
                yield part[name]

    def _path(self, start):
        return self.folder / f"{start:09d}.npz"


class _Detection:
    """Finds the faces of a part; picklable, so that other processes can do it."""

    def __init__(self, photos, detector, select):
        self.photos, self.detector, self.select = photos, detector, select

    def __call__(self, starts):
        """Return [(start, list of Face or reason)] for some parts; without a detector, the photos are aligned."""
        parts = [(start, self.photos[start:start + PART]) for start in starts]
        return [(start, find_faces(part, self.detector, self.select) if self.detector else crop_faces(part))
                for start, part in parts]


def embed_parts(embedder, photos, parts, aligned, workers):
    """Embed all photos that no part holds yet; name the skipped ones on stderr.

    Args:
        embedder: Embedder.
        photos: list of paths.
        parts: Parts.
        aligned: whether the photos are aligned faces.
        workers: number of processes that detect; None for one per core, or none if the device is not a CPU.

    Returns:
        Counter of the reasons for which photos were skipped.
    """
    reasons, missing = Counter(), []
    with tqdm(desc="embedding", total=len(photos), unit=" photos") as bar:
        def finish(start, part):
            for i, reason in zip(part["skipped"].tolist(), part["reasons"].tolist()):
                tqdm.write(printable(f"skipped {photos[i]}: {reason}"), file=sys.stderr)
                reasons[reason] += 1
            bar.update(min(PART, len(photos) - start))

        for start in parts.starts:
            part = parts.read(start)
            missing.append(start) if part is None else finish(start, part)
        bar.initial = bar.n    # the rate is that of this run
        detection = _Detection(photos, None if aligned else embedder.detector, embedder.select)
        workers = (count_cpus() if embedder.device.type == "cpu" else 0) if workers is None else workers
        if workers > 1 and len(missing) > 1:
            results = in_processes(detection, missing, 1, workers, start_method(embedder.device))
        else:
            results = (detection([start]) for start in missing)
        for (start, faces), in results:
            part = _part(embedder, start, faces)
            parts.write(start, part)
            finish(start, part)
    return reasons


def _part(embedder, start, faces):
    """Return the arrays of a part, given the Face or the reason why there is none for each of its photos."""
    found = [(start + i, face) for i, face in enumerate(faces) if not isinstance(face, str)]
    skipped = [(start + i, face) for i, face in enumerate(faces) if isinstance(face, str)]
    part = {"index": np.array([i for i, _ in found], np.int64), "skipped": np.array([i for i, _ in skipped], np.int64),
            "reasons": np.array([reason for _, reason in skipped], np.str_)}
    if found:
        part["embeddings"] = embedder.embed(np.stack([face.crop for _, face in found]))
        if not np.isfinite(part["embeddings"]).all():
            raise InputError("the model's embeddings are not finite, so its training must have failed; pass another "
                             "--model.")
        if found[0][1].box is not None:
            part |= {name: np.array([getattr(face, field) for _, face in found]) for field, name in FIELDS.items()}
    return part


def assemble(output, photos, parts, model):
    """Write the .npz file from all parts, one part in memory at a time; return the number of rows and of values a row.

    Args:
        output, photos, parts: see embed_parts().
        model: fingerprint of the network.

    Raises:
        InputError: no photo has a face, or the file can't be written.
    """
    arrays, index = parts.names()
    if not len(index):
        raise InputError(f"no face that can be used in {count_of(len(photos), 'photo~')}; nothing was written.")
    names = [photos[i] for i in index]
    text = f"<U{max(map(len, names))}"
    chunks = (np.array(names[i:i + PART], text) for i in range(0, len(names), PART))
    with atomic_write(output) as file, zipfile.ZipFile(file, "w") as archive:
        _add(archive, "names", len(names), chunks)
        for name in ("embeddings", *FIELDS.values()):
            if name in arrays:
                _add(archive, name, len(names), parts.column(name))
        _add(archive, "model", None, [np.array(model)])
    return len(names), next(parts.column("embeddings")).shape[1]


def _add(archive, name, count, chunks):
    """Add an array of `count` rows to an .npz archive, from chunks of rows; without `count`, a single array."""
    chunks = iter(chunks)
    first = next(chunks)
    header = {"descr": np.lib.format.dtype_to_descr(first.dtype), "fortran_order": False,
              "shape": first.shape if count is None else (count, *first.shape[1:])}
    # Without a date in the archive, equal results are equal files.
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as entry:
        np.lib.format.write_array_header_1_0(entry, header)
        entry.write(first.tobytes())
        for chunk in chunks:
            entry.write(chunk.tobytes())


def _settings(args, photos, model):
    return {"photos": digest(f"{photo}\0{version(photo)}" for photo in photos), "model": model,
            "part": PART, "select": args.select, "mirror": args.mirror,
            "aligned": args.aligned, "min_face_size": args.min_face_size}


@command
def main(argv=None):
    args = _parser().parse_args(argv)
    if args.output.suffix != ".npz" or args.output.is_dir():
        problem = "is a folder" if args.output.is_dir() else "does not end in .npz"
        raise InputError(f"--output {args.output} {problem}; choose the name of a file, such as faces.npz.")
    if args.workers is not None and args.workers < 0:
        raise InputError(f"--workers {args.workers} is out of range; it must be 0 or more.")
    photos = list_photos(args.photos)
    embedder = Embedder(args.model, args.device, args.select, args.mirror, channels=args.channels, net=args.net,
                        detector=make_detector(args))
    announce(args.model, embedder.loaded)
    embedder.net = optimized_copy(embedder.net, embedder.device, images=len(photos))    # not anew for each part
    model = embedder.loaded["fingerprint"]
    width = embedder.net.fc5.out_features * (2 if args.mirror == "concatenate" else 1)
    with resumable(), locked(args.output.with_name(f".{args.output.name}.lock"), f"writing {args.output}",
                             advice="choose another --output, on a writable local disk"):
        remove_partial(args.output)
        parts = Parts(args.output, _settings(args, photos, model), len(photos), width)
        reasons = embed_parts(embedder, photos, parts, args.aligned, args.workers)
        rows, values = assemble(args.output, photos, parts, model)
        shutil.rmtree(parts.folder, ignore_errors=True)
    details = ", ".join(f"{printable(reason)}: {n:,}" for reason, n in reasons.most_common(5))
    print(f"{args.output}: {count_of(rows, 'embedding~')} of {values} values; {reasons.total():,} of "
          f"{count_of(len(photos), 'photo~')} skipped{f' ({details})' if details else ''}")


def _parser():
    parser = script_parser(__doc__)
    parser.add_argument("photos", type=Path, nargs="+", metavar="PHOTO|DIR", help="image files of any size, or folders")
    parser.add_argument("--model", type=Path, required=True, metavar="FILE|DIR", help=MODEL_HELP)
    add_model_options(parser, NETS)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="file to write, .npz")
    parser.add_argument("--aligned", action=argparse.BooleanOptionalAction, default=False,
                        help="the images are faces that are already aligned, 112x96 or 112x112; nothing is detected")
    parser.add_argument("--mirror", choices=MIRROR, default="concatenate",
                        help="how to use the embedding of the mirror image: append it, add it, or do not compute it "
                             "(default: concatenate)")
    add_select_option(parser)
    parser.add_argument("--workers", type=int, metavar="N",
                        help="processes that detect faces (default: one per core; 0 on a GPU)")
    add_options(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
