"""Train both methods on CASIA-WebFace by the default recipe, evaluate them on LFW, and write a table of the results.

    make reproduce CASIA=DIR LFW=DIR                                        LFW may also be an InsightFace .bin set
    make reproduce CASIA=DIR LFW=DIR ARGS="--epochs 1 --batch-size 16"      a small trial
    python tools/reproduce.py --casia DIR --lfw DIR                         the same without make

Options that are not listed here are passed to both casia_train.py; --device, --net, --landmarks and --lfw-landmarks
also affect the other commands. Landmarks are detected only if the faces are not aligned and there is no list yet. Each
command is printed before it runs. Stop it at any moment, and continue with the same command. The table is
runs/reproduce/results.md; it is written after each evaluation.
"""
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from faces.signals import end_quietly

end_quietly(__name__)    # Ctrl-C during the slow imports below prints no traceback
import torch

import cosFace.casia_train
import sphereFace.casia_train
from faces.align import crop_aligned
from faces.data.casia import list_casia
from faces.data.sources import is_zip
from faces.files import RUNS, InputError, atomic_write, command, locked, script_parser
from faces.images import UnreadableImage, read_image
from faces.landmarks import default_list
from faces.training.recipe import make_recipe
from faces.verification.binset import read_bin
from faces.verification.pairs import open_images, read_pairs
from tools.commands import command_line
from tools.reproduce_table import render
from tools.sessions import Journal, Stage

METHODS = {"cosFace": cosFace.casia_train, "sphereFace": sphereFace.casia_train}
SAMPLE = 20     # images that are opened to see whether the faces of a set are aligned


def parse_args(argv):
    """Return our options, and the list of those for training."""
    parser = script_parser(__doc__)
    parser.allow_abbrev = False
    parser.add_argument("--casia", type=_path, required=True, metavar="DIR",
                        help="photos in person folders, aligned faces, or InsightFace's RecordIO")
    parser.add_argument("--lfw", type=_path, required=True, metavar="DIR|FILE", help="LFW, or an InsightFace .bin set")
    parser.add_argument("--output", type=_path, default=RUNS / "reproduce", metavar="DIR",
                        help="folder for both runs and the table (default: runs/reproduce of this clone)")
    parser.add_argument("--processes", type=int, metavar="N",
                        help="training processes, started with torchrun (default: one per CUDA GPU)")
    args, options = parser.parse_known_args(argv)
    if args.processes is not None and args.processes < 1:
        parser.error("--processes must be at least 1")
    return args, options


def _path(text):
    return Path(os.path.abspath(Path(text).expanduser()))    # the same when it is continued from another folder


def plan(args, options):
    """Check the inputs, as far as that takes seconds, and return the list of Stage.

    Raises:
        InputError: a set, a list or an option can't be used.
    """
    training = [module.parse_args([*options, "--casia", str(args.casia), "--output", str(args.output / name),
                                   "--resume", "auto"]) for name, module in METHODS.items()]
    first, landmarks, stages = training[0], [], []
    processes = count_processes(args.processes, first)
    if check_casia(args.casia, training):
        output = args.output / "casia_landmark.txt"
        stages.append(_landmark_stage("casia", args.casia, output, first))
        landmarks = ["--landmarks", output]
    evaluation = check_lfw(args.lfw, first.lfw_landmarks)
    if evaluation is None:
        output = args.output / "lfw_landmark.txt"
        stages.append(_landmark_stage("lfw", args.lfw, output, first))
        evaluation = ["--landmarks", output]
    evaluation += ["--protocol", "folds", "tar", *["identification"] * has_names(args.lfw), *_device(first)]
    for name in METHODS:
        run = args.output / name
        words = command_line(f"{name}/casia_train.py", *options, "--casia", args.casia, *landmarks, "--output", run,
                             "--resume", "auto", processes=processes)
        stages.append(Stage("training", name, words, run / "checkpoint.pt"))
        words = command_line(f"{name}/lfw_eval.py", "--model", run / "checkpoint.pt", "--net", first.net, "--lfw",
                             args.lfw, *evaluation, "--output", run / "lfw")
        stages.append(Stage("evaluation", name, words, run / "lfw/results.json"))
    return stages


