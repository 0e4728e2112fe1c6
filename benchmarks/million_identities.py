"""Train a head of a million identities for a few steps on synthetic embeddings; print its memory and speed.

    python benchmarks/million_identities.py                                      all class centers in one process: 17 GB
    python benchmarks/million_identities.py --sample-centers 0.1                 a tenth of the class centers per step
    torchrun --standalone --nproc-per-node 2 benchmarks/million_identities.py    half of the class centers per process

There is no network, because only the cost of the identities is measured. The embeddings of an identity scatter around a
random direction, and the same identities return every fourth step, so the loss falls if the head learns.
"""
import math
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from faces.signals import end_quietly

end_quietly(__name__)    # Ctrl-C during the slow imports below prints no traceback
import torch
from torch import distributed

from benchmarks.throughput import HEADS
from faces.files import command, script_parser
from faces.training.optimizer import SGD
from faces.training.run import Run
from faces.training.sharded_head import make_head

GB = 1e9


def parse_args(argv=None):
    parser = script_parser(__doc__)
    parser.add_argument("--method", choices=HEADS, default="cosFace", help="whose head to train (default: cosFace)")
    parser.add_argument("--identities", type=int, default=1_000_000, metavar="C",
                        help="number of identities; memory grows with it (default: 1,000,000)")
    parser.add_argument("--sample-centers", "--sample-centres", type=float, metavar="F",
                        help="fraction of the class centers that a step sees, above 0 to 1 (default: all)")
    parser.add_argument("--batch-size", type=int, default=128, metavar="N",
                        help="faces per step, over all processes (default: 128)")
    parser.add_argument("--steps", type=int, default=12,
                        help="timed steps, at least 4; one untimed step precedes them (default: 12)")
    parser.add_argument("--lr", type=float, default=0.1,
                        help="learning rate, also with --sample-centers (default: 0.1)")
    parser.add_argument("--device", default="cpu",
                        help="cpu, cuda, auto; the printed memory is the CPU's (default: cpu)")
    args = parser.parse_args(argv)
    if args.steps < 4 or args.batch_size < 1 or not 0 < (args.sample_centers or 1) <= 1:
        parser.error("--steps must be at least 4, --batch-size at least 1, and --sample-centers above 0 and at most 1")
    return args


def peak_memory():
    """Return the largest memory that any process has used so far, in bytes, including shared libraries.

    With a backend other than gloo, it is that of this process.
    """
    unit = 1 if sys.platform == "darwin" else 1024
    peak = torch.tensor(float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit), dtype=torch.float64)
    if distributed.is_initialized() and distributed.get_backend() == "gloo":
        distributed.all_reduce(peak, distributed.ReduceOp.MAX)
    return peak.item()


def make_batch(args, run, step):
    """Return this process's embeddings, float32 (N / K, 512) of length about 23, and their labels, int64 (N / K,)."""
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
        embedding, label = make_batch(args, run, step)
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
    before = peak_memory()
    method, margin = HEADS[args.method]
    head = make_head(method, args.identities, run, shard=True, sample=args.sample_centers)
    optimizer = SGD(head.parameters(), head, lr=args.lr, momentum=0.9, weight_decay=5e-4)
    losses, seconds = train(args, run, head, optimizer, margin)
    own = head.end - head.first
    drawn = own if args.sample_centers is None else min(own, max(math.ceil(args.sample_centers * own), args.batch_size))
    peak, rate = peak_memory(), args.steps / seconds
    run.print(f"{args.method}, {args.identities:,} identities, {run.world_size} process(es) on {run.device}, {drawn:,} "
              f"of {own:,} centers per step and process, batches of {args.batch_size}")
    run.print(f"centers and momentum  {2 * own * 512 * 4 / GB:6.2f} GB per process")
    run.print(f"peak of a process     {peak / GB:6.2f} GB, of which {before / GB:.2f} GB before the head was made")
    run.print(f"speed                 {rate:6.2f} steps/s, {rate * args.batch_size:.0f} faces/s")
    first, last = sum(losses[:4]) / 4, sum(losses[-4:]) / 4
    run.print(f"loss                  {first:6.2f} in the first four steps, {last:.2f} in the last four")
    if run.world_size > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
