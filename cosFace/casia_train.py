"""Train CosFace (arXiv:1801.09414) on CASIA-WebFace.

    python casia_train.py --casia DIR                      the authors' recipe, on the best device there is
    python casia_train.py --casia DIR --resume             go on where it was stopped
    torchrun --nproc-per-node 8 casia_train.py --casia DIR one process per GPU
    python casia_train.py --casia DIR --batch-size 64 --lr 0.1 --warmup 100 --schedule cosine --epochs 6 \\
        --scale 30 --margin-warmup 1000 --jitter 2         a small set on a laptop

DIR holds folders such as 0000045/001.jpg and casia_landmark.txt, or faces already aligned (see --help).
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cosFace.net import NETS, CosFace
from faces.cache import load_casia
from faces.checkpoint import Checkpoints
from faces.errors import command
from faces.log import TrainingLog
from faces.probe import LfwProbe
from faces.recipe import make_recipe, training_parser
from faces.run import Run, no_decay_on_vectors
from faces.shard import SGD


def parse_args():
    parser = training_parser("Train CosFace on CASIA-WebFace.")
    method = parser.add_argument_group("CosFace")
    method.add_argument("--scale", type=float, default=64, help="s; the paper's 64, 30 for a small set")
    method.add_argument("--margin", type=float, default=0.35, help="m, at least 0 and below 1; the paper's 0.35")
    method.add_argument("--margin-warmup", type=int, default=0, metavar="STEPS",
                        help="steps in which the margin grows from 0; half of all steps help a small set")
    args = parser.parse_args()
    if not (args.scale > 0 and 0 <= args.margin < 1 and args.margin_warmup >= 0):
        parser.error("--scale must be greater than 0, --margin at least 0 and below 1, --margin-warmup at least 0")
    return args


@command
def main():
    args = parse_args()
    run = Run(args, "cosFace")
    with run.first_goes_first():
        faces = load_casia(args.casia, args.landmarks, args.cache, args.drop_lfw_overlap, args.list)
    recipe = make_recipe(args, len(faces))
    net = run.parallel(NETS[args.net]())
    head = run.head(CosFace, faces.classes, args.scale, args.margin)
    optimizer = SGD(no_decay_on_vectors(net, head, args.weight_decay), recipe.peak, momentum=0.9)
    checkpoints = Checkpoints(run, args, faces, net, head, optimizer)
    lfw = LfwProbe(args, run)
    step = checkpoints.resume(args.resume)

    with TrainingLog(run, recipe, step, checkpoints.settings) as log, run.stopping_cleanly():
        for images, labels in run.batches(faces, recipe, step):    # (B, 3, 112, 96), (B,)
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate(step)
            ramp = min(1.0, step / args.margin_warmup) if args.margin_warmup else 1.0
            optimizer.zero_grad()
            for part, identity in run.parts(images, labels, net, head):    # one part without --accumulate
                with run.autocast():
                    embedding = net(part)                          # (B, 512)
                loss, predicted = head(embedding, identity, ramp)
                (loss / args.accumulate).backward()
                log.look(loss, predicted, embedding, identity, head)
            optimizer.step()
            log.add(learning_rate=recipe.learning_rate(step), margin=args.margin * ramp)
            step += 1

            last = run.should_stop() or step == recipe.steps
            if step % recipe.epoch == 0 or step == recipe.steps:
                log.end_epoch(**lfw.measure(net))
            if step % args.checkpoint_every == 0 or last:
                log.flush()
                checkpoints.save(step, last)
            if last:
                break
    return run.finish(step, recipe)


if __name__ == "__main__":
    sys.exit(main())
