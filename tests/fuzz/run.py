"""Feed damaged files to the readers of files from elsewhere for as long as you like, and keep those that do harm.

    python tests/fuzz/run.py --seconds 3600
    python tests/fuzz/run.py --repeat runs/fuzz/images-123        # read a finding again

It is a finding if a reader runs code from the file, ends the interpreter, raises anything but an error that names the
file, or needs over 5 s of processor time or 1 GB of memory. Findings are folders in runs/fuzz.
"""
import contextlib
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
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch
from PIL import Image
from safetensors.torch import save as save_safetensors

from cosFace.net import NETS, sphere20a
from faces.data.casia import list_casia
from faces.data.sources import open_source
from faces.files import RUNS, InputError, at_least, command, path, script_parser
from faces.images import UnreadableImage, read_image
from faces.landmarks import read_labels, read_landmarks
from faces.verification.binset import read_bin
from faces.verification.pairs import read_pairs
from faces.verification.weights import load_net

SECONDS, MEMORY = 5, 10**9    # for one input
ROUND = 100                   # inputs per process
OUTPUT = RUNS / "fuzz"
TOKENS = (b"nan", b"-inf", b"1e999", b"-1", b"9" * 5000, b"\0", b"../", b"/", b"\t", b"\n", b"\xff\xfe", b"\xff",
          b"[" * 100_000, b"\xc2\x85", b"cos\nsystem\n(S'kill -9 $PPID'\ntR.")
INTEGERS = (0, 1, 7, 127, 128, 255, 32767, 32768, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)


# Targets: a function that returns valid files, {name: bytes}, and one that reads them from a folder.

def images(rng):
    size = rng.choice((1, 8, 33)), rng.choice((1, 8, 33))
    image = Image.frombytes("L", size, rng.randbytes(size[0] * size[1])).convert(rng.choice(("L", "RGB")))
    format = rng.choice(("JPEG", "JPEG", "JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF", "JPEG2000"))
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    with contextlib.suppress(OSError, ValueError, KeyError):    # a format that this Pillow lacks
        image.save(file, format, exif=exif, progressive=rng.random() < 0.5, restart_marker_blocks=rng.choice((0, 1)),
                   compression=rng.choice((None, "tiff_lzw", "jpeg")))
    return {"image": file.getvalue() or b"GIF89a"}


def lists(rng):
    points = [f"{v + rng.random():.2f}" for v in (30, 52, 65, 52, 48, 72, 34, 92, 65, 92)]
    rows = [(f"A/A_{i:04d}.jpg", str(i % 4), *points) for i in range(12)]
    text = lambda rows: "".join("\t ".join(row) + "\n" for row in rows).encode()
    return {"list.txt": text(rows), "labels.txt": text(row[:2] for row in rows),
            "pairs.txt": b"2\t1\nA\t1\t2\nA\t1\tB\t1\nB\t1\t2\nA\t2\tB\t2\n",
            **{f"{name}/{name}_{i:04d}.jpg": b"" for name in "AB" for i in (1, 2)}}


def read_lists(folder):
    read_landmarks(folder / "list.txt", True, folder)
    read_labels(folder / "labels.txt")
    read_pairs(open_source(folder))


def zips(rng):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for i in range(4):
            archive.writestr(f"set/p{i % 2}/{i}.jpg", images(rng)["image"], rng.choice((0, 8)))
    return {"faces.zip": file.getvalue()}


def records(rng):
    rec, idx = b"", ""
    for key in range(5):
        idx += f"{key}\t{len(rec)}\n"
        data = struct.pack("<IfQQ", 0, key % 2, key, 0) + images(rng)["image"] if key else struct.pack(
            "<IfQQff", 2, 0, 0, 0, 5, 5)
        rec += struct.pack("<II", 0xCED7230A, len(data)) + data + b"\0" * (-len(data) % 4)
    return {"train.rec": rec, "train.idx": idx.encode()}


def read_set(root):
    listing = list_casia(root)
    for name in listing.paths:
        with contextlib.suppress(UnreadableImage):
            read_image(listing.source.open(name))