def _landmark_stage(name, root, output, training):
    words = command_line(f"mtcnn/{name}_landmark.py", f"--{name}", root, *_device(training), "--output", output)
    return Stage("landmarks", name.upper(), words, output)


def _device(training):
    return [] if training.device == "auto" else ["--device", training.device]


def count_processes(processes, training):
    """Return the number of training processes, checked against the batch size and the number of GPUs."""
    gpus = torch.cuda.device_count() if training.device in ("auto", "cuda") else 0
    processes = processes or max(1, gpus)
    if gpus and processes > gpus:
        raise InputError(f"--processes {processes} is more than the {gpus} GPU(s) of this machine; pass fewer.")
    if training.batch_size % (processes * training.accumulate):
        raise InputError(f"--batch-size {training.batch_size} can't be split into {training.accumulate} micro-batches "
                         f"for each of {processes} process(es); change it, or pass another --processes.")
    return processes


def check_casia(root, training):
    """Check the training set with the parsed options of both methods; return whether landmarks must be found."""
    listing = list_casia(root, training[0].landmarks, training[0].list)
    for options in training:
        make_recipe(options, len(listing.paths))
    if listing.points is not None or training[0].list or are_aligned(listing.source, listing.paths):
        return False
    if is_zip(root):
        raise InputError(f"there is no landmark list for {root}; unpack it, so that landmarks can be found, or pass a "
                         "list with --landmarks.")
    return True


def check_lfw(root, listed):
    """Return the options of lfw_eval.py about landmarks, or None if landmarks must be found first."""
    if _is_bin(root):
        return []
    if listed:
        return ["--landmarks", listed]
    pairs, source = read_pairs(root), open_images(root)
    if default_list(root, "lfw_landmark.txt").exists():
        return []
    if are_aligned(source, pairs.paths):
        return ["--aligned"]
    if is_zip(root):
        raise InputError(f"there is no landmark list for {root}; unpack it, so that landmarks can be found, or pass a "
                         "list with --lfw-landmarks.")
    return None


def has_names(lfw):
    """Return whether a verification set can be used for identification, as lfw_eval.py requires it."""
    pairs = read_bin(lfw)[0] if _is_bin(lfw) else read_pairs(lfw, identification=True)
    return pairs.named and pairs.people_with_several() >= 2


def _is_bin(path):
    return path.is_file() and not is_zip(path)


def are_aligned(source, names):
    """Return whether most of a sample of images have the size of aligned faces, 112x96 or 112x112."""
    aligned = []
    for name in names[::max(1, len(names) // SAMPLE)]:
        try:
            crop_aligned(read_image(source.open(name)))
            aligned.append(True)
        except UnreadableImage:
            continue
        except ValueError:    # another size
            aligned.append(False)
    return 2 * sum(aligned) > len(aligned)


@command
def main(argv=None):
    args, options = parse_args(argv)
    stages, finished = plan(args, options), []
    table = args.output / "results.md"
    with locked(args.output / ".lock", f"reproducing into {args.output}", wait=False):
        journal = Journal(args.output, args.casia, options)
        for stage in stages:
            status = 0 if journal.is_done(stage) else journal.run(stage)
            if status:    # the command may just have said "continue with --resume" about itself
                print(f"reproduce.py: the command above ended with exit status {status}; to continue, repeat the "
                      "command that you typed.", file=sys.stderr)
                return status
            finished.append(stage)
            if stage.kind == "evaluation":
                text = render(stages, finished, journal)
                with atomic_write(table, "w", encoding="utf-8") as file:
                    file.write(text)
    print(f"\n{text}\nThis table is {table}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
