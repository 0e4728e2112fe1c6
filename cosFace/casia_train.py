"""Train CosFace (arXiv:1801.09414) on CASIA-WebFace.

    python cosFace/casia_train.py --casia DIR                          the default recipe, on the best device available
    python cosFace/casia_train.py --casia DIR --resume                 continue where it stopped
    torchrun --nproc-per-node 2 cosFace/casia_train.py --casia DIR     one process per GPU
    python cosFace/casia_train.py --casia DIR --batch-size 64 --lr 0.1 --warmup 100 --schedule cosine --epochs 6 \\
        --scale 30 --margin-warmup 1000 --jitter 2                     a small set on a laptop

DIR holds folders such as 0000045/001.jpg and casia_landmark.txt, or faces that are already aligned (see --help).
"""
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from faces.signals import end_quietly

end_quietly(__name__)    # Ctrl-C during the slow imports below prints no traceback
from cosFace.net import NETS, CosFace
from faces.data.batches import Batches
from faces.data.cache import load_casia
from faces.files import RUNS, InputError, command
from faces.training.checkpoint import Checkpoints, check_processes
from faces.training.folder import reserved
from faces.training.log import TrainingLog
from faces.training.optimizer import SGD, parameter_groups
from faces.training.recipe import make_recipe, memory_advice, parse_options, settings_of, start_line, training_parser
from faces.training.run import Run, micro_batches
from faces.training.sharded_head import make_head
from faces.verification.evaluator import LfwEvaluator
from faces.verification.weights import initial_net, net_in
from mtcnn.landmark_lists import find_landmarks


def parse_args(argv):
    parser = training_parser("Train CosFace on CASIA-WebFace.", output=RUNS / "cosFace")
    method = parser.add_argument_group("CosFace")
    method.add_argument("--scale", type=float, default=64, help="s, above 0; the paper's 64, or 30 for a small set")
    method.add_argument("--margin", type=float, default=0.35, help="m, at least 0 and below 1; the paper's 0.35")
    method.add_argument("--margin-warmup", type=int, default=0, metavar="STEPS",
                        help="steps over which the margin grows from 0; half of all steps help on a small set")
    args = parse_options(parser, argv, net_in)
    if not (args.scale > 0 and 0 <= args.margin < 1 and args.margin_warmup >= 0):
        raise InputError("--scale must be greater than 0, --margin at least 0 and below 1, --margin-warmup at least 0.")
    return args


@command
def main(argv=None):
    args = parse_args(argv)
    run = Run(args.device, args.precision, args.seed)
    with reserved(run, args.output, args.resume), run.explained(memory_advice(args)):
        return train(args, run)


def train(args, run):
    """Train until the last step or a signal; return the script's exit status."""
    net = initial_net(NETS[args.net], args.init)
    lfw = LfwEvaluator(run, args.lfw, args.lfw_landmarks, find_landmarks)
    faces = load_casia(args.casia, args.landmarks, args.cache, args.drop_lfw_overlap, args.list)
    recipe = make_recipe(args, len(faces))
    run.print(f"{faces}\n{recipe}")
    check_processes(run, settings_of(args), faces)

    net = run.prepare(net, args.batch_size // args.accumulate, args.compile, args.sync_bn)
    method = partial(CosFace, s=args.scale, m=args.margin)
    head = make_head(method, faces.classes, run, args.shard_head, args.sample_centers, args.seed)
    optimizer = SGD(parameter_groups(net, head, args.weight_decay), head, lr=recipe.base_lr, momentum=0.9)
    checkpoints = Checkpoints(run, args.output, net, head, optimizer, faces, settings_of(args), args.keep_last)
    step = checkpoints.restore(args.resume, recipe.steps)
    batches = Batches(faces, args.batch_size, recipe.steps, run.device, start=step, seed=args.seed, mirror=args.mirror,
                      jitter=args.jitter, workers=args.workers, rank=run.rank, world_size=run.world_size)
    run.print(start_line(args, run, head, batches))

    with TrainingLog(run, args.output, recipe, step, checkpoints.settings, checkpoints.epoch_sums) as log, run.guard():
        for images, labels in batches:                                        # (B, 3, 112, 96), (B,)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate = recipe.learning_rate(step)
            ramp = min(1.0, step / args.margin_warmup) if args.margin_warmup else 1.0
            optimizer.zero_grad()
            for x, label in micro_batches(images, labels, args.accumulate, net, head):
                with run.autocast():                                          # bf16 or fp16 for the network only
                    embedding = net(x)                                        # (B / accumulate, 512)
                loss, predicted = head(embedding, label, step=step, ramp=ramp)
                run.scaler.scale(loss / args.accumulate).backward()           # scaled in fp16 only
                log.record(loss, predicted, embedding, label, head)
            run.step(optimizer)
            log.end_step(learning_rate=learning_rate, margin=args.margin * ramp)
            step += 1

            last = run.should_stop() or step == recipe.steps
            if recipe.ends_epoch(step):
                figures, checkpoints.threshold = lfw.evaluate(net, step, checkpoints.threshold)
                log.end_epoch(**figures)
            if last or recipe.ends_epoch(step) or checkpoints.is_due(step):
                log.flush()                                                   # stops if the loss is not finite
                checkpoints.save(step, last, log.epoch_sums)
            if last:
                break
    return run.finish(step, recipe.steps, checkpoints.path)


if __name__ == "__main__":
    sys.exit(main())
