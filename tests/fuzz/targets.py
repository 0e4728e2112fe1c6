"""What is fuzzed: for each reader, how to write a valid input with some randomness, and how to read it.

A target either returns or raises one of ALLOWED; anything else is a defect. Each input is a dict of files, from names
to bytes, which mutate() damages.
"""
import io
import json
import pickle
import random
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save as save_safetensors

from cosFace.net import sphere20a
from faces.data.cache import _read_failed, _read_journal
from faces.data.casia import read_casia
from faces.data.recordio import Records
from faces.data.sources import Zip
from faces.files import InputError
from faces.images import UnreadableImage, read_image
from faces.landmarks import read_labels, read_landmarks
from faces.training import checkpoint
from faces.training.log import _read_epochs
from faces.verification.binset import read_bin
from faces.verification.pairs import read_pairs
from faces.verification.threshold import load_threshold
from faces.verification.weights import load_weights
from mtcnn.journal import Journal
from tools.compare import read_scores
from tools.embed import Parts
from tools.tsne import read_points

ALLOWED = InputError, UnreadableImage
LOADED = {"fingerprint": "f", "threshold": None}    # of load_net()
TOKENS = [b"nan", b"-inf", b"1e999", b"-1", b"9" * 5000, b"0x1", b"\0", b"\x1b[2J", b"../", b"\t", b"\n", b" ", b"",
          b"\xff\xfe", b"\xef\xbb\xbf", b"\xe2\x80\xae", b"\xff", b"[", b"{", b"]", b'"', b"null", b"true", b"[]",
          b"{}", b"\\ud800", b"[" * 100_000, "²".encode(), "٣".encode(), b"\xc2\x85", b"1_0", b"\\", b"/", b"."]
INTEGERS = [0, 1, 2, 7, 127, 128, 255, 256, 32767, 32768, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1]


def mutate(files, rng):
    """Damage one of the files in place, in up to four ways."""
    name = rng.choice([name for name in files if files[name]] or list(files))
    data = bytearray(files[name])
    for _ in range(rng.choice((1, 1, 2, 4))):
        start = rng.randrange(len(data) + 1)
        end = min(len(data), start + rng.choice((1, 1, 2, 4, 8, 50, 1000)))
        way = rng.randrange(7)
        if way == 0:
            data[start:start + 1] = bytes([rng.randrange(256)])
        elif way == 1:
            del data[start:end]
        elif way == 2:
            data[start:start] = data[start:end] * rng.choice((1, 2, 50))
        elif way == 3:
            data[start:rng.choice((start, end))] = rng.choice(TOKENS)
        elif way == 4:
            size, order = rng.choice((1, 2, 4, 8)), rng.choice(("big", "little"))
            data[start:start + size] = (rng.choice(INTEGERS) % 2**(8 * size)).to_bytes(size, order)
        elif way == 5:
            del data[start:]
        else:
            _replace_number(data, start, rng)
    files[name] = bytes(data)


def _replace_number(data, start, rng):
    """Replace the first field of text after `start`."""
    end = start
    while end < len(data) and chr(data[end]) in "0123456789.-+eE":
        end += 1
    data[start:end] = rng.choice(TOKENS[:6] + [str(rng.choice(INTEGERS)).encode()])


def text(*lines):
    return "".join(line + "\n" for line in lines).encode()


def landmark_list(rng):
    template = (30, 52, 65, 52, 48, 72, 34, 92, 65, 92)
    rows = [f"p{i % 4}/{i}.jpg\t{i % 4}\t" + "\t".join(f"{v + rng.random():.2f}" for v in template) for i in range(12)]
    return {"list.txt": text(*rows)}


def read_lists(folder):
    for read in (lambda path: read_landmarks(path, True), lambda path: read_landmarks(path, False), read_labels):
        try:
            paths, labels, *points = read(folder / "list.txt")
        except InputError:
            continue
        assert len(paths) == len(labels if labels is not None else points[0]) > 0
        assert not points or np.isfinite(points[0]).all()


def pairs_file(rng):
    names = {f"lfw/{name}/{name}_{i:04d}.jpg": b"" for name in "AB" for i in (1, 2)}
    pairs = ["A\t1\t2", "A\t1\tB\t1", "B\t1\t2", "A\t2\tB\t2"]
    return {**names, "pairs.txt": text("2\t1", *pairs), "pairsDevTrain.txt": text("1", *pairs[:2]),
            "pairsDevTest.txt": text("1", *pairs[:2])}


