"""The training recipe: the command line that both methods share, and what follows from it for a set of N faces."""
import argparse
import math
from pathlib import Path
from typing import NamedTuple

from faces.cache import DEFAULT
from faces.errors import InputError

# The authors' recipe (SphereFace's Caffe release, CosFace section 4.1): 28k iterations of 512 images, learning rate
# 0.1 divided by 10 after 16k and after 24k iterations.
IMAGES, BATCH, LEARNING_RATE, DROPS = 28_000 * 512, 512, 0.1, (16 / 28, 24 / 28)


def training_parser(description):
    """The options of casia_train.py that are not the method's own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=_Help)
    data = parser.add_argument_group("data")
    data.add_argument("--casia", type=Path, required=True, metavar="DIR",
                      help="CASIA-WebFace: folders such as 0000045/001.jpg, a zip of them, InsightFace's RecordIO "
                           "(train.rec, train.idx, property), or faces aligned to 96x112 or 112x112 pixels")
    data.add_argument("--landmarks", type=Path, metavar="FILE",
                      help="landmark list, `path label x1 y1 ... x5 y5` (default: casia_landmark.txt in --casia, or "
                           "what mtcnn/casia_landmark.py wrote for it; else the faces must be aligned already)")
    data.add_argument("--list", type=Path, metavar="FILE",
                      help="list, `path label`, of faces below --casia that are aligned already; labels 0, 1, 2, ... "
                           "(default: every image there, each folder a person)")
    data.add_argument("--drop-lfw-overlap", action=argparse.BooleanOptionalAction, default=False,
                      help="leave out the 19 people that CASIA-WebFace shares with LFW")
    data.add_argument("--cache", type=Path, default=DEFAULT, metavar="DIR",
                      help="where aligned faces are kept, 32 KB each (16 GB for CASIA); a local disk (default: "
                           "cache/ of this clone)")
    data.add_argument("--lfw", type=Path, metavar="DIR", help="LFW, to measure after each epoch")
    data.add_argument("--lfw-landmarks", type=Path, metavar="FILE",
                      help="landmark list of LFW (default: lfw_landmark.py's)")

    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--net", choices=("faceNet", "sphere20a"), default="faceNet",
                        help="faceNet has batch normalisation; sphere20a is the paper's net without it")
    recipe.add_argument("--batch-size", type=int, default=BATCH, metavar="N",
                        help="images a step, over all devices; on a CPU 64 to 128 learns more per hour")
    recipe.add_argument("--accumulate", type=int, default=1, metavar="K",
                        help="take the batch in K parts and the memory of one; batch normalisation sees a part")
    recipe.add_argument("--epochs", type=float, metavar="E",
                        help="passes over the set (default: the authors' 14.3 million images, 29 epochs of CASIA)")
    recipe.add_argument("--lr", type=float, metavar="RATE",
                        help="peak learning rate (default: the authors' 0.1 for 512 images, in proportion to the "
                             "batch)")
    recipe.add_argument("--schedule", choices=("step", "cosine"), default="step",
                        help="step: divide by 10 at 57%% and 86%%, the authors'; cosine: to zero, good for short runs")
    recipe.add_argument("--warmup", type=int, default=0, metavar="STEPS",
                        help="steps in which the learning rate grows linearly; 200 to 1000 for high rates")
    recipe.add_argument("--weight-decay", type=float, default=5e-4, metavar="W", help="L2 penalty of convolutions and "
                        "matrices; biases, PReLU and batch normalisation have none")
    recipe.add_argument("--mirror", action=argparse.BooleanOptionalAction, default=True, help="flip half of the faces")
    recipe.add_argument("--jitter", type=int, default=0, metavar="PIXELS",
                        help="move each face at random by up to this many pixels along x and y, 0 to 16, its border repeated; "
                             "2 as in the 2017 PyTorch port (default: not at all)")
    recipe.add_argument("--sample-centres", type=float, metavar="F",
                        help="fraction of the identities that a step's softmax sees, those of its batch always; 0.1 "
                             "for hundreds of thousands of identities; implies --shard-head (default: all of them)")
    recipe.add_argument("--seed", type=int, default=0, help="of weights, order and mirroring")

    run = parser.add_argument_group("run")
    run.add_argument("--output", type=Path, metavar="DIR", help="folder of this run (default: runs/METHOD)")
    run.add_argument("--resume", action="store_true", help="continue the run in --output exactly where it was saved")
    run.add_argument("--checkpoint-every", type=int, default=1000, metavar="STEPS",
                     help="steps between two checkpoints; one is saved as well when interrupted and at the end")
    run.add_argument("--keep-last", type=int, default=1, metavar="N",
                     help="checkpoints to keep: checkpoint.pt and the N - 1 before it, named by their steps")
    run.add_argument("--shard-head", action=argparse.BooleanOptionalAction, default=False,
                     help="spread the identities over torchrun's processes, so that a million fit; changes no result")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    run.add_argument("--precision", choices=("auto", "bf16", "float32"), default="auto",
                     help="of the network; auto takes bf16 where it is the faster: GPUs from Ampere on, CPUs "
                          "with AMX, AMD's from Zen 4 on")
    run.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False,
                     help="translate the network with torch.compile, which takes minutes and needs a C++ compiler or "
                          "Triton; else one sentence and no compiling")
    run.add_argument("--workers", type=int, metavar="N", help="reader processes (default: 0 on a CPU, 4 on a GPU)")
    return parser


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Appends the default to an option's help where there is one that the help doesn't name."""

    def _get_help_string(self, action):
        silent = action.default is None or action.default is False or "(default" in action.help
        return action.help if silent else super()._get_help_string(action)


