"""Train both methods on CASIA-WebFace by the default recipe, evaluate them on LFW, and write a table of the results.

    make reproduce CASIA=DIR LFW=DIR                                        LFW may also be an InsightFace .bin set
    make reproduce CASIA=DIR LFW=DIR ARGS="--epochs 1 --batch-size 16"      a small trial

Options that are not listed here are passed to both casia_train.py. Stop it at any moment, and continue with the same
command: each of the commands that it prints and runs resumes by itself. The tables are in runs/reproduce/results.md,
with published values from tools/published.tsv.
"""
import csv
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch

import cosFace.casia_train
import sphereFace.casia_train
from faces import files
from faces.data.casia import list_casia
from faces.data.sources import open_photos
from faces.files import ROOT, RUNS, InputError, at_least, command, path, script_parser
from faces.landmarks import found_list
from faces.verification.binset import read_bin
from faces.verification.lfw import find_sets
from faces.verification.pairs import CONTENT, read_pairs
from tools.embedder import crop_faces

METHODS = {"cosFace": cosFace.casia_train, "sphereFace": sphereFace.casia_train}
PUBLISHED = Path(__file__).with_name("published.tsv")


def plan(args, options: list[str]) -> list[tuple]:
    """Check sets and options; return the words of each command, and the results.json it writes or None."""
    for module in METHODS.values():    # both must understand the options
        first = module.parser.parse_args(["--casia", str(args.casia), *options])
    device = [] if first.device == "auto" else ["--device", first.device]
    commands, evaluation = [], ["--protocol", "folds", "tar"]
    casia = list_casia(args.casia, first.landmarks, first.list)
    if casia.points is None and not first.list and not are_aligned(casia.source, casia.paths):
        commands.append((["mtcnn/casia_landmark.py", "--casia", args.casia, *device], None))
    sets = find_sets([args.lfw])
    if len(sets) > 1:
        raise InputError(f"{args.lfw} holds {len(sets)} sets; pass one of them, such as {sets[0]}.")
    if sets[0].is_file() and sets[0].suffix.lower() != ".zip":
        read_bin(sets[0])    # so that a mistake is noticed now
    else:
        images = open_photos(args.lfw, CONTENT)
        pairs = read_pairs(images, identification=True)
        evaluation += ["identification"] * pairs.identifiable()
        if first.lfw_landmarks:
            evaluation += ["--landmarks", *first.lfw_landmarks]
        elif found_list(images, "lfw_landmark.txt") is None:
            if are_aligned(images, pairs.paths):
                evaluation.append("--aligned")
            else:
                commands.append((["mtcnn/lfw_landmark.py", "--lfw", args.lfw, *device], None))
    processes = args.processes or (torch.cuda.device_count() if first.device in ("auto", "cuda") else 1)
    torchrun = [*"-m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node".split(), processes]
    for folder in METHODS:
        run = args.output / folder
        train = [f"{folder}/casia_train.py", "--casia", args.casia, *options, "--output", run, "--resume", "auto"]
        commands += [(torchrun + train if processes > 1 else train, None),
                     ([f"{folder}/lfw_eval.py", "--model", run, "--lfw", args.lfw, *evaluation, *device,
                       "--output", run / "lfw"], run / "lfw/results.json")]
    return [([ROOT / w if str(w)[-3:] == ".py" else w for w in words], results) for words, results in commands]