def check_pairs(folder):
    for view in (1, 2):
        try:
            pairs = read_pairs(folder / "lfw", view=view)
        except InputError:
            continue
        assert len(pairs.pairs) == len(pairs.same) == len(pairs.folds) and pairs.pairs.max() < len(pairs.paths)


def image_file(rng, format=None):
    format = format or rng.choice(("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF", "JPEG2000"))
    mode = rng.choice(("L", "RGB"))
    size = rng.choice((1, 8, 33)), rng.choice((1, 8, 33))
    image = Image.frombytes("L", size, rng.randbytes(size[0] * size[1])).convert(mode)
    options = {"JPEG": {"progressive": rng.random() < 0.5}, "WEBP": {"lossless": rng.random() < 0.5},
               "TIFF": {"compression": rng.choice((None, "tiff_lzw", "jpeg"))}}.get(format, {})
    if rng.random() < 0.3:
        options["exif"] = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    file = io.BytesIO()
    try:
        image.save(file, format, **options)
    except (OSError, ValueError, KeyError):    # a format that this Pillow lacks
        image.save(file, "PNG")
    return {"image": file.getvalue()}


def check_image(folder):
    _check_pixels(read_image(folder / "image"))


def check_png(folder):
    """Read a PNG with the checksums put right, so that damage reaches the decoder."""
    data = bytearray((folder / "image").read_bytes())
    position = 8
    while position + 12 <= len(data):
        end = position + 8 + int.from_bytes(data[position:position + 4], "big")
        if end + 4 > len(data):
            break
        data[end:end + 4] = zlib.crc32(data[position + 4:end]).to_bytes(4, "big")
        position = end + 4
    _check_pixels(read_image(bytes(data)))


def _check_pixels(image):
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size


def record_set(rng):
    rec, idx = b"", []
    for key in range(5):
        idx.append(f"{key}\t{len(rec)}")
        data = struct.pack("<IfQQff", 2, 0, 0, 0, 5, 5) if key == 0 else (
            struct.pack("<IfQQ", 0, key % 2, key, 0) + image_file(rng)["image"])
        rec += struct.pack("<II", 0xCED7230A, len(data)) + data + b"\0" * (-len(data) % 4)
    return {"train.rec": rec, "train.idx": text(*idx), "property": b"2,112,112\n"}


def check_records(folder):
    records = Records(folder)
    assert len(records.names()) == len(records.labels) and records.labels.min() >= 0
    _open_all(records)


def _open_all(source):
    for name in source.names():
        try:
            _check_pixels(read_image(source.open(name)))
        except UnreadableImage:
            pass


def bin_set(rng):
    images = [image_file(rng)["image"] for _ in range(20)]
    if rng.random() < 0.5:
        images = [np.frombuffer(image, np.uint8) for image in images]
    same = [i % 2 == 0 for i in range(10)]
    value = (images, np.array(same) if rng.random() < 0.3 else same)
    return {"set.bin": pickle.dumps(value, rng.choice((0, 2, 3, 4)))}


def check_bin(folder):
    pairs, images = read_bin(folder / "set.bin")
    assert len(pairs.paths) == len(images) and pairs.pairs.max() < len(images)


def zip_of_faces(rng):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for i in range(4):
            name = {"name": f"set/p{i % 2}/{i}.jpg".encode()}
            if rng.random() < 0.2:
                mutate(name, rng)
            name = name["name"].decode("latin-1")[:60000]
            archive.writestr(zipfile.ZipInfo(name), image_file(rng)["image"], rng.choice((0, 8)))
        archive.writestr("pairs.txt", "2\t1\n")
    return {"faces.zip": file.getvalue()}


def check_zip(folder):
    source = Zip(folder / "faces.zip")
    source.versions(source.names())
    _open_all(source)
    read_casia(folder / "faces.zip")


class Nets:
    net = None    # made when it is first needed


def weights_file(rng):
    Nets.net = Nets.net or sphere20a()
    state = {name: torch.zeros(()).expand(value.shape) for name, value in Nets.net.state_dict().items()}
    if rng.random() < 0.3:
        return {"net.pt": save_safetensors({name: value.flatten()[:1].clone() for name, value in state.items()},
                                           {"colour_order": "RGB"})}
    file = io.BytesIO()
    torch.save({"state_dict": state, "epoch": 3}, file, _use_new_zipfile_serialization=rng.random() < 0.5)
    return {"net.pt": file.getvalue()}


