"""The training recipe: the command line that both methods share, and the schedule that follows from it."""
import argparse
import math
import os
from pathlib import Path
from typing import NamedTuple

from faces.data.batches import THREADS
from faces.files import CACHE, InputError
from faces.text import count_of
from faces.training.checkpoint import MAY_DIFFER, load, settings_in

# The recipe of SphereFace's Caffe release: 28k iterations of 512 images, with a learning rate of 0.1 that is divided by
# 10 after 16k and after 24k iterations. CosFace's (section 4.1) has a third drop, after 28k of 30k.
IMAGES, BATCH_SIZE, LEARNING_RATE, DROPS = 28_000 * 512, 512, 0.1, (16 / 28, 24 / 28)


def training_parser(description, output):
    """Return a parser with the options of casia_train.py that both methods have.

    Args:
        description: of the script.
        output: default folder of the run.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=_Help)
    _add_data_options(parser.add_argument_group("data"))
    _add_recipe_options(parser.add_argument_group("recipe"))
    _add_run_options(parser.add_argument_group("run"), output)
    return parser


def _add_data_options(group):
    group.add_argument("--casia", type=Path, required=True, metavar="DIR",
                       help="CASIA-WebFace: person folders such as 0000045/001.jpg, a zip of them, InsightFace's "
                            "RecordIO (train.rec, train.idx, property), or faces already aligned to 112x96 or 112x112 "
                            "pixels")
    group.add_argument("--landmarks", type=Path, metavar="FILE",
                       help="landmark list, `path label x1 y1 ... x5 y5` (default: casia_landmark.txt in --casia, or "
                            "the list that mtcnn/casia_landmark.py wrote for it; without either, faces must be "
                            "aligned)")
    group.add_argument("--list", type=Path, metavar="FILE",
                       help="list of aligned faces below --casia, `path label`, with labels 0, 1, 2, ... (default: all "
                            "images, one person per folder)")
    group.add_argument("--drop-lfw-overlap", action=argparse.BooleanOptionalAction, default=False,
                       help="leave out the 19 people that CASIA-WebFace shares with LFW, by their folder names")
    group.add_argument("--cache", type=Path, default=CACHE, metavar="DIR",
                       help="folder for aligned faces, 32 KB each (default: cache/ of this clone)")
    group.add_argument("--lfw", type=Path, metavar="DIR",
                       help="LFW, to evaluate after each epoch; does not affect the training")
    group.add_argument("--lfw-landmarks", type=Path, metavar="FILE",
                       help="landmark list of LFW (default: the list that mtcnn/lfw_landmark.py wrote for it)")


def _add_recipe_options(group):
    group.add_argument("--net", choices=("faceNet", "sphere20a"), default="faceNet",
                       help="faceNet has batch normalization; sphere20a is SphereFace's network without it (default: "
                            "the network in --init, or faceNet)")
    group.add_argument("--init", type=Path, metavar="FILE",
                       help="start from the network in this file, with new class centers: a checkpoint of a run, on "
                            "whatever people, or public weights (default: random weights)")
    group.add_argument("--batch-size", type=int, default=BATCH_SIZE, metavar="N",
                       help="images per step over all devices, at least 2; on a CPU, 64 to 128 learns more per hour")
    group.add_argument("--accumulate", "--grad-accum-steps", type=int, default=1, metavar="K",
                       help="gradient accumulation: split the batch into K micro-batches, for less memory; batch "
                            "normalization sees one micro-batch at a time")
    group.add_argument("--epochs", type=float, metavar="E",
                       help="passes over the set (default: the authors' 14.3 million images, 29 epochs of CASIA)")
    group.add_argument("--lr", type=float, metavar="RATE",
                       help="peak learning rate (default: the authors' 0.1 for 512 images, scaled with the batch size)")
    group.add_argument("--schedule", choices=("step", "cosine"), default="step",
                       help="step: divide by 10 at 57%% and 86%%, as the authors; cosine: down to zero, good for "
                            "short runs")
    group.add_argument("--warmup", type=int, default=0, metavar="STEPS",
                       help="steps over which the learning rate grows linearly; 200 to 1000 for high rates")
    group.add_argument("--weight-decay", type=float, default=5e-4, metavar="W",
                       help="L2 penalty of convolutions and matrices; biases, PReLU and batch normalization have none")
    group.add_argument("--mirror", action=argparse.BooleanOptionalAction, default=True, help="flip half of the faces")
    group.add_argument("--jitter", type=int, default=0, metavar="PIXELS",
                       help="shift each face at random by up to this many pixels along x and y, 0 to 16; the 2017 "
                            "PyTorch port uses 2")
    group.add_argument("--sample-centers", "--sample-centres", type=float, metavar="F",
                       help="fraction of the class centers that a step's softmax sees, above 0 to 1, always including "
                            "those of the batch; 0.1 for hundreds of thousands of identities; implies --shard-head "
                            "(default: all)")
    group.add_argument("--seed", type=int, default=0, help="of initial weights, order, mirroring and shifts")


def _add_run_options(group, output):
    group.add_argument("--output", type=Path, default=output, metavar="DIR",
                       help=f"folder of this run (default: runs/{output.name} of this clone)")
    group.add_argument("--resume", nargs="?", choices=("always", "auto", "never"), const="always", default="never",
                       help="continue the run in --output exactly where it was saved; with auto, start it if there is "
                            "no checkpoint yet, for jobs that are requeued")
    group.add_argument("--checkpoint-minutes", type=float, default=10, metavar="MINUTES",
                       help="time between checkpoints, above 0; one is also saved after each epoch, when interrupted, "
                            "and at the end; training goes on while it is written")
    group.add_argument("--checkpoint-every", type=int, metavar="STEPS",
                       help="also save a checkpoint every STEPS steps, at least 1")
    group.add_argument("--keep-last", type=int, default=1, metavar="N",
                       help="checkpoints to keep: checkpoint.pt and the N - 1 before it, named by their steps")
    group.add_argument("--shard-head", action=argparse.BooleanOptionalAction, default=False,
                       help="spread the class centers over the processes of torchrun, so that a million identities "
                            "fit; does not change the result")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    group.add_argument("--precision", choices=("auto", "bf16", "fp16", "float32"), default="auto",
                       help="of the network; auto picks bf16 where it is faster (GPUs from Ampere on, CPUs with AMX, "
                            "AMD CPUs from Zen 4 on), and fp16 with loss scaling on older GPUs with tensor cores "
                            "(V100, T4, RTX 20)")
    group.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False,
                       help="compile the network with torch.compile, which takes 20 seconds to minutes and needs "
                            "Triton or a C++ compiler; on a CPU, training is faster without it")
    group.add_argument("--sync-bn", action=argparse.BooleanOptionalAction, default=False,
                       help="share the statistics of batch normalization among the GPUs of torchrun, which takes time; "
                            "for fewer than about 32 faces per GPU")
    group.add_argument("--workers", type=int, default=THREADS, metavar="N",
                       help="threads that gather batches; more help on slow disks")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Appends the default to an option's help if there is one that the help does not mention."""

    def _get_help_string(self, action):
        silent = action.default is None or action.default is False or "(default" in action.help
        return action.help if silent else super()._get_help_string(action)


