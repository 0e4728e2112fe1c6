"""Measure how many faces per second training takes on a device, and how much of a GPU's memory.

    python benchmarks/throughput.py                                    the default recipe's step, on the best device
    python benchmarks/throughput.py --compile
    python benchmarks/throughput.py --net sphere20a --precision float32 --batch-size 64

The program runs the training step of casia_train.py, without its log, on random faces that come from a file through
the threads of faces.data.batches. It then runs the same number of steps on one batch that stays on the device, which
shows whether the loader is the limit. Warm-up steps, in which kernels are chosen and compiled, are not timed.

There is no peer here; benchmarks/training_step.py compares the step with plain PyTorch.
"""
import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from faces.signals import end_quietly

end_quietly(__name__)    # Ctrl-C during the slow imports below prints no traceback
import torch

import cosFace.net
import sphereFace.net
from benchmarks.loader import make_faces
from faces.data.batches import Batches
from faces.device import processor, wait_for
from faces.files import command, script_parser
from faces.training.optimizer import SGD, parameter_groups
from faces.training.run import PRECISION, Run
from faces.training.sharded_head import make_head

FACES, WARM_UP = 18374, 15
# The head of each method, and its margin parameter
HEADS = {"cosFace": (cosFace.net.CosFace, {"ramp": 1.0}), "sphereFace": (sphereFace.net.SphereFace, {"lam": 5.0})}


def parse_args(argv=None):
    parser = script_parser(__doc__)
    parser.add_argument("--method", choices=HEADS, default="cosFace", help="method to train (default: cosFace)")
    parser.add_argument("--net", choices=cosFace.net.NETS, default="faceNet", help="network (default: faceNet)")
    parser.add_argument("--identities", type=int, default=10572, help="class centers of the head (default: 10572)")
    parser.add_argument("--batch-size", type=int, default=512, metavar="N", help="faces per step (default: 512)")
    parser.add_argument("--steps", type=int, default=60, help="steps to time, at least 1 (default: 60)")
    parser.add_argument("--precision", choices=("auto", *PRECISION), default="auto",
                        help="precision of the network; auto picks it as in training (default: auto)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False,
                        help="compile the network with torch.compile")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    args = parser.parse_args(argv)
    if not 2 <= args.batch_size <= FACES or args.steps < 1 or args.identities < 2:
        parser.error(f"--batch-size must be 2 to {FACES}, --steps at least 1, and --identities at least 2")
    return args


def make_step(run, args):
    """Return the training step of casia_train.py as a function of images and labels, and whether it is compiled."""
    head, margin = HEADS[args.method]
    net = run.prepare(cosFace.net.NETS[args.net](), args.batch_size, args.compile)
    head = make_head(head, args.identities, run)
    optimizer = SGD(parameter_groups(net, head, 5e-4), head, lr=0.01, momentum=0.9)

    def step(images, labels):
        optimizer.zero_grad()
        with run.autocast():
            embedding = net(images)
        loss, _ = head(embedding, labels % args.identities, step=0, **margin)
        run.scaler.scale(loss).backward()
        run.step(optimizer)
    return step, net._compiled_call_impl is not None


def timed(step, batches, device):
    """Return the total seconds for running a step on every batch."""
    wait_for(device)
    start = time.perf_counter()
    for images, labels in batches:
        step(images, labels)
    wait_for(device)
    return time.perf_counter() - start


@command
def main(argv=None):
    args = parse_args(argv)
    run = Run(args.device, args.precision)
    step, compiled = make_step(run, args)
    with tempfile.TemporaryDirectory() as folder:
        faces = make_faces(Path(folder) / "faces.u8", FACES)
        batches = iter(Batches(faces, args.batch_size, WARM_UP + args.steps + 1, run.device))
        for _ in range(WARM_UP):
            step(*next(batches))
        loaded = timed(step, (next(batches) for _ in range(args.steps)), run.device)
        resident = timed(step, [next(batches)] * args.steps, run.device)
        batches.close()
    name = processor() if run.device.type == "cpu" else run.devices
    print(f"{args.method}, {args.net}, {args.identities:,} identities, batches of {args.batch_size}, {run.precision}"
          f"{', compiled' if compiled else ''}, on {name}, torch {torch.__version__}\n"
          f"with the loader      {args.batch_size * args.steps / loaded:10,.1f} faces/s\n"
          f"without the loader   {args.batch_size * args.steps / resident:10,.1f} faces/s")
    if run.device.type == "cuda":
        print(f"peak of GPU memory   {torch.cuda.max_memory_allocated(run.device) / 1e9:10.2f} GB")


if __name__ == "__main__":
    sys.exit(main())
