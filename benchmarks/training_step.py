"""Compare training with plain PyTorch: time our step and the reference's, and check that both learn the same.

    python benchmarks/training_step.py --casia DIR                    CosFace, 20 steps of 64 faces each, in turn
    python benchmarks/training_step.py --casia DIR --method sphereFace --batch-size 256
    python benchmarks/training_step.py --casia DIR --compile
    python benchmarks/training_step.py --casia DIR --steps 200 --lfw DIR --landmarks FILE

The reference is a plain float32 loop with the same network, head and optimizer. It has tensors in PyTorch's default
memory format, a head as most repositories write it (all N x C logits with the margin, all without, and a one-hot matrix
to choose between them), and torch's SGD. Ours is what casia_train.py runs,
in the precision that it would choose. Both start from the same weights and see the same faces, mirrored alike, at the
same learning rate. They take turns at every step, so a slowdown of the machine affects both. Before that, the loss with
the final margin and all gradients are compared on the first batch.

The learning rate schedule is complete, however few the steps: linear warmup over the first tenth, then cosine decay to
zero. CosFace's margin grows over the first half of the steps; SphereFace's lambda falls as in every training run.

The program prints images/s for the median step of each, the ratio of the two, and how much the loss curves differ. It
is an error if they differ by more than bf16 and the order of summation explain. With --lfw, the program also evaluates
both networks on LFW with the standard 10-fold protocol.
"""
import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from faces.signals import end_quietly

end_quietly(__name__)    # Ctrl-C during the slow imports below prints no traceback
import numpy as np
import torch

import cosFace.net
import sphereFace.net
from benchmarks.margin_softmax import reference_cosface, reference_sphereface
from faces.data.cache import load_casia
from faces.device import processor, to_input
from faces.files import CACHE, InputError, command, script_parser
from faces.training.optimizer import SGD, parameter_groups
from faces.training.recipe import Recipe
from faces.training.run import PRECISION, Run
from faces.verification.evaluate import evaluate
from faces.verification.lfw import load_lfw

SCALE, MARGIN, WEIGHT_DECAY = 30.0, 0.35, 5e-4
# Relative differences that rounding explains: of the loss, of all gradients as one vector, of the mean of the curve.
# Without a margin, the loss would differ by 30 % and more. On NVIDIA GPUs, float32 convolutions use TF32.
TOLERANCE = {"float32": (1e-3, 0.02, 0.02), "bf16": (1e-2, 0.3, 0.02), "fp16": (1e-2, 0.1, 0.02)}


