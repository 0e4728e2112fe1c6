"""Embed the face in each photo, or in each image of a folder, and write embeddings and landmarks to one .npz file.

    python tools/embed.py PHOTO-or-FOLDER... --model FILE --output faces.npz

The file holds one row per photo, or per face with --all-faces:

    names        path of the photo: as it was given, or below the folder that was given
    embeddings   float32 (N, 1024), or (N, 512) with --flip none or sum; not normalized
    boxes, scores, landmarks    float32 (N, 4), (N,), (N, 5, 2), in pixels of the photo
    chosen, faces               int64 (N,): which of how many detected faces it is, by decreasing score from 0
    model        SHA-256 of the network's weights

With --aligned, it has only names, embeddings and model. Photos without a face and unreadable ones are listed with the
reason in NAME.skipped.txt. The same command continues a run that was killed.
"""
import argparse
import hashlib
import json
import os
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
from tqdm import tqdm

from faces import files
from faces.device import count_cpus
from faces.files import InputError, at_least, atomic_write, check_writable, command, count_of, path, script_parser
from faces.images import summarize
from faces.verification.embed import FLIP, optimized_copy
from mtcnn.detector import list_photos
from mtcnn.processes import in_processes
from tools.embedder import Embedder, add_photo_options, crop_faces, find_faces, make_embedder

PART = 64      # photos at a time; a killed run repeats up to AHEAD of these per process
FIELDS = {"boxes": "box", "scores": "score", "landmarks": "landmarks", "chosen": "chosen", "faces": "count"}


class Rows:
    """The rows so far, in a file beside the output. Its name holds a digest of all that the rows depend on, so a run
    with other photos, another model or other options starts its own. An embedding has `width` values."""

    def __init__(self, output: Path, depends, width: int, aligned: bool):
        digest = hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:16]
        self.output, self.file = output, output.with_name(f".{output.name}.{digest}.rows")
        found = [("boxes", "f4", 4), ("scores", "f4"), ("landmarks", "f4", (5, 2)), ("chosen", "i8"), ("faces", "i8")]
        self.kind = np.dtype([("photo", "i8"), ("embeddings", "f4", width), *([] if aligned else found)])
        self.end = open(self.file, "ab")
        photos = self.read()["photo"].tolist()
        complete = photos.index(photos[-1]) if photos else 0    # the last photo may have more faces
        self.done = set(photos[:complete])    # indices of the photos that have rows
        self.end.truncate(complete * self.kind.itemsize)

    def read(self):
        """Return all rows, without those that are being written, mapped into memory."""
        count = self.file.stat().st_size // self.kind.itemsize
        return np.memmap(self.file, self.kind, "r", shape=count) if count else np.empty(0, self.kind)

    def append(self, photos: list[int], faces: list, embeddings: np.ndarray):
        rows = np.empty(len(faces), self.kind)
        rows["photo"], rows["embeddings"] = photos, embeddings
        for name in self.kind.names[2:]:
            rows[name] = [getattr(face, FIELDS[name]) for face in faces]
        self.end.write(rows.tobytes())
        self.end.flush()

    def finish(self, photos: list[str], model: str):
        """Write the .npz file, which takes little memory however many rows there are, and delete the rows."""
        self.end.close()
        rows = self.read()
        columns = {name: rows[name] for name in self.kind.names[1:]}
        with atomic_write(self.output) as file:
            np.savez(file, names=np.array([photos[i] for i in rows["photo"]]), **columns, model=model)
        del rows, columns
        for old in self.output.parent.glob(f".{self.output.name}.*.rows"):
            old.unlink()


def find(photos, detector, select, all_faces, indices):
    """Return (indices, what find_faces() returns for these photos); without a detector, the photos are aligned."""
    some = [photos[i] for i in indices]
    return indices, find_faces(some, detector, select, all_faces) if detector else crop_faces(some)


