"""Time and memory of both heads, forward and backward, beside a plain linear layer and the textbook's way.

    python margin_softmax.py                               10,575 identities, batches of 256

The plain layer is nn.Linear with cross_entropy: no margin, centers not normalized. The textbook's way is what most
repositories have: the logits with the margin of all N x C pairs, those without, and a one-hot matrix to choose between.
The three matrix products alone, which every way needs, are the floor, and bound what any way can gain on another.
Loss and gradients of ours and of the textbook's are compared first; a mismatch is an error. A step's memory is what it
has at its peak beyond what was there before it, counted by the allocator (CUDA) or by torch's profiler.
"""
import argparse
import math
import os
import platform
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler is chatty where there is no GPU
import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cosFace.net import CosFace
from faces.device import pick_device
from faces.files import command
from sphereFace.net import SphereFace

S, M, LAMBDA = 64.0, 0.35, 5.0


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="What a margin costs.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--identities", type=int, default=10_575, metavar="C", help="CASIA has 10,575")
    parser.add_argument("--batch-size", type=int, default=256, metavar="N")
    parser.add_argument("--repeats", type=int, default=21, help="timed steps of each; the median is printed")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, auto")
    return parser.parse_args(argv)


def textbook_cosface(x, weight, label, s=S, m=M):
    cosine = F.linear(F.normalize(x), F.normalize(weight))
    phi = cosine - m
    one_hot = torch.zeros_like(cosine).scatter_(1, label[:, None], 1)
    return F.cross_entropy(s * (one_hot * phi + (1 - one_hot) * cosine), label)


def textbook_sphereface(x, weight, label, lam=LAMBDA):
    cosine = F.linear(F.normalize(x), F.normalize(weight)).clamp(-1 + 1e-6, 1 - 1e-6)
    theta = cosine.acos()
    k = (4 * theta / math.pi).floor().detach()
    psi = (1 - 2 * (k % 2)) * (8 * cosine ** 4 - 8 * cosine ** 2 + 1) - 2 * k
    phi = (lam * cosine + psi) / (1 + lam)
    one_hot = torch.zeros_like(cosine).scatter_(1, label[:, None], 1)
    return F.cross_entropy(x.norm(dim=1, keepdim=True) * (one_hot * phi + (1 - one_hot) * cosine), label)


def products(x, weight):
    """Gradients as if that of the logits were the logits: the three matrix products and nothing else."""
    logits = x.detach() @ weight.detach().T
    x.grad, weight.grad = logits @ weight.detach(), logits.T @ x.detach()
    return logits[0, 0]


def make_steps(args, device):
    """{name: function that takes an embedding (N, 512), computes the loss and all gradients, and returns the loss},
    and the weights whose gradients these are."""
    torch.manual_seed(0)
    label = torch.randint(args.identities, (args.batch_size,), device=device)
    plain = nn.Linear(512, args.identities).to(device)
    cosface, sphereface = CosFace(args.identities, S, M).to(device), SphereFace(args.identities).to(device)
    losses = {
        "plain": (lambda x: F.cross_entropy(plain(x), label), plain.weight),
        "CosFace": (lambda x: cosface(x, label)[0], cosface.weight),
        "CosFace, textbook": (lambda x: textbook_cosface(x, cosface.weight, label), cosface.weight),
        "SphereFace": (lambda x: sphereface(x, label, LAMBDA)[0], sphereface.weight),
        "SphereFace, textbook": (lambda x: textbook_sphereface(x, sphereface.weight, label), sphereface.weight),
    }

    def step(loss_of, weight):
        def run(x):
            x.grad = weight.grad = plain.bias.grad = None
            loss = loss_of(x)
            loss.backward()
            return loss.detach()
        return run
    return {"products alone": (lambda x: products(x, plain.weight), plain.weight),
            **{name: (step(*both), both[1]) for name, both in losses.items()}}


def check_same(steps, x):
    """Compare loss and gradients of ours and the textbook's; return the largest relative difference."""
    worst = 0.0
    for name in ("CosFace", "SphereFace"):
        found = []
        for way in (name, f"{name}, textbook"):
            step, weight = steps[way]
            found.append((step(x), x.grad, weight.grad))
        for ours, theirs in zip(*found):
            difference = ((ours - theirs).norm() / theirs.norm()).item()
            if not difference < 1e-4:
                sys.exit(f"{name} and the textbook's differ by {difference:.1e} (relative, L2)")
            worst = max(worst, difference)
    return worst


def seconds(step, x):
    if x.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step(x).item()  # waits for the device
    if x.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(step, x, weight):
    """Most memory at one time during a step, beyond what there was before it."""
    x.grad = weight.grad = None
    if x.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(x)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step(x)
    events = sorted((event.start_ns(), event.nbytes()) for event in recorded.profiler.kineto_results.events()
                    if event.name() == "[memory]")
    now = peak = 0
    for _, size in events:
        now += size
        peak = max(peak, now)
    return peak


@command
def main(argv=None):
    args = parse_args(argv)
    device = pick_device(args.device)
    steps = make_steps(args, device)
    x = (7 * torch.randn(args.batch_size, 512, device=device)).requires_grad_()
    difference = check_same(steps, x)
    peaks = {name: peak_bytes(step, x, weight) for name, (step, weight) in steps.items()}
    times = {name: [] for name in steps}
    for repeat in range(args.repeats + 2):  # in turn, so that what else the machine does falls on all of them
        for name, (step, _) in steps.items():
            took = seconds(step, x)
            if repeat >= 2:
                times[name].append(took)

    where = torch.cuda.get_device_name(device) if device.type == "cuda" else \
        f"{device.type}, {torch.get_num_threads()} thread(s), {platform.processor() or platform.machine()}"
    print(f"float32, {args.batch_size} x 512 embeddings, {args.identities:,} identities; {where}; torch "
          f"{torch.__version__}; median of {args.repeats}")
    print(f"ours and the textbook's agree within {difference:.0e} (relative, loss and gradients)")
    print(f"{'':22}{'ms':>8}{'of plain':>10}{'textbook/ours':>15}{'peak MB':>9}{'(N, C) above plain':>20}")
    unit = 4 * args.batch_size * args.identities
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, median in medians.items():
        gain = medians.get(f"{name}, textbook", math.nan) / median
        print(f"{name:22}{1e3 * median:8.1f}{median / medians['plain']:10.2f}"
              + (f"{gain:15.2f}" if gain == gain else " " * 15)
              + f"{peaks[name] / 1e6:9.1f}{(peaks[name] - peaks['plain']) / unit:20.2f}")


if __name__ == "__main__":
    sys.exit(main())
