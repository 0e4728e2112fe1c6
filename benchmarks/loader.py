"""Measure how fast training batches are gathered from the aligned-face cache, ours against PyTorch's DataLoader.

    python benchmarks/loader.py                        on random faces, in memory
    python benchmarks/loader.py --faces 400000         more than fits in memory, from the disk

Ours are the threads of faces.data.batches; the peer is a DataLoader whose worker processes gather whole batches of the
same rows from the same memory map. Both first go through all batches untimed, and each batch must be the same. Then
they take turns; the clock starts with the first batch, so that starting processes does not count. Nothing is copied to
a device or augmented, which would cost both the same.
"""
import hashlib
import resource
import sys
import tempfile
import time
from multiprocessing import get_all_start_methods
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from faces.signals import end_quietly

end_quietly(__name__)    # Ctrl-C during the slow imports below prints no traceback
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from faces.align import HEIGHT, WIDTH
from faces.data.batches import Batches
from faces.data.cache import AlignedFaces
from faces.device import count_cpus, processor
from faces.files import InputError, command, script_parser


class Gathered(Batches):
    """Batches that stay on the CPU as they are gathered: uint8 (B, 112, 96, 3) and int64 (B,)."""

    def _on_device(self, images, labels, mirror, shifts):
        return images, labels


class Rows(Dataset):
    """The same batches for a DataLoader."""

    def __init__(self, faces, order):
        self.faces, self.order = faces, order

    def __len__(self):
        return len(self.order)

    def __getitem__(self, step):
        images, labels = self.faces.batch(self.order[step])
        return torch.from_numpy(images), torch.from_numpy(labels)


def make_faces(path, count):
    """Return AlignedFaces of random images, in a file that is written to `path`."""
    rng = np.random.default_rng(0)
    with open(path, "wb") as file:
        for start in range(0, count, 1000):
            file.write(rng.integers(0, 256, (min(1000, count - start), HEIGHT, WIDTH, 3), np.uint8).tobytes())
    images = np.memmap(path, np.uint8, "r", shape=(count, HEIGHT, WIDTH, 3))
    listing = SimpleNamespace(labels=np.arange(count) % 1000, paths=list(map(str, range(count))), points=None)
    return AlignedFaces(images, listing, np.arange(count))


def run(batches):
    """Go through batches; return (seconds from the first to the last, CPU seconds in all, with workers)."""
    cpu, times = cpu_seconds(), []
    for images, labels in batches:
        int(images[:, 0, 0, 0].long().sum()) + int(labels.sum())    # something of each face is used
        times.append(time.perf_counter())
    return times[-1] - times[0], cpu_seconds() - cpu


def digests(batches):
    """Return a hash of each batch."""
    return [hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).digest() for images, labels in batches]


def cpu_seconds():
    """Return the CPU time of this process and of its children that have ended."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)


@command
def main(argv=None):
    parser = script_parser(__doc__)
    parser.add_argument("--faces", type=int, default=18374, help="faces in the set, 32 KB each (default: 18374)")
    parser.add_argument("--batch-size", type=int, default=512, metavar="N", help="faces per batch (default: 512)")
    parser.add_argument("--steps", type=int, default=100, help="batches per round (default: 100)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="threads or processes (default: 2)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each (default: 3)")
    args = parser.parse_args(argv)
    enough = args.faces // args.batch_size if args.batch_size > 0 else 0
    if min(enough, args.steps - 1, args.workers, args.rounds) < 1:
        parser.error("all options must be at least 1, --steps at least 2, and --batch-size at most --faces")
    with tempfile.TemporaryDirectory() as folder:
        faces = make_faces(Path(folder) / "faces.u8", args.faces)
        ours = Gathered(faces, args.batch_size, args.steps, torch.device("cpu"), workers=args.workers)
        context = "fork" if "fork" in get_all_start_methods() else None    # otherwise, each would get a copy of the set
        loader = DataLoader(Rows(faces, list(ours.order)), batch_size=None, num_workers=args.workers, prefetch_factor=4,
                            multiprocessing_context=context)
        if digests(ours) != digests(loader):
            raise InputError("the two loaders delivered different batches; please report this as a bug.")
        results = {"ours": [], "DataLoader": []}
        for _ in range(args.rounds):
            for name, batches in (("ours", ours), ("DataLoader", loader)):
                results[name].append(run(batches))
    best = {name: min(seconds for seconds, _ in runs) for name, runs in results.items()}
    print(f"{args.workers} threads or processes on {count_cpus()} cores of {processor()}, torch {torch.__version__}")
    for name, runs in results.items():
        rate, cost = (args.steps - 1) * args.batch_size / best[name], min(cpu for _, cpu in runs) / args.steps
        print(f"{name:11}{rate:10,.0f} faces/s, {1000 * cost:.1f} ms of CPU time per batch of {args.batch_size}")
    print(f"ratio      {best['DataLoader'] / best['ours']:10.2f}")


if __name__ == "__main__":
    sys.exit(main())