def embed_photos(embedder: Embedder, photos: list[str], rows: Rows, args) -> dict:
    """Append the rows of all photos that have none yet; return {photo: reason} for those that can't be used."""
    skipped, missing = {}, [i for i in range(len(photos)) if i not in rows.done]
    parts, workers = [missing[i:i + PART] for i in range(0, len(missing), PART)], args.workers
    if workers is None:
        workers = count_cpus() if embedder.device.type == "cpu" else 0
    work = partial(find, photos, None if args.aligned else embedder.detector, args.select, args.all_faces)
    results = in_processes(work, parts, workers, embedder.device) if min(workers, len(parts)) > 1 else map(work, parts)
    with tqdm(desc="embedding", total=len(photos), initial=len(rows.done), unit=" photos") as bar:
        for indices, found in results:
            skipped |= {photos[i]: faces for i, faces in zip(indices, found) if isinstance(faces, str)}
            faces = [(i, face) for i, faces in zip(indices, found) if not isinstance(faces, str) for face in faces]
            if faces:
                embeddings = embedder.embed(np.stack([face.crop for _, face in faces]))
                if not np.isfinite(embeddings).all():
                    raise InputError(f"the embeddings of {args.model} are not finite; its training must have failed.")
                rows.append([i for i, _ in faces], [face for _, face in faces], embeddings)
            bar.update(len(indices))
    return skipped


@command
def main(argv=None):
    args = _parse(argv)
    photos = list_photos(args.photos)
    embedder = make_embedder(args, args.flip)
    embedder.net = optimized_copy(embedder.net, embedder.device, images=len(photos))    # not anew for each part
    width = embedder.net.fc5.out_features * (2 if args.flip == "concatenate" else 1)
    depends = [embedder.loaded["fingerprint"], args.select, args.flip, args.aligned, args.all_faces, args.min_face_size,
               *map(_version, photos)]
    check_writable(args.output.parent)
    with files.locked(args.output.with_name(f".{args.output.name}.lock"), f"writing {args.output}", wait=False):
        rows = Rows(args.output, depends, width, args.aligned)
        skipped = embed_photos(embedder, photos, rows, args)
        count = len(rows.read())
        listed = args.output.with_suffix(".skipped.txt")
        listed.unlink(missing_ok=True)
        if not count:
            raise InputError(f"no face that can be used in {count_of(len(photos), 'photo~')} "
                             f"({summarize(list(skipped.items()))}).")
        rows.finish(photos, embedder.loaded["fingerprint"])
        print(f"{args.output}: {count_of(count, 'embedding~')} of {width} values; {len(skipped):,} of "
              f"{count_of(len(photos), 'photo~')} skipped")
        if skipped:
            with atomic_write(listed, "w") as file:
                file.writelines(f"{photo}\t{reason}\n" for photo, reason in skipped.items())
            print(f"{listed}: {summarize(list(skipped.items()))}")


def _version(photo):
    status = os.stat(photo) if os.path.exists(photo) else None
    return photo, status and (status.st_size, status.st_mtime_ns)


def _parse(argv):
    parser = script_parser(__doc__)
    parser.add_argument("photos", nargs="+", metavar="PHOTO|DIR", help="image files of any size, or folders")
    parser.add_argument("--output", type=path, required=True, metavar="FILE", help="file to write, .npz")
    parser.add_argument("--aligned", action=argparse.BooleanOptionalAction, default=False,
                        help="the images are aligned faces, 112x96 or 112x112; nothing is detected")
    parser.add_argument("--flip", choices=FLIP, default="concatenate",
                        help="what to do with the embedding of the flipped face")
    parser.add_argument("--all-faces", action="store_true", help="embed all faces of a photo; each gets a row")
    parser.add_argument("--workers", type=at_least(0), metavar="N",
                        help="processes that detect faces (default: one per core; 0 on a GPU)")
    add_photo_options(parser)
    args = parser.parse_args(argv)
    if args.output.suffix != ".npz" or args.output.is_dir():
        parser.error(f"--output {args.output} is not the name of a .npz file")
    return args


if __name__ == "__main__":
    sys.exit(main())