def parse_args(argv=None):
    parser = script_parser(__doc__)
    parser.add_argument("--casia", type=Path, required=True, metavar="DIR", help="training set, as for casia_train.py")
    parser.add_argument("--cache", type=Path, default=CACHE, metavar="DIR",
                        help="folder for aligned faces (default: cache/ of this clone)")
    parser.add_argument("--method", choices=("cosFace", "sphereFace"), default="cosFace",
                        help="method to train (default: cosFace)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="faces per step (default: 64)")
    parser.add_argument("--steps", type=int, default=20, help="steps of each loop, at least 3 (default: 20)")
    parser.add_argument("--lr", type=float, default=0.05, help="peak learning rate (default: 0.05)")
    parser.add_argument("--lfw", type=Path, metavar="DIR", help="LFW, to evaluate both networks at the end")
    parser.add_argument("--landmarks", type=Path, metavar="FILE",
                        help="landmark list of LFW (default: the list that mtcnn/lfw_landmark.py wrote for it)")
    parser.add_argument("--precision", choices=("auto", *PRECISION), default="auto",
                        help="precision of our loop; auto picks it as in training (default: auto)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False,
                        help="compile the network of our loop with torch.compile")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    args = parser.parse_args(argv)
    if args.batch_size < 2 or args.steps < 3:
        parser.error("--batch-size must be at least 2, and --steps at least 3")
    return args


def batches(faces, args, device):
    """Yield the batch of each step: faces, uint8 (N, 112, 96, 3); which to mirror, bool (N,); labels, int64 (N,)."""
    rng = np.random.default_rng(0)
    for _ in range(args.steps):
        images, labels = faces.batch(rng.choice(len(faces), args.batch_size, replace=False))
        mirror = rng.random(args.batch_size) < 0.5
        yield [torch.from_numpy(array).to(device) for array in (images, mirror, labels)]


def our_step(run, net, head, args):
    """Return the training step of casia_train.py as a function.

    Its arguments are the learning rate, the margin's parameter (ramp of CosFace, lambda of SphereFace) and the three
    tensors of a batch; it returns the loss. The gradients stay until the next step.
    """
    net = run.prepare(net, args.batch_size, args.compile)
    optimizer = SGD(parameter_groups(net, head, WEIGHT_DECAY), lr=0.0, momentum=0.9)

    def step(rate, margin_parameter, faces, mirror, labels):
        set_rate(optimizer, rate)
        optimizer.zero_grad()
        with run.autocast():
            embedding = net(to_input(faces, mirror))
        loss, _ = head(embedding, labels, margin_parameter)
        run.scaler.scale(loss).backward()
        run.step(optimizer)
        return loss.detach()
    return step


def reference_step(net, head):
    """Return the same step in plain PyTorch and float32."""
    optimizer = torch.optim.SGD(parameter_groups(net, head, WEIGHT_DECAY), 0.0, momentum=0.9)

    def loss_of(embedding, labels, margin_parameter):
        if isinstance(head, cosFace.net.CosFace):
            return reference_cosface(embedding, head.weight, labels, SCALE, margin_parameter * MARGIN)
        return reference_sphereface(embedding, head.weight, labels, margin_parameter)

    def step(rate, margin_parameter, faces, mirror, labels):
        set_rate(optimizer, rate)
        faces = torch.where(mirror[:, None, None, None], faces.flip(2), faces)
        x = (faces.permute(0, 3, 1, 2).contiguous().float() - 127.5) / 128
        loss = loss_of(net(x), labels, margin_parameter)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()
    return step


def set_rate(optimizer, rate):
    for group in optimizer.param_groups:
        group["lr"] = rate


def race(steps, data, rate_at, margin_at):
    """Run both steps on every batch and return {name: list of (seconds, loss)}.

    Args:
        steps: {name: step}, with steps as our_step() returns them.
        data: iterable of batches.
        rate_at, margin_at: functions of the step's number, which give the learning rate and the margin's parameter.
    """
    results = {name: [] for name in steps}
    for number, batch in enumerate(data, 1):
        for name, step in steps.items():
            start = time.perf_counter()
            loss = step(rate_at(number - 1), margin_at(number - 1), *batch).item()  # item() waits for the device
            results[name].append((time.perf_counter() - start, loss))
        print(f"step {number}: " + ", ".join(f"{name} {seconds:.2f} s, loss {loss:.4f}" for name, (seconds, loss)
                                             in ((name, runs[-1]) for name, runs in results.items())), file=sys.stderr)
    return results


@command
def main(argv=None):
    args = parse_args(argv)
    run = Run(args.device, args.precision)
    device = run.device
    faces = load_casia(args.casia, cache=args.cache)
    if args.batch_size > len(faces):
        raise InputError(f"--batch-size {args.batch_size} is larger than the {len(faces)} faces of {args.casia}; "
                         "choose a smaller batch.")
    lfw = load_lfw(args.lfw, landmarks=args.landmarks, device=device) if args.lfw else None
    if args.method == "cosFace":
        net, head = cosFace.net.faceNet(), cosFace.net.CosFace(faces.classes, SCALE, MARGIN)
    else:
        net, head = sphereFace.net.faceNet(), sphereFace.net.SphereFace(faces.classes)
    nets = {name: copy.deepcopy(net).to(device) for name in ("reference", "ours")}
    heads = {name: copy.deepcopy(head).to(device) for name in nets}
    steps = {"reference": reference_step(nets["reference"], heads["reference"]),
             "ours": our_step(run, nets["ours"], heads["ours"], args)}
    first = next(batches(faces, args, device))
    check_gradients(steps, nets, heads, first, 1.0 if args.method == "cosFace" else 5.0, run.precision)
    recipe = Recipe(args.batch_size, len(faces) // args.batch_size, args.steps, args.lr, args.steps // 10, "cosine")
    margin_at = (lambda step: min(1.0, 2 * step / args.steps)) if args.method == "cosFace" else head.annealing
    results = race(steps, batches(faces, args, device), recipe.learning_rate, margin_at)
    if lfw:
        for name, net in nets.items():
            result = evaluate(net, lfw, device)
            print(f"{name:13}LFW accuracy {result.accuracy:.4f} (std {result.std:.4f}), AUC {result.auc:.4f}")
    report(args, run, {name: np.array(runs) for name, runs in results.items()})


def check_gradients(steps, nets, heads, batch, margin_parameter, precision):
    """Compare the losses and gradients of one batch, at a learning rate of zero; raise InputError if they differ."""
    losses, gradients = [], []
    for name, step in steps.items():
        losses.append(step(0.0, margin_parameter, *batch))
        gradients.append(torch.cat([p.grad.flatten() for part in (nets[name], heads[name]) for p in part.parameters()]))
    loss, gradient = (((ours - reference).norm() / reference.norm()).item() for reference, ours in (losses, gradients))
    print(f"first batch: losses within {loss:.1e}, gradients within {gradient:.1e} (relative)", file=sys.stderr)
    if not (loss <= TOLERANCE[precision][0] and gradient <= TOLERANCE[precision][1]):
        raise InputError(f"our loss or gradients differ from the reference's by {loss:.1e} and {gradient:.1e}, more "
                         "than rounding explains; please report this as a bug.")


def report(args, run, results):
    """Print the measurements; raise InputError if the losses of the two loops differ too much."""
    # The first step of each loop does not count, because kernels are prepared in it.
    seconds = {name: statistics.median(runs[1:, 0]) for name, runs in results.items()}
    losses = {name: runs[:, 1] for name, runs in results.items()}
    mean_difference = abs(losses["ours"].mean() / losses["reference"].mean() - 1)
    print(f"device       {run.device}, {torch.get_num_threads()} threads, {processor()}, torch {torch.__version__}\n"
          f"measured     {args.method}, {args.steps} steps of {args.batch_size} faces, medians\n"
          f"reference    {args.batch_size / seconds['reference']:8.1f} images/s in float32\n"
          f"ours         {args.batch_size / seconds['ours']:8.1f} images/s in {run.precision}"
          f"{', compiled' if args.compile else ''}\n"
          f"ratio        {seconds['reference'] / seconds['ours']:8.2f}\n"
          f"agreement    first loss {losses['reference'][0]:.4f} and {losses['ours'][0]:.4f}, last "
          f"{losses['reference'][-1]:.4f} and {losses['ours'][-1]:.4f}, mean of the curve within {mean_difference:.2%}")
    if not mean_difference <= TOLERANCE[run.precision][2]:
        raise InputError(f"our losses differ from the reference's by {mean_difference:.1%} on average; please report "
                         "this as a bug, with the output above.")


if __name__ == "__main__":
    sys.exit(main())
