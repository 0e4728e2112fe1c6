"""What a training run says: a progress bar, TensorBoard scalars, one JSON line per epoch."""
import json
import math
import time

import torch
from tqdm import tqdm

from faces.errors import InputError
from faces.files import atomic_write

EVERY = 20  # steps between two readings of the loss; each reading waits for the device


class TrainingLog:
    """Collects figures of the steps, as a context manager; only the first process writes.

    Args:
        run: faces.run.Run.
        recipe: faces.recipe.Recipe.
        start: step that training starts from.
    """

    def __init__(self, run, recipe, start):
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only training needs it
        self.run, self.recipe, self.step = run, recipe, start
        print(recipe)
        if run.first:
            self._forget_after(start)
        self.board = SummaryWriter(run.output, purge_step=start) if run.first else None
        self.bar = tqdm(total=recipe.steps * recipe.batch, initial=start * recipe.batch, unit="img", unit_scale=True,
                        dynamic_ncols=True, disable=not run.first)
        self.epoch_start, self.epoch_sums, self.epoch_steps = time.monotonic(), {}, 0
        self._clear()

    def add(self, loss, correct, **scalars):
        """Take the figures of one step.

        Args:
            loss: scalar tensor.
            correct: bool (B,) tensor.
            scalars: further numbers, such as the learning rate.

        Raises:
            InputError: the loss is not finite.
        """
        self.loss += loss.detach()
        self.correct += correct.float().mean()
        self.count, self.step = self.count + 1, self.step + 1
        self.bar.update(self.recipe.batch)
        if self.count == EVERY or self.step == self.recipe.steps or self.step % self.recipe.epoch == 0:
            self._read(scalars)

    def flush(self):
        """Read what the steps since the last reading left, so that no checkpoint is written after a loss that is not
        finite."""
        if self.count:
            self._read({})

    def end_epoch(self, **figures):
        """Print and append the epoch's figures to epochs.jsonl."""
        means = {name: total / max(1, self.epoch_steps) for name, total in self.epoch_sums.items()}
        seconds = time.monotonic() - self.epoch_start
        line = {"epoch": round(self.step / self.recipe.epoch, 3), "step": self.step,
                **{name: round(value, 5) for name, value in means.items()},
                "images_per_second": round(self.epoch_steps * self.recipe.batch / seconds, 1), **figures}
        if self.run.first:
            with open(self.run.output / "epochs.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            for name in figures:
                self.board.add_scalar(name, figures[name], self.step)
            self.bar.write("  ".join(f"{name} {value}" for name, value in line.items()))
        self.epoch_start, self.epoch_sums, self.epoch_steps = time.monotonic(), {}, 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()  # before any message about an error, which then is the last line
        if self.board:
            self.board.close()

    def _forget_after(self, start):
        """Drop the epochs that a killed run wrote after the checkpoint it is resumed from."""
        path = self.run.output / "epochs.jsonl"
        if path.exists():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True)
                    if line.endswith("\n") and json.loads(line)["step"] <= start]
            with atomic_write(path, "w", encoding="utf-8") as file:
                file.writelines(kept)

    def _clear(self):
        self.loss = torch.zeros((), device=self.run.device)
        self.correct = torch.zeros((), device=self.run.device)
        self.count, self.since = 0, time.monotonic()

    def _read(self, scalars):
        loss, accuracy = self.loss.item() / self.count, self.correct.item() / self.count
        if not math.isfinite(loss):
            raise InputError(f"the loss is not finite near step {self.step}; lower --lr, add --warmup, or try --precision "
                             "float32. The last checkpoint is from before and is kept.")
        for name, value in (("loss", loss), ("accuracy", accuracy)):
            self.epoch_sums[name] = self.epoch_sums.get(name, 0.0) + value * self.count
        self.epoch_steps += self.count
        if self.board:
            rate = self.count * self.recipe.batch / (time.monotonic() - self.since)
            for name, value in {"loss": loss, "accuracy": accuracy, "images_per_second": rate, **scalars}.items():
                self.board.add_scalar(name, value, self.step)
        self.bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{accuracy:.3f}", refresh=False)
        self._clear()