class Recipe(NamedTuple):
    """The schedule of a run.

    batch_size: images per step.
    steps_per_epoch: steps of one pass over the set; images that do not fill a batch at its end are dropped.
    steps: of the whole run.
    base_lr: peak learning rate.
    warmup: steps over which the learning rate grows.
    schedule: "step" or "cosine".
    """
    batch_size: int
    steps_per_epoch: int
    steps: int
    base_lr: float
    warmup: int
    schedule: str

    def learning_rate(self, step):
        """Return the learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.base_lr * (step + 1) / self.warmup
        if self.schedule == "cosine":
            progress = (step - self.warmup) / max(1, self.steps - self.warmup)
            return self.base_lr * 0.5 * (1 + math.cos(math.pi * progress))
        return self.base_lr * 0.1 ** sum(step >= drop * self.steps for drop in DROPS)

    def ends_epoch(self, step):
        """Return whether an epoch, or the run, is complete after this many steps."""
        return step % self.steps_per_epoch == 0 or step == self.steps

    def __str__(self):
        return (f"{count_of(self.steps, 'step~')} of {self.batch_size} images: "
                f"{self.steps / self.steps_per_epoch:.2f} epochs of {count_of(self.steps_per_epoch, 'step~')}, "
                f"learning rate {self.base_lr:g} ({self.schedule})")


def parse_options(parser, argv, net_in):
    """Parse and check a command line.

    With --resume, the options that it lacks are those of the checkpoint in --output, except for options that do not
    change what is computed, such as --device. With --init, a missing --net is the network in that file.

    Args:
        parser: what training_parser() returned, perhaps with further options.
        argv: command line arguments; None takes sys.argv.
        net_in: function from the path of a file of weights to the name of its network.

    Raises:
        InputError: the checkpoint or the file of --init can't be read; see check_options() for more.
    """
    args = parser.parse_args(argv)
    path, unset = args.output / "checkpoint.pt", object()
    given = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), unset)))
    if args.resume != "never" and path.is_file():
        actions, state = {action.dest: action for action in parser._actions}, load(path)
        settings = settings_in(state)
        if not vars(args).keys() >= settings.keys():    # such as --margin-warmup in a run of SphereFace
            raise InputError(f"{path} is a run of {state['method']}, which another casia_train.py trains; use that, or "
                             "choose another --output.")
        for name, value in settings.items():
            if getattr(given, name, None) is unset and name not in MAY_DIFFER:
                if not _fits(actions[name], value):
                    raise InputError(f"{path} is damaged (its setting {name} is {value!r}); restore it from a copy, or "
                                     "start a new run.")
                setattr(args, name, Path(value) if actions[name].type is Path and value is not None else value)
    elif args.init is not None and given.net is unset:
        args.net = net_in(args.init)
    check_options(args)
    return args


def _fits(action, value):
    """Return whether an option could have this value, as settings_of() stores it."""
    if isinstance(action, argparse.BooleanOptionalAction):
        return isinstance(value, bool)
    if action.choices:
        return value in action.choices
    kinds = {int: (int,), float: (int, float), Path: (str,)}
    return not isinstance(value, bool) and (value is None and not action.default or isinstance(
        value, kinds.get(action.type, (str,))))


def check_options(args):
    """Check the options that both methods share, as far as that is possible without the data.

    Raises:
        InputError: a value out of range, or options that exclude each other.
    """
    for name, minimum in (("batch_size", 2), ("warmup", 0), ("keep_last", 1), ("checkpoint_every", 1)):
        if getattr(args, name) is not None and getattr(args, name) < minimum:
            raise InputError(f"--{name.replace('_', '-')} must be at least {minimum}.")
    if not args.checkpoint_minutes > 0:
        raise InputError("--checkpoint-minutes must be greater than 0.")
    if args.output.exists() and not args.output.is_dir():
        raise InputError(f"--output {args.output} is a file; choose a folder.")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % processes:
        raise InputError(f"--batch-size {args.batch_size} is not divisible by {processes} processes.")
    if args.accumulate < 1 or args.batch_size % (processes * args.accumulate):
        each = f" for each of {processes} processes" if processes > 1 else ""
        raise InputError(f"--batch-size {args.batch_size} can't be split into {args.accumulate} micro-batches"
                         f"{each}; change --accumulate.")
    if args.net == "faceNet" and args.batch_size < 2 * processes * args.accumulate:
        raise InputError(f"--batch-size {args.batch_size} leaves 1 face at a time, but batch normalization needs at "
                         "least 2; choose a larger batch, or --net sphere20a.")
    if args.accumulate > 1 and args.sample_centers is not None:
        raise InputError("--accumulate and --sample-centers can't be combined, because each micro-batch would draw "
                         "its own centers; use --shard-head alone.")
    if not (0 <= args.weight_decay < math.inf and 0 <= args.seed < 2**63 and args.workers >= 0):
        raise InputError("--weight-decay, --seed and --workers must be at least 0 and finite.")
    if not all(value is None or 0 < value < math.inf for value in (args.lr, args.epochs)):
        raise InputError("--epochs and --lr must be greater than 0 and finite.")
    if not 0 <= args.jitter <= 16:
        raise InputError("--jitter must be 0 to 16 pixels.")
    if args.sample_centers is not None and not 0 < args.sample_centers <= 1:
        raise InputError("--sample-centers must be greater than 0 and at most 1.")


def make_recipe(args, images):
    """Scale the recipe to the batch size and to the number of images.

    Raises:
        InputError: a batch larger than the set, or less than one step.
    """
    if args.batch_size > images:
        raise InputError(f"--batch-size {args.batch_size} is larger than the set of {count_of(images, 'face~')}; "
                         "choose a smaller one.")
    base_lr = args.lr if args.lr is not None else LEARNING_RATE * args.batch_size / BATCH_SIZE
    steps_per_epoch = images // args.batch_size
    steps = round(args.epochs * steps_per_epoch) if args.epochs is not None else round(IMAGES / args.batch_size)
    if steps < 1:
        raise InputError(f"--epochs {args.epochs:g} is less than one step of {args.batch_size} images; choose more.")
    return Recipe(args.batch_size, steps_per_epoch, steps, base_lr, args.warmup, args.schedule)


def memory_advice(args):
    """Return what to change if a step does not fit in the memory of a device, as part of a sentence."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    faces = args.batch_size // (processes * args.accumulate)
    advice = f"a step of --batch-size {args.batch_size} processes {count_of(faces, 'face~')} at a time on each device"
    split = next((k for k in range(args.accumulate + 1, args.batch_size + 1)
                  if args.batch_size % (processes * k) == 0), None)
    if args.sample_centers is not None or split is None:
        return f"{advice}; choose a smaller --batch-size, or more devices"
    fewer = args.batch_size // (processes * split)
    effect = "" if args.net == "sphere20a" else f" (batch normalization then sees {count_of(fewer, 'face~')}, too)"
    return (f"{advice}; pass --accumulate {split} for {fewer} at a time{effect}, or choose a smaller --batch-size or "
            "more devices")


def start_line(args, run, head, batches):
    """Return what a run says about itself before its first step: method, precision, devices, folder and data rate."""
    return (f"training {type(head.module).__name__} ({args.net}, {run.precision}) on {run.devices}, output "
            f"{args.output}; a thread gathers {batches.rate():,.0f} faces/s")


def settings_of(args):
    """Return the options as a dict that a checkpoint and JSON can hold."""
    return {name: value if isinstance(value, (int, float, type(None))) else str(value)
            for name, value in vars(args).items()}
