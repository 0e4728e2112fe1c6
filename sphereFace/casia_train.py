"""Train SphereFace (arXiv:1704.08063) on CASIA-WebFace.

    python sphereFace/casia_train.py --casia DIR                       the default recipe, on the best device available
    python sphereFace/casia_train.py --casia DIR --resume              continue where it stopped
    torchrun --nproc-per-node 2 sphereFace/casia_train.py --casia DIR  one process per GPU

DIR holds folders such as 0000045/001.jpg and casia_landmark.txt, or aligned faces. docs/training.md has the recipes.
"""
import math
import sys
from argparse import BooleanOptionalAction, Namespace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from torch.nn.parallel import DistributedDataParallel

from faces.cpu.layers import for_training
from faces.data.batches import Batches
from faces.data.cache import load_casia
from faces.device import PRECISION, autocast, memory_format, pick_dtype
from faces.files import CACHE, RUNS, InputError, at_least, command, count_of, path, script_parser
from faces.training.checkpoint import Checkpoints, load_optimizer, parse_resumed, settings_of
from faces.training.distributed import Processes, accumulating, compile_net, data_parallel, should_compile
from faces.training.log import TrainingLog
from faces.training.partial_fc import PartialFC
from faces.verification.evaluate import evaluate_epoch
from faces.verification.lfw import find_sets, load_sets
from faces.verification.weights import initial_net, net_in
from mtcnn.landmark_lists import find_landmarks
from sphereFace.net import NETS, SphereFace, SphereFaceR

parser = script_parser(__doc__)
option, positive = parser.add_argument, at_least(1e-30, float)
option("--casia", type=path, required=True, metavar="DIR", help="person folders, a zip, RecordIO, or aligned faces")
option("--landmarks", type=path, metavar="FILE", help="landmark list (default: in DIR, or casia_landmark.py's)")
option("--list", type=path, metavar="FILE", help="list of aligned faces, `path label` (default: a label per folder)")
option("--drop-lfw-overlap", action=BooleanOptionalAction, default=False, help="leave out the 19 people who are in LFW")
option("--cache", type=path, default=CACHE, metavar="DIR", help="folder for aligned faces, 32 KB each")
option("--lfw", type=path, nargs="*", default=[], metavar="DIR", help="LFW or other sets, evaluated after each epoch")
option("--lfw-landmarks", type=path, nargs="+", default=[], metavar="FILE", help="by default, lfw_landmark.py's")
option("--net", choices=tuple(NETS), help="faceNet has batch normalization (default: as in --init, or faceNet)")
option("--init", type=path, metavar="FILE", help="start from the network in this file, with new class centers")
option("--batch-size", type=at_least(2), default=512, metavar="N", help="faces per step over all devices")
option("--accumulate", type=at_least(1), default=1, metavar="K", help="split the batch into K parts, for less memory")
option("--epochs", type=positive, metavar="E", help="passes over the set (default: 28,000 steps of 512 faces)")
option("--lr", type=positive, metavar="RATE", help="peak learning rate (default: 0.1 for 512 faces, in proportion)")
option("--schedule", choices=("step", "cosine"), default="step", help="step: divide by 10 at 57%% and 86%%")
option("--warmup", type=at_least(0), default=0, metavar="STEPS", help="steps of linear learning rate warmup")
option("--weight-decay", type=at_least(0, float), default=5e-4, metavar="W", help="of convolutions and matrices")
option("--flip", action=BooleanOptionalAction, default=True, help="flip half of the faces")
option("--shift", type=at_least(0, int, 16), default=0, metavar="PIXELS", help="random translation, 0 to 16")
option("--loss", choices=("sphereface", "sphereface-r"), default="sphereface", help="sphereface-r: arXiv:2109.05565")
option("--margin", type=at_least(1, float, 5), metavar="M", help="m (default: 4, or 1.5 for sphereface-r)")
option("--lambda-min", type=at_least(0, float), default=5, metavar="L", help="final lambda of sphereface")
option("--scale", type=positive, help="s of sphereface-r (default: 30)")
option("--sample-centers", type=at_least(1e-9, float, 1), metavar="F", help="fraction of class centers seen by a step")
option("--shard-head", action=BooleanOptionalAction, default=False, help="spread the class centers over the processes")
option("--seed", type=at_least(0, int, 2**63 - 1), default=0, help="random seed")
option("--output", type=path, default=RUNS / "sphereFace", metavar="DIR", help="folder of the checkpoint and the logs")
option("--resume", nargs="?", choices=("always", "auto", "never"), const="always", default="never",
       help="continue the run in --output; auto: or start it")
