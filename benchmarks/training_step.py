"""Time the training step against a plain PyTorch loop, and check that both compute the same loss and gradients.

    python benchmarks/training_step.py                                            CosFace, 64 faces per step
    python benchmarks/training_step.py --method sphereFace --batch-size 256
    python benchmarks/training_step.py --precision float32

Ours is the step of casia_train.py, in the precision it would choose. The peer is the loop that most repositories have:
float32, tensors in PyTorch's default memory format, and a head that computes all N x C logits with the margin, all
without, and chooses with a one-hot matrix. Both have the same network, optimizer and weights, and see the same random
faces. Before the clock starts, the losses with the full margin and all gradients are compared.
"""
import argparse
import copy
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from torch.nn import functional as F

import cosFace.net
import sphereFace.net
from benchmarks.turns import check_same, in_turns, report
from faces.align import HEIGHT, WIDTH
from faces.cpu.layers import for_training
from faces.device import PRECISION, autocast, memory_format, pick_device, pick_dtype, to_input, tune_cpu
from faces.files import at_least, command, script_parser
from faces.training.distributed import compile_options

SCALE, MARGIN, LAMBDA = 64.0, 0.35, 5.0
# For each method: its head, and the margin's argument for the full margin
HEADS = {"cosFace": (lambda classes: cosFace.net.CosFace(classes, SCALE, MARGIN), 1.0),
         "sphereFace": (sphereFace.net.SphereFace, LAMBDA)}
# Relative differences that rounding explains, of the loss and of all gradients as one vector. On NVIDIA GPUs, float32
# convolutions use TF32. Without a margin, the loss would differ by 30 % and more.
TOLERANCE = {torch.float32: (1e-3, 0.02), torch.bfloat16: (1e-2, 0.2), torch.float16: (1e-2, 0.1)}


def add_options(parser):
    """Add the options that say what to train and where, which throughput.py has as well."""
    parser.add_argument("--method", choices=HEADS, default="cosFace", help="method to train")
    parser.add_argument("--net", choices=cosFace.net.NETS, default="faceNet", help="network")
    parser.add_argument("--identities", type=at_least(2), default=10572, help="class centers")
    parser.add_argument("--precision", choices=("auto", *PRECISION), default="auto", help="of the network")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")


def make(args, device):
    """Return the network and the head of the options on a device; all parts of the network have gradients."""
    net, head = cosFace.net.NETS[args.net](), HEADS[args.method][0](args.identities)
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim == 1:    # otherwise, the last scale of each residual unit is 0, and nothing before it would learn
                p.add_(0.1 * torch.randn_like(p))
    return net.to(device), head.to(device)


def sgd(net, head, **settings):
    """Return the optimizer of casia_train.py, with a small learning rate."""
    parameters = [*net.parameters(), *head.parameters()]
    return torch.optim.SGD([{"params": [p for p in parameters if p.ndim > 1], "weight_decay": 5e-4},
                            {"params": [p for p in parameters if p.ndim <= 1]}], lr=1e-3, momentum=0.9, **settings)


def our_loop(net, head, margin, device, dtype, compile=False):
    """Return functions of casia_train.py's step: network input and labels to a loss, and from there the update."""
    net = for_training(net.to(device, memory_format=memory_format(device)), device, dtype)
    if compile:
        net.compile(dynamic=False, options=compile_options())
    optimizer = sgd(net, head, fused=device.type == "cuda" and dtype != torch.float16)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def loss_of(x, labels):
        torch.set_float32_matmul_precision("high" if device.type == "cuda" and dtype != torch.float32 else "highest")
        with autocast(device, dtype):
            embedding = net(x)
        return head(embedding, labels, margin)[0]

    def update(loss):
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return loss_of, update


def plain_loop(net, head, margin):
    """Return the same functions in plain PyTorch."""
    optimizer = sgd(net, head)
    plain_loss = plain_cosface if isinstance(head, cosFace.net.CosFace) else plain_sphereface

    def loss_of(x, labels):
        torch.set_float32_matmul_precision("highest")
        return plain_loss(net(x), head.weight, labels, margin)

    def update(loss):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss_of, update


def plain_cosface(x, weight, label, ramp):
    """Return the mean loss of CosFace, the way most repositories compute it."""
    cosine = F.linear(F.normalize(x), F.normalize(weight))
    one_hot = torch.zeros_like(cosine).scatter_(1, label[:, None], 1)
    return F.cross_entropy(SCALE * (one_hot * (cosine - ramp * MARGIN) + (1 - one_hot) * cosine), label)


def plain_sphereface(x, weight, label, lam):
    """Return the mean loss of SphereFace with m = 4, the way most repositories compute it."""
    cosine = F.linear(F.normalize(x), F.normalize(weight)).clamp(-1 + 1e-6, 1 - 1e-6)
    k = (4 * cosine.acos() / math.pi).floor().detach()
    psi = (1 - 2 * (k % 2)) * (8 * cosine ** 4 - 8 * cosine ** 2 + 1) - 2 * k
    one_hot = torch.zeros_like(cosine).scatter_(1, label[:, None], 1)
    logits = one_hot * (lam * cosine + psi) / (1 + lam) + (1 - one_hot) * cosine
    return F.cross_entropy(x.norm(dim=1, keepdim=True) * logits, label)


def plain_input(images, flip):
    """Return network input as to_input() does, the way most repositories compute it."""
    images = torch.where(flip[:, None, None, None], images.flip(2), images)
    return (images.permute(0, 3, 1, 2).contiguous().float() - 127.5) / 128


@command
def main(argv=None):
    parser = script_parser(__doc__)
    add_options(parser)
    parser.add_argument("--batch-size", type=at_least(4), default=64, metavar="N",
                        help="faces per step; batch normalization of fewer than 4 amplifies rounding")
    parser.add_argument("--turns", type=at_least(1), default=20, help="steps of each loop")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False,
                        help="compile the network of our loop with torch.compile")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    tune_cpu(device)
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    dtype, margin = pick_dtype(args.precision, device), HEADS[args.method][1]
    images = torch.randint(256, (args.batch_size, HEIGHT, WIDTH, 3), dtype=torch.uint8).to(device)
    labels = torch.randint(args.identities, (args.batch_size,)).to(device)
    flip = torch.rand(args.batch_size).to(device) < 0.5
    models = [make(args, device)]
    models.append(copy.deepcopy(models[0]))
    loops = our_loop(*models[0], margin, device, dtype, args.compile), plain_loop(*models[1], margin)
    programs = {f"ours, {str(dtype).removeprefix('torch.')}{', compiled' if args.compile else ''}": to_input,
                "plain loop, float32": plain_input}

    losses = [loss_of(as_input(images, flip), labels) for (loss_of, _), as_input in zip(loops, programs.values())]
    for loss in losses:
        (1024 * loss).backward()    # scaled, as fp16 needs it
    gradients = [torch.cat([p.grad.flatten() for part in model for p in part.parameters() if p.requires_grad])
                 for model in models]
    for what, values, tolerance in zip(("the loss", "all gradients"), (losses, gradients), TOLERANCE[dtype]):
        check_same(what, *values, tolerance)

    def step(loop, as_input):
        loss_of, update = loop
        return lambda turn: update(loss_of(as_input(images, flip), labels))
    steps = {name: step(loop, as_input) for loop, (name, as_input) in zip(loops, programs.items())}
    print(f"{args.method}, {args.net}, {args.identities:,} identities, {args.batch_size} faces per step")
    report(in_turns(steps, args.turns, device, warm_up=2), args.batch_size, "faces", device)


if __name__ == "__main__":
    sys.exit(main())
