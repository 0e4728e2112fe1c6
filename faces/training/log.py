"""What a training run reports: progress bar, TensorBoard events, one JSON line per epoch, a picture, its settings."""
import contextlib
import json
import math
import platform
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import distributed

from faces.files import ROOT, InputError, atomic_write, progress_bar, reading, write_json
from faces.training.distributed import Processes

EVERY = 20    # steps between two readings of the loss; each makes the host wait for the device once


class TrainingLog(contextlib.AbstractContextManager):
    """Collects the figures of each step; a context manager. Only rank 0 writes, into the folder `output`.

    `steps` and `per_epoch` are the numbers of steps of the whole run and of an epoch. Training begins at step `start`;
    if nothing is left to train, nothing is written. `sums` are those of a checkpoint: the loss and training accuracy,
    added up over the steps of the epoch so far, and their number.
    """

    def __init__(self, run: Processes, output: Path, batch_size: int, steps: int, per_epoch: int, start: int,
                 settings: dict, sums: dict | None = None):
        self.run, self.output, self.batch_size, self.step = run, output, batch_size, start
        self.steps, self.per_epoch = steps, per_epoch
        self.board, self.lines = None, []    # of epochs.jsonl
        if run.rank == 0 and start < steps:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and only rank 0 needs it
            write_json(output / "settings.json", {
                "settings": settings, "from_step": start, "git": _revision(), "devices": str(run),
                "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
                "versions": {"python": platform.python_version(), "torch": str(torch.__version__),
                             "numpy": np.__version__, "opencv": cv2.__version__}})
            if (output / "epochs.jsonl").exists():    # without the epochs that a killed run did after its checkpoint
                with reading(output / "epochs.jsonl", "log of a run", "delete its last line"):
                    text = (output / "epochs.jsonl").read_text(encoding="utf-8")
                    self.lines = [line for line in map(json.loads, text.splitlines()) if line["step"] <= start]
            self.board = SummaryWriter(output, purge_step=start + 1)
        self.bar = progress_bar(total=steps * batch_size, initial=start * batch_size, unit=" images", unit_scale=True,
                                disable=run.rank > 0)
        self.sums, self.seconds, self.timed_steps = dict(sums or {}), 0.0, 0
        self._clear()

    def __exit__(self, *_):
        self.bar.close()    # first, so that an error message is the last line
        if self.board:
            self.board.close()

    def record(self, loss: torch.Tensor, predicted: torch.Tensor, label: torch.Tensor, embedding: torch.Tensor,
               weight: torch.Tensor | None = None):
        """Record a batch, or each micro-batch of it, without waiting for the device. `weight` is the class centers,
        float (C, 512); None if they are spread over the processes."""
        self.totals += torch.stack((loss.detach(), (predicted == label).float().mean()))
        self.micro_batches += 1
        if self._is_read(self.count + 1, self.step + 1):
            x = embedding.detach().float()
            self.geometry["embedding_norm"] = x.norm(dim=1).mean()
            if weight is not None:
                own = F.normalize(weight.detach()[label])
                self.geometry["target_cosine"] = (F.normalize(x) * own).sum(1).mean()

    def end_step(self, **scalars: float):
        """End a step; `scalars` are further numbers for TensorBoard. A loss that is not finite is an InputError."""
        self.count, self.step = self.count + 1, self.step + 1
        self.bar.update(self.batch_size)
        if self._is_read(self.count, self.step):
            self.read(**scalars)

    def read(self, **scalars: float):
        """Read the steps since the last reading, so that no checkpoint is written after a loss that is not finite."""
        if not self.count:
            return
        figures = self._fetch()
        if not math.isfinite(figures["loss"]):
            raise InputError(f"the loss is not finite near step {self.step}; lower --lr, add --warmup, or try "
                             "--precision float32. Checkpoints from before are kept.")
        for name, value in (("loss", figures["loss"]), ("train_accuracy", figures["train_accuracy"]), ("steps", 1.0)):
            self.sums[name] = self.sums.get(name, 0.0) + value * self.count
        seconds = time.monotonic() - self.since
        self.seconds, self.timed_steps = self.seconds + seconds, self.timed_steps + self.count
        self.bar.set_postfix(loss=f"{figures['loss']:.3f}", train_accuracy=f"{figures['train_accuracy']:.3f}",
                             refresh=False)
        rate = self.count * self.batch_size / seconds
        self._write({**figures, **scalars, **self._memory(), "images_per_second": rate})
        self._clear()

    def end_epoch(self, **figures: float):
        """Print the figures of the epoch, append them to epochs.jsonl and draw training.png."""
        steps = self.sums.pop("steps")
        means = {name: round(total / steps, 5) for name, total in self.sums.items()}
        rate = self.timed_steps * self.batch_size / self.seconds    # without the evaluation
        line = {"epoch": round(self.step / self.per_epoch, 3), "step": self.step, **means,
                "images_per_second": round(rate, 1), **self._memory(),
                **{name: round(value, 5) for name, value in figures.items()}}
        if self.run.rank == 0:
            self.bar.write("  ".join(f"{name} {value}" for name, value in line.items()))
        self._write(figures, line)
        self.sums, self.seconds, self.timed_steps = {}, 0.0, 0
        self.since = time.monotonic()

    def _write(self, figures, line=None):
        """Write TensorBoard's events, and the line of an epoch; a full disk must not end the training."""
        if self.run.rank > 0:
            return
        try:
            for name, value in figures.items():
                self.board.add_scalar(name, value, self.step)
            if line:
                self.lines.append(line)
                with atomic_write(self.output / "epochs.jsonl", "w") as file:
                    file.writelines(json.dumps(line) + "\n" for line in self.lines)
                self._draw()
        except (OSError, InputError) as error:
            self.bar.write(f"step {self.step:,}: the log can't be written ({error}); training continues.",
                           file=sys.stderr)

    def _is_read(self, count, step):
        return count == EVERY or step % self.per_epoch == 0 or step == self.steps

    def _clear(self):
        self.totals = torch.zeros(2, device=self.run.device)    # of the loss and the accuracy
        self.count, self.micro_batches, self.since, self.geometry = 0, 0, time.monotonic(), {}

    def _fetch(self):
        """Return the mean loss and accuracy since the last reading, and the geometry, over all processes."""
        names = ["loss", "train_accuracy", *self.geometry]
        figures = torch.cat((self.totals / self.micro_batches, *(value[None] for value in self.geometry.values())))
        if self.run.world_size > 1:
            distributed.all_reduce(figures)
            figures /= self.run.world_size
        return dict(zip(names, figures.tolist()))    # the host waits for the device once

    def _memory(self):
        """Return the most memory that tensors of this process have used on its GPU; nothing on other devices."""
        if self.run.device.type != "cuda":
            return {}
        return {"gpu_memory_gb": round(torch.cuda.max_memory_allocated(self.run.device) / 1e9, 2)}

    def _draw(self):
        from faces import plots  # slow to import as well
        columns = [(line["step"] * self.batch_size, line["loss"],
                    line.get("mean_accuracy", line.get("lfw", math.nan))) for line in self.lines]
        plots.picture(self.output / "training.png", (6, 4), plots.draw_training, *np.array(columns).T)


def _revision():
    """Return the commit of the clone, with the suffix -dirty if files differ from it; None if git can't tell."""
    command = ["git", "--no-optional-locks", "-C", ROOT, "describe", "--always", "--dirty", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if (ROOT / ".git").exists():    # git would report a repository around this folder
            return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip() or None
