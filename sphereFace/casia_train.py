"""Train SphereFace (arXiv:1704.08063) on CASIA-WebFace.

    python casia_train.py --casia DIR                      the authors' recipe, on the best device there is
    python casia_train.py --casia DIR --resume             go on where it was stopped
    torchrun --nproc-per-node 8 casia_train.py --casia DIR one process per GPU
    python casia_train.py --casia DIR --batch-size 64 --lr 0.1 --warmup 100 --schedule cosine --epochs 6 \\
        --scale 30 --margin 1.5 --jitter 2                 a small set on a laptop

DIR holds folders such as 0000045/001.jpg and casia_landmark.txt, or faces already aligned (see --help).
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sphereFace.net import NETS, SphereFace, SphereFaceR
from faces.cache import load_casia
from faces.checkpoint import Checkpoints
from faces.errors import command
from faces.log import TrainingLog
from faces.probe import LfwProbe
from faces.recipe import make_recipe, training_parser
from faces.run import Run, no_decay_on_vectors
from faces.shard import SGD


def parse_args():
    parser = training_parser("Train SphereFace on CASIA-WebFace.")
    method = parser.add_argument_group("SphereFace")
    method.add_argument("--margin", type=float, default=4.0, metavar="M",
                        help="m, a whole number from 1 to 5; the paper's 4; with --scale any number, 1.5 is a good one")
    method.add_argument("--lambda-min", type=float, default=5, help="where lambda ends; the authors' 5")
    method.add_argument("--scale", type=float, metavar="S", help="SphereFace-R (arXiv:2109.05565): S in place of |x|, "
                        "and no lambda; 30 with --margin 1.5 for a small set (default: |x|, the paper's)")
    args = parser.parse_args()
    if not (1 <= args.margin <= 5 and (args.scale or args.margin.is_integer())):
        parser.error("--margin must be 1, 2, 3, 4 or 5; with --scale any number from 1 to 5")
    if not (args.lambda_min >= 0 and (args.scale is None or args.scale > 0)):
        parser.error("--lambda-min must be at least 0, --scale greater than 0")
    return args


@command
def main():
    args = parse_args()
    run = Run(args, "sphereFace")
    with run.first_goes_first():
        faces = load_casia(args.casia, args.landmarks, args.cache, args.drop_lfw_overlap, args.list)
    recipe = make_recipe(args, len(faces))
    net = run.parallel(NETS[args.net]())
    head = (run.head(SphereFaceR, faces.classes, args.scale, args.margin) if args.scale else
            run.head(SphereFace, faces.classes, int(args.margin)))
    optimizer = SGD(no_decay_on_vectors(net, head, args.weight_decay), recipe.peak, momentum=0.9)
    checkpoints = Checkpoints(run, args, faces, net, head, optimizer)
    lfw = LfwProbe(args, run)
    step = checkpoints.resume(args.resume)

    with TrainingLog(run, recipe, step, checkpoints.settings) as log, run.stopping_cleanly():
        for images, labels in run.batches(faces, recipe, step):    # (B, 3, 112, 96), (B,)
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate(step)
            lam = 0 if args.scale else SphereFace.annealing(step, args.lambda_min)
            optimizer.zero_grad()
            for part, identity in run.parts(images, labels, net, head):    # one part without --accumulate
                with run.autocast():
                    embedding = net(part)                          # (B, 512)
                loss, predicted = head(embedding, identity, lam)
                (loss / args.accumulate).backward()
                log.look(loss, predicted, embedding, identity, head)
            optimizer.step()
            log.add(learning_rate=recipe.learning_rate(step), **{"lambda": lam})
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
