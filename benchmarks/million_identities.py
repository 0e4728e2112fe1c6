"""Train a head of a million identities for a few steps on made embeddings; print its memory and its steps per second.

    python million_identities.py                                                 all centers in one process: 17 GB
    python million_identities.py --sample-centers 0.1                            a tenth of them each step
    torchrun --standalone --nproc-per-node 2 million_identities.py               half of them in each process

The network is left out: what is measured is what the number of identities costs. Embeddings scatter around a direction
of their identity, and identities come again every fourth step, so that the loss falls where the head learns.
"""
import argparse
import math
import resource
import sys
import time
from pathlib import Path

import torch
from torch import distributed

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cosFace.net import CosFace
from faces.files import InputError, command
from faces.training.run import Run
from faces.training.sharded_head import SGD, make_head
from sphereFace.net import SphereFace

METHODS = {"cosFace": (CosFace, {"ramp": 1.0}), "sphereFace": (SphereFace, {"lam": 5.0})}   # head, margin of a step
GB = 1e9


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="What a head of many identities costs.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--method", choices=METHODS, default="cosFace")
    parser.add_argument("--identities", type=int, default=1_000_000, metavar="C", help="memory grows with them")
    parser.add_argument("--sample-centers", "--sample-centres", type=float, metavar="F", help="fraction that a step sees, above 0 to 1")
    parser.add_argument("--batch-size", type=int, default=128, metavar="N", help="faces a step, over all processes")
    parser.add_argument("--steps", type=int, default=12, help="measured steps, after one that is not; at least 4")
    parser.add_argument("--lr", type=float, default=0.1, help="learning rate; of a sampled head too")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, auto; the memory printed is the CPU's")
    args = parser.parse_args(argv)
    if args.steps < 4 or args.batch_size < 1 or not 0 < (args.sample_centers or 1) <= 1:
        parser.error("--steps must be at least 4, --batch-size at least 1, --sample-centers above 0 and at most 1")
    return args


def memory():
    """The most memory that any one process has had so far, in bytes, shared libraries included."""
    unit = 1 if sys.platform == "darwin" else 1024
    most = torch.tensor(float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit), dtype=torch.float64)
    if distributed.is_initialized() and distributed.get_backend() == "gloo":
        distributed.all_reduce(most, distributed.ReduceOp.MAX)
    return most.item()


def faces(args, run, step):
    """This process's (N / K, 512) embeddings of length about 23 and their (N / K,) labels."""
    generator = torch.Generator().manual_seed(step % 4)
    label = torch.randint(args.identities, (args.batch_size,), generator=generator)
    direction = torch.randn(args.batch_size, 512, generator=generator)
    noise = torch.randn(args.batch_size, 512, generator=torch.Generator().manual_seed(4 + step))
    own = slice(run.rank, None, run.world_size)
    return (direction + 0.3 * noise)[own].to(run.device), label[own].to(run.device)


def train(args, run, head, optimizer, margin):
    """Return the losses of all steps and the seconds of all but the first."""
    losses = []
    for step in range(args.steps + 1):
        if step == 1:
            start = time.perf_counter()
        embedding, label = faces(args, run, step)
        loss, _ = head(embedding.requires_grad_(), label, step=step, **margin)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, time.perf_counter() - start


@command
def main(argv=None):
    args = parse_args(argv)
    run = Run(args.device, precision="float32")
    before = memory()
    method, margin = METHODS[args.method]
    try:
        head = make_head(method, args.identities, run, shard=True, sample=args.sample_centers)
    except RuntimeError as error:  # torch says so where the allocator refuses
        raise InputError(f"no memory for {args.identities:,} identities ({str(error).splitlines()[0]}); use more "
                         "processes.") from None
    optimizer = SGD(head.parameters(), head, lr=args.lr, momentum=0.9, weight_decay=5e-4)
    losses, seconds = train(args, run, head, optimizer, margin)
    own = head.end - head.first
    drawn = own if args.sample_centers is None else min(own, max(math.ceil(args.sample_centers * own), args.batch_size))
    print(f"{args.method}, {args.identities:,} identities over {run.world_size} process(es) on {run.device}, {drawn:,} of "
          f"{own:,} centers a step and process, batches of {args.batch_size}")
    print(f"centers and momentum  {2 * own * 512 * 4 / GB:6.2f} GB a process")
    print(f"peak of a process     {memory() / GB:6.2f} GB, {before / GB:.2f} GB of it before there was a head")
    rate = args.steps / seconds
    print(f"speed                 {rate:6.2f} steps/s, {rate * args.batch_size:.0f} faces/s")
    first, last = sum(losses[:4]) / 4, sum(losses[-4:]) / 4
    print(f"loss                  {first:6.2f} in the first four steps, {last:.2f} in the last four")
    if run.world_size > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
