"""Train beside the textbook: the same network, head and optimizer in a plain float32 loop. Time both, compare what they
learn.

    python training_step.py --casia DIR                    CosFace, 20 steps of 64 faces each, by turns
    python training_step.py --casia DIR --method sphereFace --batch-size 256
    python training_step.py --casia DIR --compile
    python training_step.py --casia DIR --steps 200 --lfw DIR --landmarks FILE

The textbook loop has tensors in PyTorch's default memory order, float32 throughout, the heads that most repositories
have (the logits of all N x C pairs with the margin and without, and a one-hot matrix to choose between), and torch's
plain SGD over all parameters, one after the other. Ours is what casia_train.py runs, precision as it chooses it. Both
start from the same weights, see the same faces, mirrored alike, at the same learning rate, and take turns step by step,
so that a machine that slows down harms both. The schedule is a whole one, however few the steps: warm-up in a tenth of
them, then a cosine to zero; CosFace's margin grows over half of them, SphereFace's lambda falls as always.

What is printed: images/s of the median step, their ratio, and how far the two loss curves lie apart; they must agree to
the end of the noise that bf16 and the order of sums make. With --lfw, the accuracy of both on LFW's ten folds.
"""
import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cosFace.net
import sphereFace.net
from benchmarks.lfw_eval import processor
from benchmarks.margin_softmax import textbook_cosface, textbook_sphereface
from faces.cpu.training import for_training
from faces.data.cache import load_casia
from faces.device import has_bf16, keep_large_blocks, pick_device, to_input
from faces.files import CACHE, InputError, command
from faces.training.recipe import Recipe
from faces.training.sharded_head import SGD, parameter_groups
from faces.verification.evaluate import evaluate
from faces.verification.lfw import load_lfw

S, M, DECAY = 30.0, 0.35, 5e-4
FIRST, CURVE = 1e-2, 0.02   # relative differences of the first loss and of the mean loss that bf16 and rounding explain


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--casia", type=Path, required=True, metavar="DIR", help="as of casia_train.py")
    parser.add_argument("--cache", type=Path, default=CACHE, metavar="DIR", help="as of casia_train.py")
    parser.add_argument("--method", choices=("cosFace", "sphereFace"), default="cosFace")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="faces a step (default: 64)")
    parser.add_argument("--steps", type=int, default=20, help="of each (default: 20)")
    parser.add_argument("--lr", type=float, default=0.05, help="highest learning rate (default: 0.05)")
    parser.add_argument("--lfw", type=Path, metavar="DIR", help="LFW, to measure both at the end")
    parser.add_argument("--landmarks", type=Path, metavar="FILE", help="LFW's (default: lfw_landmark.py's)")
    parser.add_argument("--precision", choices=("auto", "bf16", "float32"), default="auto", help="of ours")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="as of casia_train.py; "
                        "of ours")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    args = parser.parse_args(argv)
    if args.batch_size < 2 or args.steps < 3:
        parser.error("--batch-size must be at least 2, --steps at least 3")
    return args


def batches(faces, args, device):
    """Yield the faces of each step, uint8 (N, 112, 96, 3) on the device, which to mirror, and labels."""
    rng = np.random.default_rng(0)
    for _ in range(args.steps):
        images, labels = faces.batch(rng.choice(len(faces), args.batch_size, replace=False))
        mirror = rng.random(args.batch_size) < 0.5
        yield [torch.from_numpy(array).to(device) for array in (images, mirror, labels)]


def ours(net, head, bf16, compiled, device):
    """A step as casia_train.py makes it: a function of the learning rate, of what the head takes after the labels,
    and of a batch, that returns the loss."""
    net = net.to(memory_format=torch.channels_last)
    if not compiled:
        net = for_training(net, device, torch.bfloat16 if bf16 else torch.float32)
    optimizer = SGD(parameter_groups(net, head, DECAY), lr=0.0, momentum=0.9)

    def step(rate, setting, faces, mirror, labels):
        set_rate(optimizer, rate)
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            embedding = net(to_input(faces, mirror))
        loss, _ = head(embedding, labels, setting)
        loss.backward()
        optimizer.step()
        return loss.detach()
    return step


