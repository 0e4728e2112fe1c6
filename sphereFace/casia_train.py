"""Train SphereFace (arXiv:1704.08063) on CASIA-WebFace.

    python sphereFace/casia_train.py --casia DIR                       the default recipe, on the best device available
    python sphereFace/casia_train.py --casia DIR --resume              continue where it stopped
    torchrun --nproc-per-node 2 sphereFace/casia_train.py --casia DIR  one process per GPU
    python sphereFace/casia_train.py --casia DIR --batch-size 64 --lr 0.1 --warmup 100 --schedule cosine --epochs 6 \\
        --scale 30 --margin 1.5 --jitter 2                             a small set on a laptop

DIR holds folders such as 0000045/001.jpg and casia_landmark.txt, or faces that are already aligned (see --help).
"""
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from faces.signals import end_quietly

end_quietly(__name__)    # Ctrl-C during the slow imports below prints no traceback
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
from sphereFace.net import NETS, SphereFace, SphereFaceR


def parse_args(argv):
    parser = training_parser("Train SphereFace on CASIA-WebFace.", output=RUNS / "sphereFace")
    method = parser.add_argument_group("SphereFace")
    method.add_argument("--margin", type=float, default=4.0, metavar="M",
                        help="m: 1, 2, 3, 4 or 5, the paper's 4; with --scale any number from 1 to 5, such as 1.5")
    method.add_argument("--lambda-min", type=float, default=5, help="final lambda, at least 0; the authors' 5")
    method.add_argument("--scale", type=float, metavar="S",
                        help="train SphereFace-R (arXiv:2109.05565), with S in place of |x| and without lambda; 30 "
                             "with --margin 1.5 for a small set (default: the paper's |x|)")
    args = parse_options(parser, argv, net_in)
    if not (1 <= args.margin <= 5 and (args.scale or args.margin.is_integer())):
        raise InputError("--margin must be 1, 2, 3, 4 or 5; with --scale any number from 1 to 5.")
    if not (args.lambda_min >= 0 and (args.scale is None or args.scale > 0)):
        raise InputError("--lambda-min must be at least 0, --scale greater than 0.")
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
    method = partial(SphereFace, m=int(args.margin)) if not args.scale else \
        partial(SphereFaceR, s=args.scale, m=args.margin)
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
            lam = 0.0 if args.scale else SphereFace.annealing(step, args.lambda_min)
            optimizer.zero_grad()
            for x, label in micro_batches(images, labels, args.accumulate, net, head):
                with run.autocast():                                          # bf16 or fp16 for the network only
                    embedding = net(x)                                        # (B / accumulate, 512)
                loss, predicted = head(embedding, label, step=step, lam=lam)
                run.scaler.scale(loss / args.accumulate).backward()           # scaled in fp16 only
                log.record(loss, predicted, embedding, label, head)
            run.step(optimizer)
            log.end_step(learning_rate=learning_rate, **{"lambda": lam})
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
