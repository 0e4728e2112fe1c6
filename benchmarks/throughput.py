"""Measure how many faces per second a device trains, and how much memory of a GPU that takes, by batch size.

    python benchmarks/throughput.py                                    batches of 64, 128, 512 and 1024 faces
    python benchmarks/throughput.py --compile                          the same, and then again with torch.compile
    python benchmarks/throughput.py --net sphere20a --precision float32 --batch-size 64

This is the step of casia_train.py, without its log, checkpoints and evaluation, on random faces that come from a file
through the threads of faces.data.batches. In turns with it, the same number of steps runs on one batch that stays on
the device; if that is faster, the loader is the limit. There is no peer; training_step.py compares with plain PyTorch.
"""
import argparse
import sys
import tempfile
from itertools import islice
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch

from benchmarks.loader import RandomFaces
from benchmarks.training_step import HEADS, add_options, make, our_loop
from benchmarks.turns import in_turns, machine
from faces.data.batches import Batches
from faces.device import pick_device, pick_dtype, tune_cpu
from faces.files import at_least, command, script_parser

FACES, TURNS = 18374, 3


def measure(args, faces, batch_size, device, dtype, compile):
    """Return the median seconds of args.steps steps, with the loader and without, and the peak of GPU memory in GB."""
    loss_of, update = our_loop(*make(args, device), HEADS[args.method][1], device, dtype, compile)
    batches = iter(Batches(faces, batch_size, args.warm_up + TURNS * args.steps + 1, device))

    def run(batches):
        for x, labels in batches:
            update(loss_of(x, labels))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    run(islice(batches, args.warm_up))    # kernels are chosen and compiled
    resident = [next(batches)] * args.steps
    seconds = in_turns({"with the loader": lambda turn: run(islice(batches, args.steps)),
                        "without": lambda turn: run(resident)}, TURNS, device)
    memory = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
    return *map(median, seconds.values()), memory


@command
def main(argv=None):
    parser = script_parser(__doc__)
    add_options(parser)
    parser.add_argument("--batch-size", type=at_least(2), nargs="+", default=[64, 128, 512, 1024], metavar="N",
                        help="faces per step, one size or several")
    parser.add_argument("--steps", type=at_least(1), default=40, help="steps per turn, three turns of each kind")
    parser.add_argument("--warm-up", type=at_least(0), default=15, metavar="N", help="steps before the clock starts")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False,
                        help="measure the compiled network as well")
    args = parser.parse_args(argv)
    if max(args.batch_size) > FACES:
        parser.error(f"--batch-size must be at most {FACES}")
    device = pick_device(args.device)
    tune_cpu(device)
    torch.backends.cudnn.benchmark = True
    dtype = pick_dtype(args.precision, device)
    print(f"{args.method}, {args.net}, {args.identities:,} identities, {str(dtype).removeprefix('torch.')}, "
          f"{machine(device)}\n{'faces per step':>24}{'faces/s':>12}{'without the loader':>20}"
          + ("  peak memory" if device.type == "cuda" else ""))
    with tempfile.TemporaryDirectory() as folder:
        faces = RandomFaces(Path(folder) / "faces.u8", FACES, args.identities)
        for compile in (False, True) if args.compile else (False,):
            for size in args.batch_size:
                loaded, resident, memory = measure(args, faces, size, device, dtype, compile)
                torch.compiler.reset()
                print(f"{'compiled' if compile else '':10}{size:14}{size * args.steps / loaded:12,.1f}"
                      f"{size * args.steps / resident:20,.1f}" + (f"{memory:10.2f} GB" if memory else ""), flush=True)


if __name__ == "__main__":
    sys.exit(main())