def textbook(net, head):
    """The same in a plain float32 loop."""
    optimizer = torch.optim.SGD(parameter_groups(net, head, DECAY), 0.0, momentum=0.9, foreach=False)

    def loss_of(embedding, labels, setting):
        if isinstance(head, cosFace.net.CosFace):
            return textbook_cosface(embedding, head.weight, labels, S, setting * M)
        return textbook_sphereface(embedding, head.weight, labels, setting)

    def step(rate, setting, faces, mirror, labels):
        set_rate(optimizer, rate)
        faces = torch.where(mirror[:, None, None, None], faces.flip(2), faces)
        x = (faces.permute(0, 3, 1, 2).contiguous().float() - 127.5) / 128
        loss = loss_of(net(x), labels, setting)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()
    return step


def set_rate(optimizer, rate):
    for group in optimizer.param_groups:
        group["lr"] = rate


def race(steps, data, rate_at, setting_at):
    """Run both on each batch: {name: list of (seconds, loss)}."""
    results = {name: [] for name in steps}
    for number, batch in enumerate(data, 1):
        for name, step in steps.items():
            start = time.perf_counter()
            loss = step(rate_at(number - 1), setting_at(number - 1), *batch).item()        # waits for the device
            results[name].append((time.perf_counter() - start, loss))
        print(f"step {number}: " + ", ".join(f"{name} {seconds:.2f} s, loss {loss:.4f}" for name, (seconds, loss)
                                             in ((name, runs[-1]) for name, runs in results.items())), file=sys.stderr)
    return results


@command
def main(argv=None):
    args = parse_args(argv)
    device = pick_device(args.device)
    faces = load_casia(args.casia, cache=args.cache)
    if args.batch_size > len(faces):
        raise InputError(f"--batch-size {args.batch_size} is larger than the set of {len(faces)} faces.")
    lfw = load_lfw(args.lfw, landmarks=args.landmarks, device=device) if args.lfw else None
    keep_large_blocks(device)   # of both: it is the process's
    torch.manual_seed(0)
    if args.method == "cosFace":
        net, head = cosFace.net.faceNet(), cosFace.net.CosFace(faces.classes, S, M)
    else:
        net, head = sphereFace.net.faceNet(), sphereFace.net.SphereFace(faces.classes)
    nets = {name: copy.deepcopy(net).to(device) for name in ("textbook", "ours")}
    heads = {name: copy.deepcopy(head).to(device) for name in nets}
    bf16 = has_bf16(device) if args.precision == "auto" else args.precision == "bf16"
    steps = {"textbook": textbook(nets["textbook"], heads["textbook"]),
             "ours": ours(nets["ours"], heads["ours"], bf16, args.compile, device)}
    if args.compile:
        nets["ours"].compile()
    recipe = Recipe(args.batch_size, len(faces) // args.batch_size, args.steps, args.lr, args.steps // 10, "cosine")
    setting = ((lambda step: min(1.0, 2 * step / args.steps)) if args.method == "cosFace" else head.annealing)
    results = race(steps, batches(faces, args, device), recipe.learning_rate, setting)
    if lfw:
        for name, net in nets.items():
            result = evaluate(net, lfw, device)
            print(f"{name:13}LFW accuracy {result.accuracy:.4f} (std {result.std:.4f}), AUC {result.auc:.4f}")
    report(args, device, bf16, {name: np.array(runs) for name, runs in results.items()})


def report(args, device, bf16, results):
    """Print the figures; raise InputError where the two did not compute the same."""
    warm = {name: statistics.median(runs[1:, 0]) for name, runs in results.items()}     # a first step prepares kernels
    losses = {name: runs[:, 1] for name, runs in results.items()}
    first = abs(losses["ours"][0] / losses["textbook"][0] - 1)
    curve = abs(losses["ours"].mean() / losses["textbook"].mean() - 1)
    print(f"device       {device}, {torch.get_num_threads()} threads, {processor()}, torch {torch.__version__}\n"
          f"measured     {args.method}, {args.steps} steps of {args.batch_size}, medians\n"
          f"textbook     {args.batch_size / warm['textbook']:8.1f} images/s in float32\n"
          f"ours         {args.batch_size / warm['ours']:8.1f} images/s in {'bf16' if bf16 else 'float32'}"
          f"{', compiled' if args.compile else ''}\n"
          f"ratio        {warm['textbook'] / warm['ours']:8.2f}\n"
          f"agreement    first loss {losses['textbook'][0]:.4f} and {losses['ours'][0]:.4f}, last "
          f"{losses['textbook'][-1]:.4f} and {losses['ours'][-1]:.4f}, mean of the curve within {curve:.2%}")
    if not (first <= FIRST and curve <= CURVE):
        raise InputError(f"the two losses differ by more than {FIRST:.0%} at first or {CURVE:.0%} in the mean; tell "
                         "the authors.")


if __name__ == "__main__":
    sys.exit(main())
