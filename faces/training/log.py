"""What a training run reports: progress bar, TensorBoard events, one JSON line per epoch, a picture, its settings."""
import contextlib
import json
import math
import platform
import subprocess
import sys
import time

import cv2
import numpy as np
import torch
from torch import distributed
from tqdm import tqdm

from faces.files import MAX_JSON, ROOT, InputError, atomic_write, open_regular, read_bytes, write_json
from faces.text import count_of
from faces.training.margin import ALL, where

HISTOGRAMS, BINS = ("genuine", "impostor"), 100
EVERY = 20  # steps between two readings of the loss; each makes the host wait for the device once


class TrainingLog:
    """Collects the figures of each step; a context manager. Only the main process writes.

    Args:
        run: faces.training.run.Run.
        output: folder of the run, a Path; see faces.training.folder.
        recipe: faces.training.recipe.Recipe.
        start: step that training starts from.
        settings: dict of the command line's options, for settings.json.
        epoch_sums: of the epoch that `start` lies in; see faces.training.checkpoint.Checkpoints.

    Attributes:
        epoch_sums: dict of float: loss and training accuracy, added up over the steps of the epoch so far, and steps.
    """

    def __init__(self, run, output, recipe, start, settings, epoch_sums=None):
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only training needs it
        self.run, self.output, self.recipe, self.step = run, output, recipe, start
        if run.is_main_process:
            self._forget_after(start)
            write_json(output / "settings.json", _describe(run, recipe, start, settings))
        self.board = SummaryWriter(output, purge_step=start + 1) if run.is_main_process else None
        self.bar = tqdm(total=recipe.steps * recipe.batch_size, initial=start * recipe.batch_size, unit=" images",
                        unit_scale=True, dynamic_ncols=True, disable=not run.is_main_process)
        self._begin_epoch()
        self.epoch_sums.update(epoch_sums or {})
        self._clear()

    def record(self, loss, predicted, embedding, labels, head):
        """Record a batch, or each micro-batch of it, without waiting for the device.

        Args:
            loss: scalar tensor.
            predicted: int64 (B,).
            embedding: float (B, 512).
            labels: int64 (B,).
            head: WholeHead or ShardedHead.
        """
        self.sums += torch.stack((loss.detach(), (predicted == labels).float().mean()))
        self.micro_batches += 1
        if self._is_read(self.count + 1, self.step + 1):
            self.geometry = geometry(*head.gather(embedding, labels))

    def end_step(self, **scalars):
        """End a step.

        Args:
            scalars: further numbers for TensorBoard, such as the learning rate.

        Raises:
            InputError: the loss is not finite.
        """
        self.count, self.step = self.count + 1, self.step + 1
        self.bar.update(self.recipe.batch_size)
        if self._is_read(self.count, self.step):
            self._read(scalars)

    def flush(self):
        """Read the steps since the last reading, so that no checkpoint is written after a loss that is not finite."""
        if self.count:
            self._read({})

    def end_epoch(self, **figures):
        """Print the figures of the epoch, append them to epochs.jsonl and draw training.png."""
        steps = max(1, self.epoch_sums.pop("steps", 0))
        means = {name: total / steps for name, total in self.epoch_sums.items()}
        seconds = self.since - self.epoch_start    # without the evaluation, which comes after the last reading
        line = {"epoch": round(self.step / self.recipe.steps_per_epoch, 3), "step": self.step,
                **{name: round(value, 5) for name, value in means.items()},
                "images_per_second": round(self.epoch_steps * self.recipe.batch_size / seconds, 1),
                **self._memory(), **figures}
        if self.run.is_main_process:
            self._try_to_write(self._write_epoch, line, figures)
            self.bar.write("  ".join(f"{name} {value}" for name, value in line.items()))
        self._begin_epoch()

    def _write_epoch(self, line, figures):
        with open_regular(self.output / "epochs.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._draw()
        for name in figures:
            self.board.add_scalar(name, figures[name], self.step)
        for name, counts in self.histograms.items():
            _add_histogram(self.board, f"cosine/{name}", counts, self.step)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()  # first, so that an error message is the last line
        if self.board:
            self.board.close()

    def _try_to_write(self, write, *args):
        """Call a function that writes a part of the log; a full disk, for example, must not end the training."""
        try:
            write(*args)
        except (OSError, InputError) as error:
            self.bar.write(f"step {self.step:,}: the log can't be written ({error}); training continues.",
                           file=sys.stderr)

    def _is_read(self, count, step):
        return count == EVERY or self.recipe.ends_epoch(step)

    def _draw(self):
        from faces.plots import training_picture  # slow to import as well
        lines, _ = _read_epochs(self.output / "epochs.jsonl")
        columns = [(line["step"] * self.recipe.batch_size, line["loss"], line.get("lfw", math.nan)) for line in lines]
        training_picture(self.output / "training.png", *np.array(columns).T)

    def _forget_after(self, start):
        """Drop the epochs that a killed run wrote after the checkpoint from which it is resumed, and damaged lines."""
        path = self.output / "epochs.jsonl"
        if path.exists():
            lines, damaged = _read_epochs(path)
            if damaged:
                self.run.print(f"left out: {count_of(damaged, 'damaged line~')} of {path}")
            with atomic_write(path, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines if line["step"] <= start)

    def _begin_epoch(self):
        self.epoch_start = self.since = time.monotonic()
        self.epoch_sums, self.epoch_steps, self.histograms = {}, 0, {}

    def _clear(self):
        self.sums = torch.zeros(2, device=self.run.device)    # of the loss and the accuracy
        self.count, self.micro_batches, self.since, self.geometry = 0, 0, time.monotonic(), {}

    def _read(self, scalars):
        loss, accuracy, geometry = self._fetch()
        if not math.isfinite(loss):
            raise InputError(f"the loss is not finite near step {self.step}; lower --lr, add --warmup, or try "
                             "--precision float32. Checkpoints from before are kept.")
        for name, value in (("loss", loss), ("train_accuracy", accuracy), ("steps", 1.0)):
            self.epoch_sums[name] = self.epoch_sums.get(name, 0.0) + value * self.count
        self.epoch_steps += self.count
        if self.board:
            rate = self.count * self.recipe.batch_size / (time.monotonic() - self.since)
            figures = {"loss": loss, "train_accuracy": accuracy, "images_per_second": rate, **scalars, **geometry,
                       **self._memory()}
            self._try_to_write(self._write_figures, figures)
        self.bar.set_postfix(loss=f"{loss:.3f}", train_accuracy=f"{accuracy:.3f}", refresh=False)
        self._clear()

    def _write_figures(self, figures):
        for name, value in figures.items():
            if name in HISTOGRAMS:
                self.histograms[name] = self.histograms.get(name, 0) + value
            else:
                self.board.add_scalar(name, value, self.step)

    def _memory(self):
        """Return the most memory that tensors of this process have used on its GPU; nothing on other devices."""
        if self.run.device.type != "cuda":
            return {}
        return {"gpu_memory_gb": round(torch.cuda.max_memory_allocated(self.run.device) / 1e9, 2)}

    def _fetch(self):
        """Return the mean loss and accuracy since the last reading, and the geometry, over all processes.

        They travel as one tensor, so that the host waits for the device once.
        """
        names = list(self.geometry)
        parts = [self.sums / self.micro_batches, *(self.geometry[name].reshape(-1) for name in names)]
        figures = torch.cat(parts)
        if self.run.world_size > 1:
            distributed.all_reduce(figures)
            figures /= self.run.world_size
        figures = figures.cpu().numpy().astype(float)
        values = np.split(figures, np.cumsum([len(part) for part in parts])[:-1])
        geometry = {name: value if name in HISTOGRAMS else value.item() for name, value in zip(names, values[1:])}
        return *values[0].tolist(), geometry


def _read_epochs(path):
    """Return the lines of an epochs.jsonl that are whole, as dicts, and how many others there are."""
    try:
        texts, lines = read_bytes(path, MAX_JSON).decode(errors="replace").splitlines(), []
    except OSError as error:
        raise InputError(f"can't read {path}: {error.strerror or error}; move it away.") from None
    for text in texts:
        with contextlib.suppress(ValueError, TypeError, KeyError, OverflowError, RecursionError):
            line = json.loads(text)
            numbers = {name: float(line[name]) for name in ("loss", "lfw") if name in line}
            if type(line["step"]) is int and 0 <= line["step"] < 2**53 and "loss" in numbers:
                lines.append({**line, **numbers})
    return lines, len(texts) - len(lines)


@torch.no_grad()
def geometry(embedding, labels, weight, centers=ALL):
    """Return how a batch relates to the class centers, without the (B, C) matrix of all cosines.

    Args:
        embedding: float (B, 512).
        labels: int64 (B,).
        weight: float (C, 512), C >= 2, the class centers, not normalized.
        centers: which class centers `weight` holds, if they are spread over processes.

    Returns:
        dict of scalar tensors: target_cosine, the mean cosine between an embedding and the center of its identity;
        nontarget_cosine, the mean over all other centers; embedding_norm, the mean |x|; and two histograms over -1 to
        1, float (BINS,): genuine, of the cosines with the identity's own center; impostor, of the cosines with the
        centers of the other identities in the batch.
    """
    embedding, weight = embedding.float(), weight.float()
    x = torch.nn.functional.normalize(embedding)                       # (B, 512)
    inverse_norm = 1 / weight.norm(dim=1).clamp_min(1e-12)             # (C,)
    columns, here = centers.targets(labels)
    own = weight[columns] * inverse_norm[columns, None]                # (B, 512), unit length
    own = centers.sum(where(None if here is None else here[:, None], own))
    cosine = x @ own.T                                                 # (B, B)
    target = cosine.diagonal().mean()
    total = centers.sum((x @ (inverse_norm @ weight)).mean())          # a sum of products is the product with the sum
    count = centers.sum(torch.full_like(target, len(weight)))
    # Values beyond the range are not counted. Selecting the others would make the host wait for their number.
    impostor = torch.where(labels[:, None] == labels, 2, cosine.clamp(-1, 1))
    return {"target_cosine": target, "nontarget_cosine": (total - target) / (count - 1),
            "embedding_norm": embedding.norm(dim=1).mean(),
            "genuine": torch.histc(cosine.diagonal().clamp(-1, 1), BINS, -1, 1),
            "impostor": torch.histc(impostor, BINS, -1, 1)}


def _add_histogram(board, name, counts, step):
    """Write a histogram over -1 to 1 whose counts were added up over an epoch."""
    limits = np.linspace(-1, 1, BINS + 1)
    middle = (limits[:-1] + limits[1:]) / 2
    board.add_histogram_raw(name, -1, 1, counts.sum(), counts @ middle, counts @ middle ** 2, limits[1:].tolist(),
                            counts.tolist(), step)


def _describe(run, recipe, start, settings):
    """Return what settings.json records about a run."""
    return {"settings": settings, "recipe": recipe._asdict(), "from_step": start, "git": _revision(),
            "started": time.strftime("%Y-%m-%d %H:%M:%S %z"), "processes": run.world_size,
            "device": run.devices, "precision": run.precision,
            "versions": {"python": platform.python_version(), "torch": str(torch.__version__),
                         "numpy": np.__version__, "opencv": cv2.__version__}}


def _revision(root=ROOT):
    """Return the commit of a clone, with the suffix -dirty if files differ from it; None if git can't tell."""
    if not (root / ".git").exists():  # git would report a repository around this folder
        return None
    try:
        git = subprocess.run(["git", "--no-optional-locks", "-C", root, "describe", "--always", "--dirty",
                              "--abbrev=40", "--exclude=*"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return git.stdout.strip() or None