def checkpoint_file(rng):
    file = io.BytesIO()
    torch.save({"format": checkpoint.FORMAT, "method": "CosFace", "net": "faceNet", "step": 3, "epoch": {"loss": 1.0},
                "weights": {"a": torch.ones(2)}, "head": {"weight": torch.ones(2, 3)}, "classes": 2, "faces": "hash",
                "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{}]},
                "settings": {"precision": "float32", "lr": 0.1}}, file)
    return {"checkpoint.pt": file.getvalue()}


def check_checkpoint(folder):
    state = checkpoint.load(folder / "checkpoint.pt")
    assert {"method", "step", "weights"} <= state.keys()


def state_files(rng):
    counts = {"accepted": 1, "impostor": 5, "rejected": 2, "genuine": 6}
    return {
        "cache.json": json.dumps({"faces": 4, "failed": [[2, "no pixels"]]}).encode(),
        "journal.jsonl": text("[0, 1024]", "[1024, 2048]"),
        "m.threshold.json": json.dumps({"format": "faces-threshold-1", "fingerprint": "f", "value": 0.3, **counts,
                                        "source": "lfw"}).encode(),
        "results.json": json.dumps({"settings": {"mirror": "concatenate", "subtract_mean": False, "model": "m",
                                                 "weights": {"fingerprint": "f"}}}).encode(),
        "scores.tsv": text("left\tright\tsame\tfold\tsimilarity", "a\tb\t1\t0\t0.9", "a\tc\t0\t0\t0.1"),
        "epochs.jsonl": text('{"epoch": 1.0, "step": 3, "loss": 2.5, "lfw": 0.9}'),
        "tsne.tsv": text("panel\tidentity\tx\ty", *(f"{p}\t{i}\t1.5\t2.5" for p in "ab" for i in (1, 1, 2))),
        ".faces.npz.parts/settings.json": json.dumps({"photos": "x", "part": 64}).encode(),
        ".list.txt.partial": text('{"images": 1}', "[0, [9, 9], 0, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]]",
                                  "[1, [9, 9], -1, null]")}


def check_state(folder):
    for read in (lambda: _read_failed(folder, 4), lambda: _read_journal(folder), lambda: read_scores(folder),
                 lambda: load_threshold(folder / "m", LOADED), lambda: read_points(folder / "tsne.tsv"),
                 lambda: check_journal(folder), lambda: _read_epochs(folder / "epochs.jsonl"),
                 lambda: Parts(folder / "faces.npz", {"photos": "x"}, 4, 4)):
        try:
            read()
        except InputError:
            pass


def check_journal(folder):
    journal = Journal(folder / "list.txt", {"images": 1}, 3)
    for find in journal.finds():
        assert 0 <= find.index < 3
    journal.file.close()


def part_file(rng):
    file = io.BytesIO()
    np.savez(file, index=np.arange(2), skipped=np.array([2, 3]), reasons=np.array(["no face"] * 2),
             embeddings=np.ones((2, 4), "f4"))
    return {".faces.npz.parts/000000000.npz": file.getvalue(), ".faces.npz.parts/settings.json": b'{"photos": "x"}'}


def check_part(folder):
    part = Parts(folder / "faces.npz", {"photos": "x"}, 4, 4).read(0)
    if part is None:
        raise InputError("made again")
    assert len(part["index"]) == len(part["embeddings"]) == 2


TARGETS = {    # name: (write a valid input, read it)
    "lists": (landmark_list, read_lists), "pairs": (pairs_file, check_pairs), "images": (image_file, check_image),
    "png": (lambda rng: image_file(rng, "PNG"), check_png), "records": (record_set, check_records),
    "bin": (bin_set, check_bin), "zip": (zip_of_faces, check_zip), "checkpoint": (checkpoint_file, check_checkpoint),
    "weights": (weights_file, lambda folder: load_weights(Nets.net, folder / "net.pt")),
    "state": (state_files, check_state), "parts": (part_file, check_part)}

MAY_BE_REFUSED = "zip", "weights"    # even as they are written


def attempt(target, number, folder):
    """Write the input with a number into an empty folder; return a function that reads it, and whether it may refuse.

    Args:
        target: name of the target.
        number: any int; equal numbers make equal inputs.
    """
    rng = random.Random(f"{target} {number}")
    write, read = TARGETS[target]
    files = write(rng)
    is_whole = rng.random() < 0.05
    if not is_whole:
        mutate(files, rng)
    for name, data in files.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return lambda: read(Path(folder)), not is_whole or target in MAY_BE_REFUSED