def bins(rng):
    value = [images(rng)["image"] for _ in range(20)], [i % 2 == 0 for i in range(10)]
    return {"set.bin": pickle.dumps(value, rng.choice((0, 2, 3, 4)))}


STATE = {name: torch.zeros(()).expand(value.shape) for name, value in sphere20a().state_dict().items()}


def weights(rng):
    if rng.random() < 0.3:
        return {"net.pt": save_safetensors({name: value.flatten()[:1].clone() for name, value in STATE.items()})}
    file = io.BytesIO()
    torch.save({"state_dict": STATE, "epoch": 3}, file, _use_new_zipfile_serialization=rng.random() < 0.5)
    return {"net.pt": file.getvalue()}


CAFFE = {"net.caffemodel": b"\xa2\6\x16\n\7conv1_1:\x0b:\3\n\1\1*\4\0\0\0\0" * 50}    # each a layer of one number
TARGETS = {
    "caffe": (lambda _: CAFFE, lambda folder: load_net(folder / "net.caffemodel", NETS)),
    "images": (images, lambda folder: read_image(folder / "image")), "lists": (lists, read_lists),
    "zips": (zips, lambda folder: read_set(folder / "faces.zip")), "records": (records, read_set),
    "bins": (bins, lambda folder: read_bin(folder / "set.bin")),
    "weights": (weights, lambda folder: load_net(folder / "net.pt", NETS, "sphere20a"))}


def write(target: str, number: int, folder: Path):
    """Write the damaged input with a number, which determines it, into a folder."""
    rng = random.Random(f"{target} {number}")
    files = TARGETS[target][0](rng)
    name = rng.choice([name for name in files if files[name]])
    data = bytearray(files[name])
    for _ in range(rng.choice((0, 1, 1, 2, 4))):
        start = rng.randrange(len(data) + 1)
        end, size = start + rng.choice((1, 2, 4, 8, 50, 1000)), rng.choice((1, 2, 4, 8))
        integer = (rng.choice(INTEGERS) % 2**(8 * size)).to_bytes(size, rng.choice(("big", "little")))
        data[start:end] = rng.choice((b"", bytes(len(data[start:end])), data[start:end] * 50, rng.choice(TOKENS),
                                      integer + data[start + size:end], rng.randbytes(1) + data[start + 1:end]))
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


def run_round(target: str, folder: Path):
    """Read inputs in a process of its own, until something is wrong with one, which is left in the folder."""
    if process := os.fork():
        os.waitpid(process, 0)
        return
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        random.seed()
        for number in (random.randrange(10**12) for _ in range(ROUND)):
            here = folder / f"{target}-{number}"
            write(target, number, here)
            if problem := read(target, here):
                (here / "report.txt").write_text(problem)
                break
            shutil.rmtree(here)
    finally:
        os._exit(0)


@command
def main(argv=None):
    parser = script_parser(__doc__)
    parser.add_argument("--seconds", type=at_least(0, float), default=60, help="how long to go on")
    parser.add_argument("--repeat", type=path, metavar="DIR", help="read one finding again, and show what it raises")
    args = parser.parse_args(argv)
    if args.repeat:
        return TARGETS[args.repeat.name.partition("-")[0]][1](args.repeat)
    torch.set_num_threads(1)
    rounds, findings, end = 0, 0, time.monotonic() + args.seconds
    while rounds < len(TARGETS) or time.monotonic() < end:
        with tempfile.TemporaryDirectory() as folder:
            run_round([*TARGETS][rounds % len(TARGETS)], Path(folder))
            for found in Path(folder).iterdir():
                report = shutil.copytree(found, OUTPUT / found.name) / "report.txt"
                problem = report.read_text() if report.exists() else "ends the process"
                print(f"{report.parent}: {problem.strip().splitlines()[-1]}", flush=True)
                findings += 1
        rounds += 1
    print(f"up to {rounds * ROUND:,} inputs for {', '.join(TARGETS)}: {findings:,} findings")
    return int(findings > 0)


if __name__ == "__main__":
    sys.exit(main())
