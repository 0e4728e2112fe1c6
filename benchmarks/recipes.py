"""Compare training recipes on held-out people, and draw what common mistakes do, with a network small enough for a CPU.

    python tools/holdout.py --casia DIR --output runs/holdout
    python benchmarks/recipes.py --casia DIR --holdout runs/holdout

Each trial runs casia_train.py on the people that holdout.py left, with half the channels at half the resolution. On two
cores, all of them take 80 minutes. The table has the AUC over all pairs of the held-out photos, with a 95 % interval
over people. The same command continues an interrupted run.
"""
import contextlib
import hashlib
import multiprocessing
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import torch
import torch.nn.functional as F
from joblib import cpu_count
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import cosFace.casia_train
import sphereFace.casia_train
from faces import plots
from faces.data.cache import build, load_casia
from faces.data.casia import list_casia, person
from faces.files import CACHE, RUNS, InputError, atomic_write, command, path, progress_bar, reading, script_parser
from faces.verification.bootstrap import interval
from faces.verification.embed import embed

MAX_PHOTOS = 3000    # of held-out people, 4.5 million pairs
METHODS = {"cosFace": cosFace, "sphereFace": sphereFace}
SCHEDULE = "--batch-size 64 --schedule cosine"
COSFACE = f"cosFace {SCHEDULE} --epochs 5 --warmup 100 --margin-warmup 800"
SPHEREFACE = f"sphereFace {SCHEDULE} --epochs 5 --warmup 100"
RECIPES = [f"{recipe} --net {net} --lr {rate}" for recipe in (
    f"{COSFACE} --scale 30 --margin 0.35", f"{COSFACE} --scale 30 --margin 0.4", f"{COSFACE} --scale 64 --margin 0.35",
    f"{SPHEREFACE} --loss sphereface", f"{SPHEREFACE} --loss sphereface-r")
    for net, rate in (("faceNet", 0.1), ("sphere20a", 0.03))]    # 0.1 is too much without batch normalization
SHORT = f"cosFace {SCHEDULE} --epochs 3 --scale 30"
GOOD = f"{SHORT} --warmup 100 --margin-warmup 400 --lr 0.1"
MISTAKES = {"no mistake": GOOD, "BGR in training": GOOD, "wrong crop in training": GOOD, "shuffled labels": GOOD,
            "learning rate x 20": f"{SHORT} --warmup 100 --margin-warmup 400 --lr 2", "no warmup": f"{SHORT} --lr 0.1"}
SEEDS = 2


def small(module, batch_norm, mistake):
    """Return the SphereNet of a net.py with half the channels for half the resolution, to be trained with a mistake."""
    class Small(module.SphereNet):
        def forward(self, x):
            if mistake.startswith("BGR") and self.training:
                x = x.flip(1)
            if mistake.startswith("wrong crop") and self.training:    # the face fills two thirds of what it should
                x = F.interpolate(F.pad(x, (24,) * 4), (112, 96), mode="bilinear")
            return super().forward(F.avg_pool2d(x, 2))

    module.CHANNELS = 32, 64, 128, 256
    net = Small(batch_norm)
    net.fc5 = torch.nn.Linear(256 * 4 * 3, 512)
    torch.nn.init.xavier_uniform_(net.fc5.weight)
    torch.nn.init.zeros_(net.fc5.bias)
    return net


def shuffled(faces):
    """Return AlignedFaces with permuted labels."""
    faces.labels = np.random.default_rng(0).permutation(faces.labels)
    return faces


