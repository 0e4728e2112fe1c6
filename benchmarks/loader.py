"""Time the gathering of training batches from the aligned-face cache against PyTorch's DataLoader.

    python benchmarks/loader.py                        random faces, in memory
    python benchmarks/loader.py --faces 400000         13 GB: more than fits into the memory of many machines

Ours are the threads of faces.data.batches. The peer is a DataLoader with as many worker processes, which gather whole
batches of the same rows from the same memory map. Each batch must be the same. Nothing is flipped, copied to a device
or turned into network input, which would cost both the same.
"""
import sys
import tempfile
from collections import deque
from multiprocessing import get_all_start_methods
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import torch
from torch.utils.data import DataLoader

from benchmarks.turns import in_turns, report
from faces.align import HEIGHT, WIDTH
from faces.data.batches import THREADS, Batches, order
from faces.data.cache import AlignedFaces
from faces.files import InputError, at_least, command, script_parser


class RandomFaces(AlignedFaces):
    """Faces of random pixels and identities, in a file that is written to `path`."""

    __getitem__ = AlignedFaces.batch    # a whole batch, for a DataLoader

    def __init__(self, path, count, classes=1000):
        rng = np.random.default_rng(0)
        with open(path, "wb") as file:
            for start in range(0, count, 1000):
                file.write(rng.bytes(min(1000, count - start) * HEIGHT * WIDTH * 3))
        self.images = np.memmap(path, np.uint8, "r", shape=(count, HEIGHT, WIDTH, 3))
        self.rows, self.labels, self.classes = np.arange(count), rng.integers(classes, size=count), classes


def compare(faces, batch_size, steps, turns):
    """Go through all batches in turns; return the times, as in_turns() does."""
    ours = Batches(faces, batch_size, steps, torch.device("cpu"), flip=False)
    context = "fork" if "fork" in get_all_start_methods() else None    # otherwise, each would get a copy of the set
    batches = [rows for _, rows in order(len(faces), batch_size, steps)]
    loader = DataLoader(faces, batch_size=None, sampler=batches, num_workers=THREADS, prefetch_factor=4,
                        persistent_workers=True, multiprocessing_context=context)
    with patch("faces.data.batches.to_input", lambda images, flip=None: images):
        for one, two in zip(ours, loader, strict=True):    # also brings the file into memory
            if not all(map(torch.equal, one, two)):
                raise InputError("the two loaders delivered different batches; please report this as a bug.")
        return in_turns({f"ours, {THREADS} threads": lambda turn: deque(ours, 0),
                         f"DataLoader, {THREADS} processes": lambda turn: deque(loader, 0)}, turns)


@command
def main(argv=None):
    parser = script_parser(__doc__)
    parser.add_argument("--faces", type=at_least(1), default=18374, help="faces of 32 KB each")
    parser.add_argument("--batch-size", type=at_least(1), default=512, metavar="N", help="faces")
    parser.add_argument("--steps", type=at_least(1), default=200, help="batches per turn")
    parser.add_argument("--turns", type=at_least(1), default=5, help="turns of each")
    args = parser.parse_args(argv)
    if args.batch_size > args.faces:
        parser.error("--batch-size must be at most --faces")
    with tempfile.TemporaryDirectory() as folder:
        faces = RandomFaces(Path(folder) / "faces.u8", args.faces)
        report(compare(faces, args.batch_size, args.steps, args.turns), args.steps * args.batch_size, "faces")


if __name__ == "__main__":
    sys.exit(main())
