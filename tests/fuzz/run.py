"""Feed damaged files to the readers of files from elsewhere for as long as you like, and keep those that do harm.

    python tests/fuzz/run.py --seconds 3600
    python tests/fuzz/run.py --repeat runs/fuzz/images-123        # read a finding again

It is a finding if a reader runs code from the file, ends the interpreter, raises anything but an error that names the
file, or needs over 5 s of processor time or 1 GB of memory. Findings are folders in runs/fuzz.
"""
import functools
import io
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch
from PIL import Image
from safetensors.torch import save as save_safetensors

from cosFace.net import sphere20a
from faces.data.casia import list_casia
from faces.data.sources import open_source
from faces.files import RUNS, InputError, at_least, command, path, script_parser
from faces.images import UnreadableImage, read_image
from faces.landmarks import read_labels, read_landmarks
from faces.verification.binset import read_bin
from faces.verification.pairs import read_pairs
from faces.verification.weights import load_weights

SECONDS, MEMORY = 5, 10**9    # for one input
ROUND = 100                   # inputs per process
OUTPUT = RUNS / "fuzz"
TOKENS = (b"nan", b"-inf", b"1e999", b"-1", b"9" * 5000, b"\0", b"../", b"/", b"\t", b"\n", b" ", b"", b"\xff\xfe",
          b"\xff", b"\xef\xbb\xbf", b"[" * 100_000, "²".encode(), b"\xc2\x85", b"cos\nsystem\n(S'kill -9 $PPID'\ntR.")
INTEGERS = (0, 1, 7, 127, 128, 255, 32767, 32768, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)


# Targets: a function that returns valid files, {name: bytes}, and one that reads them from a folder.

def images(rng, formats=("JPEG", "JPEG", "JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF", "JPEG2000")):
    size = rng.choice((1, 8, 33)), rng.choice((1, 8, 33))
    image, format = Image.frombytes("L", size, rng.randbytes(size[0] * size[1])), rng.choice(formats)
    options = {"JPEG": {"progressive": rng.random() < 0.5, "restart_marker_blocks": rng.choice((0, 1))},
               "TIFF": {"compression": rng.choice((None, "tiff_lzw", "jpeg"))}}.get(format, {})
    if rng.random() < 0.3:
        options["exif"] = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    file = io.BytesIO()
    try:
        image.convert(rng.choice(("L", "RGB"))).save(file, format, **options)
    except (OSError, ValueError, KeyError):    # a format that this Pillow lacks
        image.save(file, "PNG")
    return {"image": file.getvalue()}


def lists(rng):
    points = [f"{v + rng.random():.2f}" for v in (30, 52, 65, 52, 48, 72, 34, 92, 65, 92)]
    rows = ["\t ".join((f"A/A_{i:04d}.jpg", str(i % 4), *points)) for i in range(12)]
    text = lambda rows: "".join(f"{row}\n" for row in rows).encode()
    pairs = text(["2\t1", "A\t1\t2", "A\t1\tB\t1", "B\t1\t2", "A\t2\tB\t2"])
    return {"list.txt": text(rows), "labels.txt": text(row.rsplit("\t", 10)[0] for row in rows), "pairs.txt": pairs,
            **{f"{name}/{name}_{i:04d}.jpg": b"" for name in "AB" for i in (1, 2)}}


def read_lists(folder):
    readers = (lambda: read_landmarks(folder / "list.txt", True, folder), lambda: read_labels(folder / "labels.txt"),
               lambda: read_landmarks(folder / "list.txt", False), lambda: read_pairs(open_source(folder)))
    for read in readers:
        try:
            read()
        except InputError as error:
            assert str(folder) in str(error)


def zips(rng):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for i in range(4):
            archive.writestr(f"set/p{i % 2}/{i}.jpg", images(rng)["image"], rng.choice((0, 8)))
    return {"faces.zip": file.getvalue()}


def records(rng):
    rec, idx = b"", []
    for key in range(5):
        idx.append(f"{key}\t{len(rec)}\n")
        data = struct.pack("<IfQQff", 2, 0, 0, 0, 5, 5) if key == 0 else (
            struct.pack("<IfQQ", 0, key % 2, key, 0) + images(rng)["image"])
        rec += struct.pack("<II", 0xCED7230A, len(data)) + data + b"\0" * (-len(data) % 4)
    return {"train.rec": rec, "train.idx": "".join(idx).encode(), "property": b"2,112,112\n"}


def read_set(root):
    listing = list_casia(root)
    for name in listing.paths:
        try:
            read_image(listing.source.open(name))
        except UnreadableImage:
            pass