def run_trial(trial):
    """Train, and write embeddings.npy, float32 (N, 1024), of the held-out faces."""
    args, folder, recipe, seed, mistake = trial
    if (folder / "embeddings.npy").exists():
        return
    method, *options = recipe.split()
    script, module = METHODS[method].casia_train, METHODS[method].net
    script.NETS = {"faceNet": lambda: small(module, True, mistake), "sphere20a": lambda: small(module, False, mistake)}
    if mistake == "shuffled labels":
        script.load_casia = lambda *options: shuffled(load_casia(*options))
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    options += ("--seed", seed, "--resume", "auto", "--device", "cpu", "--output", folder, "--cache", args.cache,
                "--casia", args.casia, "--landmarks", args.holdout / "train.txt", "--lfw", args.holdout / "heldout.bin")
    with open(folder / "log.txt", "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            status = script.main([str(option) for option in options])
        except SystemExit as exit:    # a pool would wait forever
            status = exit.code
        if status:
            raise InputError(f"a trial ended with status {status}; see {folder / 'log.txt'}.")
        state = torch.load(folder / "checkpoint.pt", weights_only=True)
        net = script.NETS[state["net"]]()
        net.load_state_dict(state["weights"])
        with atomic_write(folder / "embeddings.npy") as file:
            np.save(file, embed(net, held_out(args)[0], "cpu"))


def held_out(args):
    """Return the faces of people who are not in train.txt, uint8 (N, 112, 96, 3), and their labels, int (N,)."""
    train = set(map(person, list_casia(args.casia, args.holdout / "train.txt").paths))
    listing = list_casia(args.casia)
    images, failed, _ = build(listing, args.cache)
    usable = np.setdiff1d(np.arange(len(listing.paths)), [row for row, _ in failed])
    rows = [row for row in usable if person(listing.paths[row]) not in train]
    rows = np.sort(np.random.default_rng(0).permutation(rows)[:MAX_PHOTOS])
    return images[rows], listing.labels[rows]


def draws_of_auc(folder, people, counts):
    """Return the AUC over all pairs, float (R,), where each person counts as often as in `counts`, int (R, people)."""
    x = np.load(folder / "embeddings.npy")
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    left, right = np.triu_indices(len(x), 1)
    order = np.argsort((x @ x.T)[left, right])
    left, right = people[left[order]], people[right[order]]
    genuine, values = left == right, []
    for count in counts.astype(np.float32):
        weight = np.where(genuine, count[left], count[left] * count[right])    # as in faces/verification/bootstrap.py
        below = np.cumsum(np.where(genuine, 0, weight), dtype=np.float64)      # impostor pairs that are less alike
        own = np.where(genuine, weight, 0)
        values.append((own * below).sum() / own.sum(dtype=np.float64) / below[-1])
    return np.array(values)


def print_table(args, trials, pool):
    """Print each recipe's AUC by seed, their mean, and the difference from the first, both with an interval."""
    people = np.unique(held_out(args)[1], return_inverse=True)[1]
    rng, n = np.random.default_rng(0), people.max() + 1
    counts = np.stack((np.ones(n, int), *(np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(200))))
    aucs = np.array(pool.starmap(draws_of_auc, [(folder, people, counts) for _, folder, *_ in trials]))
    aucs = aucs.reshape(SEEDS, len(RECIPES), -1)
    means = aucs.mean(0)
    for recipe, seeds, mean in sorted(zip(RECIPES, aucs[:, :, 0].T, means), key=lambda row: -row[2][0]):
        low, high = interval(mean[1:])
        lower, upper = interval((mean - means[0])[1:])
        print(f"{recipe}: {' '.join(f'{value:.4f}' for value in seeds)}, mean {mean[0]:.4f} ({low:.4f} to {high:.4f}), "
              f"{mean[0] - means[0, 0]:+.4f} ({lower:+.4f} to {upper:+.4f}) from the first")


def draw_mistakes(args, trials):
    """Draw the loss, the training accuracy and the accuracy on held-out pairs, without and with each mistake."""
    figure, axes = plots.new_figure((12, 3.4), 3)
    for (_, folder, *_, mistake), color, style in zip(trials, plots.COLORS, plots.LINES):
        events = EventAccumulator(str(folder)).Reload()
        for panel, name in zip(axes, ("loss", "train_accuracy", "lfw")):
            steps, values = zip(*((event.step, event.value) for event in events.Scalars(name)))
            panel.plot(steps, values, color=color, linestyle=style, label=mistake, marker="o" if name == "lfw" else "")
    titles = "training loss", "training accuracy", "accuracy on pairs of held-out people"
    for panel, title, lowest in zip(axes, titles, (0, 0, 0.5)):
        panel.set(xlabel="steps", xlim=(0, None), ylim=(lowest, None))
        panel.set_title(title, fontsize=10)
    axes[1].legend(frameon=False, fontsize=9)
    plots.save(figure, args.output / "mistakes.png")


@command
def main(argv=None):
    args = _parse(argv)
    with reading(args.holdout / "train.txt", "list by holdout.py", "run tools/holdout.py"):
        depends = repr((RECIPES, MISTAKES, args.casia)).encode() + (args.holdout / "train.txt").read_bytes()
    args.output /= hashlib.sha256(depends).hexdigest()[:8]    # other trials get another folder
    trials = [(args, args.output / f"{recipe} seed {seed}".replace("--", "").replace(" ", "_"), recipe, seed, "")
              for seed in range(SEEDS) for recipe in RECIPES]
    mistakes = [(args, args.output / mistake.replace(" ", "_"), recipe, 0, mistake)
                for mistake, recipe in MISTAKES.items()]
    with multiprocessing.get_context("spawn").Pool(cpu_count(), maxtasksperchild=1) as pool:    # each patches modules
        todo = trials + mistakes
        for _ in progress_bar(pool.imap_unordered(run_trial, todo), total=len(todo), unit=" trials"):
            pass
        print_table(args, trials, pool)
    draw_mistakes(args, mistakes)
    print(f"picture: {args.output / 'mistakes.png'}")


def _parse(argv):
    parser = script_parser(__doc__)
    parser.add_argument("--casia", type=path, required=True, metavar="DIR", help="training set, as for casia_train.py")
    parser.add_argument("--holdout", type=path, required=True, metavar="DIR", help="--output of tools/holdout.py")
    parser.add_argument("--cache", type=path, default=CACHE, metavar="DIR", help="folder for aligned faces")
    parser.add_argument("--output", type=path, default=RUNS / "recipes", metavar="DIR", help="folder of the runs")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
