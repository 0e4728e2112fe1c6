"""Embed the face in each photo, or in each image of a folder, and write embeddings and landmarks to one .npz file.

    python tools/embed.py PHOTO-or-FOLDER... --model FILE --output faces.npz

The file holds one row per photo, or per face with --all-faces:

    names        path of the photo: as it was given, or the folder that was given and the path in it
    embeddings   float32 (N, 1024), or (N, 512) with --flip none or sum; not normalized
    boxes, scores, landmarks    float32 (N, 4), (N,), (N, 5, 2), in pixels of the photo
    chosen, faces               int64 (N,): which of how many detected faces it is, by decreasing score from 0
    model        SHA-256 of the network's weights

With --aligned, it has only names, embeddings and model. Photos without a face and unreadable ones are listed with the
reason in NAME.skipped.txt. The same command continues a run that was killed.
"""
import os
import sys
from argparse import BooleanOptionalAction
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
from joblib import cpu_count

from faces import files
from faces.files import InputError, at_least, atomic_write, command, count_of, path, script_parser
from faces.images import summarize
from faces.rows import Rows
from faces.verification.embed import FLIP, optimized_copy
from mtcnn.detector import list_photos
from mtcnn.processes import in_processes
from tools.embedder import Embedder, add_photo_options, crop_faces, find_faces, make_embedder

PART = 64      # photos at a time; a killed run repeats up to AHEAD of these per process
# What a Face has besides its crop
FACE = [("boxes", "f4", 4), ("scores", "f4"), ("landmarks", "f4", (5, 2)), ("chosen", "i8"), ("faces", "i8")]


def find(photos, detector, select, all_faces, indices):
    """Return (indices, what find_faces() returns for these photos); without a detector, the photos are aligned."""
    some = [photos[i] for i in indices]
    return indices, find_faces(some, detector, select, all_faces) if detector else crop_faces(some)


def embed_photos(embedder: Embedder, photos: list[str], rows: Rows, args) -> dict:
    """Append the rows of all photos that have none yet; return {photo: reason} for those that can't be used."""
    listed = rows.read()["photo"].tolist()
    complete = listed.index(listed[-1]) if listed else 0    # the last photo may have more faces
    rows.truncate(complete)
    done, skipped = set(listed[:complete]), {}
    missing = [i for i in range(len(photos)) if i not in done]
    parts, workers = [missing[i:i + PART] for i in range(0, len(missing), PART)], args.workers
    if workers is None:
        workers = cpu_count() if embedder.device.type == "cpu" else 0
    work = partial(find, photos, None if args.aligned else embedder.detector, args.select, args.all_faces)
    results = in_processes(work, parts, workers, embedder.device) if min(workers, len(parts)) > 1 else map(work, parts)
    with files.progress_bar(desc="embedding", total=len(photos), initial=len(done), unit=" photos") as bar:
        for indices, found in results:
            skipped |= {photos[i]: reason for i, reason in zip(indices, found) if isinstance(reason, str)}
            faces = [(i, face) for i, some in zip(indices, found) if not isinstance(some, str) for face in some]
            if faces:
                embeddings = embedder.embed(np.stack([face.crop for _, face in faces]))
                rows.append(np.array([(i, embedding, *(() if args.aligned else face[1:]))
                                      for (i, face), embedding in zip(faces, embeddings)], rows.kind))
            bar.update(len(indices))
    return skipped


@command
def main(argv=None):
    args = _parse(argv)
    photos = list_photos(args.photos)
    embedder = make_embedder(args, args.flip)
    embedder.net = optimized_copy(embedder.net, embedder.device, images=len(photos))    # not anew for each part
    width = embedder.net.fc5.out_features * (2 if args.flip == "concatenate" else 1)
    versions = [(photo, os.path.exists(photo) and (os.path.getsize(photo), os.path.getmtime(photo)))
                for photo in photos]
    depends = (embedder.loaded["fingerprint"], args.select, args.flip, args.aligned, args.all_faces, args.min_face_size,
               versions)
    with files.locked(args.output.with_name(f".{args.output.name}.lock"), f"writing {args.output}", wait=False):
        kind = [("photo", "i8"), ("embeddings", "f4", width), *([] if args.aligned else FACE)]
        rows = Rows(args.output, depends, np.dtype(kind))
        skipped = embed_photos(embedder, photos, rows, args)
        found = rows.read()
        listed = args.output.with_suffix(".skipped.txt")
        listed.unlink(missing_ok=True)
        if not len(found):
            raise InputError(f"no face that can be used in {count_of(len(photos), 'photo~')} "
                             f"({summarize(list(skipped.items()))}).")
        with atomic_write(args.output) as file:    # takes little memory, because the rows are mapped
            np.savez(file, names=np.array([photos[i] for i in found["photo"]]), model=embedder.loaded["fingerprint"],
                     **{name: found[name] for name, *_ in kind[1:]})
        print(f"{args.output}: {count_of(len(found), 'embedding~')} of {width} values; {len(skipped):,} of "
              f"{count_of(len(photos), 'photo~')} skipped")
        if skipped:
            with atomic_write(listed, "w") as file:
                file.writelines(f"{photo}\t{reason}\n" for photo, reason in skipped.items())
            print(f"{listed}: {summarize(list(skipped.items()))}")
        del found    # which maps the file
        rows.delete()


def _parse(argv):
    parser = script_parser(__doc__)
    option = parser.add_argument
    option("photos", nargs="+", metavar="PHOTO|DIR", help="image files of any size, or folders")
    option("--output", type=path, required=True, metavar="FILE", help="file to write, .npz")
    option("--aligned", action=BooleanOptionalAction, default=False, help="the images are faces, 112x96 or 112x112")
    option("--flip", choices=FLIP, default="concatenate", help="what to do with the flipped face's embedding")
    option("--all-faces", action="store_true", help="embed all faces of a photo; each gets a row")
    option("--workers", type=at_least(0), metavar="N", help="detecting processes (default: one per core; 0 on a GPU)")
    add_photo_options(parser)
    args = parser.parse_args(argv)
    if args.output.suffix != ".npz" or args.output.is_dir():
        parser.error(f"--output {args.output} is not the name of a .npz file")
    return args


if __name__ == "__main__":
    sys.exit(main())