def bins(rng):
    value = [images(rng)["image"] for _ in range(20)], [i % 2 == 0 for i in range(10)]
    return {"set.bin": pickle.dumps(value, rng.choice((0, 2, 3, 4)))}


@functools.cache
def net():
    return sphere20a()


def weights(rng):
    state = {name: torch.zeros(()).expand(value.shape) for name, value in net().state_dict().items()}
    if rng.random() < 0.3:
        return {"net.pt": save_safetensors({name: value.flatten()[:1].clone() for name, value in state.items()})}
    file = io.BytesIO()
    torch.save({"state_dict": state, "epoch": 3}, file, _use_new_zipfile_serialization=rng.random() < 0.5)
    return {"net.pt": file.getvalue()}


TARGETS = {
    "images": (images, lambda folder: read_image(folder / "image")), "lists": (lists, read_lists),
    "zips": (zips, lambda folder: read_set(folder / "faces.zip")), "records": (records, read_set),
    "bins": (bins, lambda folder: read_bin(folder / "set.bin")),
    "weights": (weights, lambda folder: load_weights(net(), folder / "net.pt"))}


def write(target: str, number: int, folder: Path):
    """Write the damaged input with a number, which determines it, into a folder."""
    rng = random.Random(f"{target} {number}")
    files = TARGETS[target][0](rng)
    name = rng.choice([name for name in files if files[name]])
    data = bytearray(files[name])
    for _ in range(rng.choice((0, 1, 1, 2, 4))):
        start = rng.randrange(len(data) + 1)
        end = min(len(data), start + rng.choice((1, 2, 4, 8, 50, 1000)))
        size, order = rng.choice((1, 2, 4, 8)), rng.choice(("big", "little"))
        number = (rng.choice(INTEGERS) % 2**(8 * size)).to_bytes(size, order)
        data[start:end] = rng.choice((b"", bytes(end - start), data[start:end] * 50, rng.choice(TOKENS),
                                      number + data[start + size:end], rng.randbytes(1) + data[start + 1:end]))
        if rng.random() < 0.2:
            del data[start:]
    for other, content in {**files, name: bytes(data)}.items():
        (folder / other).parent.mkdir(parents=True, exist_ok=True)
        (folder / other).write_bytes(content)


def read(target: str, folder: Path) -> str | None:
    """Read an input in this process; return what is wrong with that, or None."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)    # the signal ends the process
    try:
        TARGETS[target][1](folder)
    except UnreadableImage:    # whose callers name the file
        pass
    except InputError as error:
        return None if str(folder) in str(error) and "\n" not in str(error) else f"bad message: {error}"
    except BaseException:
        return traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)


def run_round(target: str, numbers: range, folder: Path) -> dict[int, str]:
    """Read inputs in a process of its own, until something is wrong with one; return {its number: what}."""
    report, process = folder / "report", os.fork()
    if process == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        torch.set_num_threads(1)
        try:
            for number in numbers:
                report.write_text(f"{number} ends the process")
                here = Path(tempfile.mkdtemp(dir=folder))
                write(target, number, here)
                if problem := read(target, here):
                    report.write_text(f"{number} {problem}")
                    os._exit(1)
                shutil.rmtree(here)
            os._exit(0)
        finally:
            report.write_text(f"0 {traceback.format_exc()}")
            os._exit(1)
    if os.waitpid(process, 0)[1] == 0:
        return {}
    number, _, problem = report.read_text().partition(" ")
    return {int(number): problem}


@command
def main(argv=None):
    parser = script_parser(__doc__)
    parser.add_argument("--seconds", type=at_least(0, float), default=60, help="how long to go on")
    parser.add_argument("--repeat", type=path, metavar="DIR", help="read one finding again, and show what it raises")
    args = parser.parse_args(argv)
    if args.repeat:
        return TARGETS[args.repeat.name.partition("-")[0]][1](args.repeat)
    counts, first, end = Counter(), random.randrange(10**12), time.monotonic() + args.seconds
    print(f"from input {first} on; findings go to {OUTPUT}", flush=True)
    while not counts or time.monotonic() < end:
        for target in TARGETS:
            with tempfile.TemporaryDirectory() as folder:
                found = run_round(target, range(first, first + ROUND), Path(folder))
            counts[target] += ROUND
            for number, problem in found.items():
                write(target, number, OUTPUT / f"{target}-{number}")
                (OUTPUT / f"{target}-{number}/report.txt").write_text(problem)
                print(f"{target}-{number}: {problem.strip().splitlines()[-1]}", flush=True)
                counts["findings"] += 1
        first += ROUND
    print(", ".join(f"{name} {count:,}" for name, count in counts.items()))
    return int(counts["findings"] > 0)


if __name__ == "__main__":
    sys.exit(main())
