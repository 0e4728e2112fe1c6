"""Measure time and memory of both heads, forward and backward, and compare them with simpler implementations.

    python benchmarks/margin_softmax.py                    10,575 identities, batches of 256

Each head is compared with three others. The linear layer is nn.Linear with cross_entropy, without a margin and without
normalized centers. The reference is the head as most repositories write it: all N x C logits with the margin, all
without, and a one-hot matrix to choose between them. Every implementation needs three matrix products; these alone are
a lower bound on the time.

First, losses and gradients of our heads are compared with those of the references; a mismatch is an error. The memory
of a step is its peak above what was allocated before the step, as counted by the allocator (CUDA) or by torch's
profiler. The last column is the peak above that of the linear layer, in units of one (N, C) matrix.
"""
import math
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences the profiler, which logs a lot if there is no GPU

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from faces.signals import end_quietly

end_quietly(__name__)    # Ctrl-C during the slow imports below prints no traceback
import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from cosFace.net import CosFace
from faces.device import pick_device, processor, wait_for
from faces.files import command, script_parser
from sphereFace.net import SphereFace

SCALE, MARGIN, LAMBDA = 64.0, 0.35, 5.0


def parse_args(argv=None):
    parser = script_parser(__doc__)
    parser.add_argument("--identities", type=int, default=10_575, metavar="C",
                        help="number of identities (default: 10,575, as in CASIA-WebFace)")
    parser.add_argument("--batch-size", type=int, default=256, metavar="N", help="embeddings per step (default: 256)")
    parser.add_argument("--repeats", type=int, default=21,
                        help="timed steps of each head; the median is printed (default: 21)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, auto (default: cpu)")
    args = parser.parse_args(argv)
    if min(args.identities, args.batch_size, args.repeats) < 1:
        parser.error("all numbers must be at least 1")
    return args


def reference_cosface(x, weight, label, s=SCALE, m=MARGIN):
    """Return the mean loss of CosFace, the way most repositories compute it."""
    cosine = F.linear(F.normalize(x), F.normalize(weight))
    phi = cosine - m
    one_hot = torch.zeros_like(cosine).scatter_(1, label[:, None], 1)
    return F.cross_entropy(s * (one_hot * phi + (1 - one_hot) * cosine), label)


def reference_sphereface(x, weight, label, lam=LAMBDA):
    """Return the mean loss of SphereFace with m = 4, the way most repositories compute it."""
    cosine = F.linear(F.normalize(x), F.normalize(weight)).clamp(-1 + 1e-6, 1 - 1e-6)
    theta = cosine.acos()
    k = (4 * theta / math.pi).floor().detach()
    psi = (1 - 2 * (k % 2)) * (8 * cosine ** 4 - 8 * cosine ** 2 + 1) - 2 * k
    phi = (lam * cosine + psi) / (1 + lam)
    one_hot = torch.zeros_like(cosine).scatter_(1, label[:, None], 1)
    return F.cross_entropy(x.norm(dim=1, keepdim=True) * (one_hot * phi + (1 - one_hot) * cosine), label)


def matrix_products(x, weight):
    """Compute only the three matrix products of a step, as if the gradient of the logits were the logits."""
    logits = x.detach() @ weight.detach().T
    x.grad, weight.grad = logits @ weight.detach(), logits.T @ x.detach()
    return logits[0, 0]


def make_steps(args, device):
    """Return {name: (step, weight)}.

    A step is a function that takes embeddings (N, 512), computes the loss and the gradients of embeddings and weight,
    and returns the loss.
    """
    torch.manual_seed(0)
    label = torch.randint(args.identities, (args.batch_size,), device=device)
    linear = nn.Linear(512, args.identities).to(device)
    cosface, sphereface = CosFace(args.identities, SCALE, MARGIN).to(device), SphereFace(args.identities).to(device)
    losses = {
        "linear layer": (lambda x: F.cross_entropy(linear(x), label), linear.weight),
        "CosFace": (lambda x: cosface(x, label)[0], cosface.weight),
        "CosFace, reference": (lambda x: reference_cosface(x, cosface.weight, label), cosface.weight),
        "SphereFace": (lambda x: sphereface(x, label, LAMBDA)[0], sphereface.weight),
        "SphereFace, reference": (lambda x: reference_sphereface(x, sphereface.weight, label), sphereface.weight),
    }

    def step(loss_of, weight):
        def run(x):
            x.grad = weight.grad = linear.bias.grad = None
            loss = loss_of(x)
            loss.backward()
            return loss.detach()
        return run
    return {"matrix products": (lambda x: matrix_products(x, linear.weight), linear.weight),
            **{name: (step(loss_of, weight), weight) for name, (loss_of, weight) in losses.items()}}


def check_same(steps, x):
    """Compare losses and gradients of our heads with the references'; return the largest relative difference."""
    largest = 0.0
    for name in ("CosFace", "SphereFace"):
        results = []
        for implementation in (name, f"{name}, reference"):
            step, weight = steps[implementation]
            results.append((step(x), x.grad, weight.grad))
        for ours, reference in zip(*results):
            difference = ((ours - reference).norm() / reference.norm()).item()
            if not difference < 1e-4:
                sys.exit(f"margin_softmax.py: loss or gradients of {name} differ from the reference by "
                         f"{difference:.1e} (relative, L2); please report this as a bug.")
            largest = max(largest, difference)
    return largest


def seconds(step, x):
    """Return the time of a step."""
    wait_for(x.device)
    start = time.perf_counter()
    step(x).item()
    wait_for(x.device)
    return time.perf_counter() - start


def peak_bytes(step, x, weight):
    """Return the peak memory of a step, in bytes, above what was allocated before it."""
    x.grad = weight.grad = None
    if x.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(x)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step(x)
    events = sorted((event.start_ns(), event.nbytes()) for event in profiled.profiler.kineto_results.events()
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
    for repeat in range(args.repeats + 2):  # in turn, so that a slowdown of the machine affects all
        for name, (step, _) in steps.items():
            took = seconds(step, x)
            if repeat >= 2:
                times[name].append(took)

    where = torch.cuda.get_device_name(device) if device.type == "cuda" else \
        f"{device.type}, {torch.get_num_threads()} thread(s), {processor()}"
    print(f"float32, {args.batch_size} x 512 embeddings, {args.identities:,} identities; {where}; torch "
          f"{torch.__version__}; median of {args.repeats}")
    print(f"ours and the references agree within {difference:.0e} (relative, losses and gradients)")
    print(f"{'':22}{'ms':>8}{'x linear':>10}{'reference/ours':>15}{'peak MB':>9}{'(N, C) above linear':>20}")
    unit = 4 * args.batch_size * args.identities
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, median in medians.items():
        speedup = medians.get(f"{name}, reference", math.nan) / median
        print(f"{name:22}{1e3 * median:8.1f}{median / medians['linear layer']:10.2f}"
              + (" " * 15 if math.isnan(speedup) else f"{speedup:15.2f}")
              + f"{peaks[name] / 1e6:9.1f}{(peaks[name] - peaks['linear layer']) / unit:20.2f}")


if __name__ == "__main__":
    sys.exit(main())