class Recipe(NamedTuple):
    """What a run does, in steps of `batch` images. epoch: steps of a pass over the set, whose remainder is dropped."""
    batch: int
    epoch: int
    steps: int
    peak: float
    warmup: int
    schedule: str

    def learning_rate(self, step):
        """Learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        if self.schedule == "cosine":
            progress = (step - self.warmup) / max(1, self.steps - self.warmup)
            return self.peak * 0.5 * (1 + math.cos(math.pi * progress))
        return self.peak * 0.1 ** sum(step >= drop * self.steps for drop in DROPS)

    def __str__(self):
        return (f"{self.steps:,} steps of {self.batch} images: {self.steps / self.epoch:.2f} epochs of {self.epoch:,} "
                f"steps, learning rate {self.peak:g} ({self.schedule})")


def make_recipe(args, faces):
    """Scale the recipe to the batch and to the number of faces.

    Raises:
        InputError: a number that makes no sense, or a batch larger than the set.
    """
    if args.batch_size < 2 or args.warmup < 0 or args.checkpoint_every < 1 or args.keep_last < 1:
        raise InputError("--batch-size must be at least 2, --warmup at least 0, --checkpoint-every and --keep-last at "
                         "least 1.")
    if args.accumulate > 1 and args.sample_centres is not None:
        raise InputError("--accumulate and --sample-centres can't be used together, since each part would draw its "
                         "own centres; use --shard-head alone.")
    if not 0 <= args.jitter <= 16:
        raise InputError("--jitter must be 0 to 16 pixels.")
    if args.sample_centres is not None and not 0 < args.sample_centres <= 1:
        raise InputError("--sample-centres must be greater than 0 and at most 1.")
    if args.batch_size > faces:
        raise InputError(f"--batch-size {args.batch_size} is larger than the set of {faces} faces; choose a smaller "
                         "one.")
    peak = args.lr if args.lr is not None else LEARNING_RATE * args.batch_size / BATCH
    epoch = faces // args.batch_size
    steps = round(args.epochs * epoch) if args.epochs is not None else round(IMAGES / args.batch_size)
    if steps < 1 or not peak > 0:
        raise InputError("--epochs and --lr must be greater than 0.")
    return Recipe(args.batch_size, epoch, steps, peak, args.warmup, args.schedule)