option("--checkpoint-minutes", type=at_least(0, float), default=10, metavar="M", help="time between checkpoints")
option("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
option("--precision", choices=("auto", *PRECISION), default="auto", help="of the network; auto: the fastest")
option("--compile", action=BooleanOptionalAction, help="use torch.compile (default: in long runs on CUDA)")


@command
def main(argv: list[str] | None = None) -> int:
    """Read the command line, and train; return the exit status."""
    args = parse_resumed(parser, argv)
    run = Processes(args.device)                                      # rank, world_size and device of this process
    args.net = args.net or (net_in(args.init) if args.init else "faceNet")
    part, rest = divmod(args.batch_size, run.world_size * args.accumulate)    # faces at a time on a device
    if rest or part < 2:
        parser.error("--batch-size must be a multiple of processes x --accumulate, with at least 2 faces for each")
    if args.sample_centers and args.accumulate > 1:
        parser.error("--sample-centers can't be combined with --accumulate, as each part would draw its own centers")
    args.margin = args.margin or {"sphereface": 4, "sphereface-r": 1.5}[args.loss]
    if (args.margin % 1 or args.scale) if args.loss == "sphereface" else args.lambda_min != 5:
        parser.error("--loss sphereface takes a whole --margin and no --scale, and sphereface-r no --lambda-min")
    checkpoints = Checkpoints(run, args.output, args.resume, args.checkpoint_minutes)
    with checkpoints, run.explained(f"a device has {part} faces at a time; try --accumulate or a smaller --batch-size"):
        return train(args, run, part, checkpoints)


def train(args: Namespace, run: Processes, part: int, checkpoints: Checkpoints) -> int:
    """Train until the last step or a signal; return the exit status."""
    dtype = pick_dtype(args.precision, run.device)                    # of the network: bfloat16, float16 or float32
    settings = settings_of(args, dtype)
    sets = run.on_main(lambda: list(load_sets(find_sets(args.lfw), landmarks=args.lfw_landmarks, device=run.device,
                                              find_landmarks=find_landmarks)), share=False)    # None but in rank 0
    faces = load_casia(args.casia, args.landmarks, args.cache, args.drop_lfw_overlap, args.list)    # memory-mapped
    per_epoch = len(faces) // args.batch_size
    steps = max(1, round(args.epochs * per_epoch if args.epochs else 28_000 * 512 / args.batch_size))
    peak = args.lr or 0.1 * args.batch_size / 512
    if not per_epoch:
        raise InputError(f"{len(faces):,} faces are less than a step; choose a smaller --batch-size.")

    torch.set_float32_matmul_precision("high" if run.device.type == "cuda" and dtype != torch.float32 else "highest")
    torch.manual_seed(args.seed)
    net = initial_net(NETS[args.net], args.init).to(run.device, memory_format=memory_format(run.device))
    make_loss = partial(SphereFace, m=int(args.margin)) if args.loss == "sphereface" else \
        partial(SphereFaceR, s=args.scale or 30, m=args.margin)
    method, sharded = make_loss.func.__name__, args.shard_head or bool(args.sample_centers)
    loss_of = make_loss(faces.classes).to(run.device) if not sharded else \
        PartialFC(make_loss, faces.classes, run, args.sample_centers, args.seed, args.weight_decay)
    parameters = [*net.parameters(), *(() if sharded else loss_of.parameters())]
    optimizer = torch.optim.SGD([{"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
                                 {"params": [p for p in parameters if p.ndim > 1], "weight_decay": args.weight_decay}],
                                lr=peak, momentum=0.9, fused=run.device.type == "cuda" and dtype != torch.float16)
    scaler = torch.amp.GradScaler(run.device.type, enabled=dtype == torch.float16)
    step, threshold, sums = 0, None, {}
    if state := checkpoints.load(method, settings, faces.fingerprint, steps, sharded):
        step, threshold, sums = state["step"], state["threshold"], state["epoch"]
        net.load_state_dict(state["weights"])
        loss_of.load_state_dict(state["head"])
        load_optimizer(optimizer, scaler, state)

    if args.compile or args.compile is None and should_compile(run.device, (steps - step) * part * args.accumulate):
        compile_net(net, part, run.device, dtype, run.print)
    else:
        for_training(net, run.device, dtype)                          # faster convolutions on a CPU
    model, head = net, loss_of
    if run.world_size > 1:
        model = data_parallel(net, part, run.device, dtype)
        head = loss_of if sharded else DistributedDataParallel(loss_of)
    run.print(f"{faces}\ntraining {method} ({args.net}, {settings['precision']}) on {run}: {count_of(steps, 'step~')} "
              f"of {args.batch_size} faces, {steps / per_epoch:.2f} epochs, learning rate {peak:g}, into {args.output}")
    batches = Batches(faces, args.batch_size, steps, run.device, step, args.seed, args.flip, args.shift, run.rank,
                      run.world_size)
    with TrainingLog(run, args.output, args.batch_size, steps, per_epoch, step, settings, sums) as log, run.signals():
        for images, labels in batches:                                # (B, 3, 112, 96), (B,)
            for group in optimizer.param_groups:
                group["lr"] = rate = learning_rate(step, steps, peak, args.warmup, args.schedule)
            lam = SphereFace.annealing(step, args.lambda_min) if args.loss == "sphereface" else 0.0
            optimizer.zero_grad()
            for i, (x, label) in enumerate(zip(images.chunk(args.accumulate), labels.chunk(args.accumulate)), 1):
                with accumulating(i < args.accumulate, model, head):  # gradients are averaged in the last part only
                    with autocast(run.device, dtype):
                        embedding = model(x)                          # (B / accumulate, 512)
                    loss, predicted = head(embedding, label, lam)
                    scaler.scale(loss / args.accumulate).backward()   # scaled in float16 only
                log.record(loss, predicted, label, embedding, None if sharded else loss_of.weight)
            scaler.step(optimizer)
            if sharded:
                loss_of.update(rate, scaler)                          # SGD of its own, and scaler.update()
            else:
                scaler.update()
            step += 1
            log.end_step(learning_rate=rate, **{"lambda": lam})

            last = run.should_stop() or step == steps
            if epoch_ends := step % per_epoch == 0 or step == steps:
                figures, threshold = run.on_main(evaluate_epoch, net, sets, run.device, dtype, step, threshold)
                log.end_epoch(**figures)
            if last or epoch_ends or checkpoints.is_due():
                log.read()                                            # stops if the loss is not finite
                checkpoints.save({"method": method, "net": args.net, "step": step, "weights": net.state_dict(),
                                  "head": loss_of.state_dict(), "optimizer": optimizer.state_dict(),
                                  "scaler": scaler.state_dict(), "classes": faces.classes, "faces": faces.fingerprint,
                                  "settings": settings, "epoch": log.sums, "threshold": threshold}, last)
            if last:
                break
    return run.leave(step, steps, checkpoints.path)


def learning_rate(step: int, steps: int, peak: float, warmup: int, schedule: str) -> float:
    """Return the learning rate of a step, counted from 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
    return peak * 0.1 ** sum(step >= drop * steps for drop in (16 / 28, 24 / 28))    # the authors' schedule


if __name__ == "__main__":
    sys.exit(main())