def are_aligned(source, names: list[str]) -> bool:
    """Return whether most of 20 images of a set have the size of aligned faces."""
    aligned = [isinstance(face, list) for face in crop_faces(map(source.open, names[::max(1, len(names) // 20)]))]
    return 2 * sum(aligned) > len(aligned)


def run(words: list) -> int:
    """Print a command as it is typed in the current folder, run it, and return its exit status."""
    here = [os.path.relpath(word) if isinstance(word, Path) and word.is_relative_to(ROOT) else str(word)
            for word in words]
    print(f"\n$ python {shlex.join(here)}", flush=True)
    process, received = subprocess.Popen([sys.executable, *here]), []

    def pass_on(number, _):    # the command saves its work first, and this program waits for that
        received.append(number)
        if number != signal.SIGINT:    # Ctrl-C reaches it by itself
            process.send_signal(number)
    with files.on_signals(pass_on):
        status = process.wait()
    if status not in (0, 2):    # 2 is a mistake, which the command has explained
        print(f"the command above ended with exit status {status}; to continue, repeat the command that you typed",
              file=sys.stderr)
    return 128 + received[-1] if received else abs(status)


def compare(state: dict, result: dict) -> list[str]:
    """Return the lines that compare a result with what others published for the same method and test set."""
    low, high = result["interval_95"]
    name = result.get("set", "lfw").lower().replace("-", "_")    # such as lfw, lfw_deepfunneled, cfp_fp
    with open(PUBLISHED, encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t") if name.startswith(row["test set"])
                and (row["method"] == state["method"] or row["network"].startswith("neighbor"))]
    if not rows:
        return [f"We know of no published value for {state['method']} on a set named {name}.", ""]
    lines = [f"| {state['method']} on {name}: {result['accuracy']:.4f} ({low:.4f} to {high:.4f}) | published | "
             "our interval | protocol | source |", "| --- " * 5 + "|"]
    for row in rows:
        said = "is below" if high < float(row["low"]) else "is above" if low > float(row["high"]) else "overlaps"
        published = row["low"] if row["low"] == row["high"] else f"{row['low']} to {row['high']}"
        lines.append(f"| {row['method']}, {row['network']} | {published} | {said} | {row['protocol']} | "
                     f"{row['source']} |")
    full = state["step"] * state["settings"]["batch_size"] > 0.95 * 28_000 * 512    # images of the default recipe
    if state["classes"] <= 10_000:
        lines += ["", f"These values are for all of CASIA-WebFace; your training set has {state['classes']:,} people."]
    elif full and name.startswith("lfw") and result["accuracy"] < 0.985:
        lines += ["", "This is low for the full recipe. Suspect the alignment (landmarks of the training set and LFW),",
                  "the channel order, and the labels of the training set (wrong, or one person in two folders)."]
    return [*lines, ""]


def render(args, commands: list[tuple]) -> str:
    """Return the text of results.md, with the methods that have been evaluated so far."""
    rows, facts, published = [], [], []
    for method in METHODS:
        folder = args.output / method
        result = files.read_json(folder / "lfw/results.json")
        if not result:
            continue
        state, counts = files.load_tensors(folder / "checkpoint.pt"), result["counts"]
        settings, versions = state["settings"], [f"{name} {version}" for name, version in state["versions"].items()]
        tar = next(point for point in result["tar"] if point["far"] == 1e-3)
        few = "" if tar["resolved"] else f" (only {tar['impostors']} impostor pairs)"
        rank_1 = f"{result['identification']['rank_1']:.4f}" if result["identification"] else "-"
        cells = (state["method"], result["settings"]["net"], f"{result['accuracy']:.4f} (std {result['std']:.4f})",
                 "{:.4f} to {:.4f}".format(*result["interval_95"]), f"{tar['tar']:.4f}{few}", rank_1,
                 f"{state['step'] * settings['batch_size']:,} of {state['classes']:,} people")
        rows.append(f"| {' | '.join(cells)} |")
        published += compare(state, result)
        facts = [f"- training set: {args.casia}",
                 f"- test set: {args.lfw}, {counts['pairs']:,} pairs of {counts['images']:,} images",
                 f"- trained in {settings['precision']} with {', '.join(versions)}"]
    typed = [shlex.join(map(str, words)).replace(f"{ROOT}{os.sep}", "") for words, _ in commands]
    return "\n".join(["# Results", "",
                      "| method | network | accuracy | 95 % interval | TAR@FAR=1e-3 | rank 1 | training images |",
                      "| --- | --- | --- | --- | --- | --- | --- |", *rows, "",
                      "The accuracy is the mean over the folds, with its standard deviation (ddof = 0) and a bootstrap",
                      "interval over identities.", "", *facts, "", "## Published accuracies", "",
                      "Our 95 % interval overlaps the published value or range, is below it, or is above it.", "",
                      *published, "## Commands", "",
                      *[f"    python {words}" for words in typed], ""])


@command
def main(argv=None):
    parser = script_parser(__doc__)
    parser.add_argument("--casia", type=path, required=True, metavar="DIR", help="as for casia_train.py")
    parser.add_argument("--lfw", type=path, required=True, metavar="DIR|FILE", help="as for lfw_eval.py")
    parser.add_argument("--output", type=path, default=RUNS / "reproduce", metavar="DIR", help="folder of runs, table")
    parser.add_argument("--processes", type=at_least(1), metavar="N", help="for torchrun (default: one per CUDA GPU)")
    args, options = parser.parse_known_args(argv)
    for name in ("casia", "lfw", "output"):    # the same when it is continued from another folder
        setattr(args, name, Path(os.path.abspath(getattr(args, name))))
    commands = plan(args, options)
    with files.locked(args.output / ".lock", f"reproducing into {args.output}", wait=False):
        for words, results in commands:
            model = results and results.parents[1] / "checkpoint.pt"
            if not (results and results.exists() and results.stat().st_mtime > model.stat().st_mtime):
                status = run(words)
                if status:
                    return status
            if results:
                with files.atomic_write(args.output / "results.md", "w") as file:
                    file.write(render(args, commands))
    print(f"\n{render(args, commands)}\nThis table is {args.output / 'results.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
