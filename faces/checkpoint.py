"""Training checkpoints: one file, written whole or not at all, that loads without unpickling any code."""
import os
import platform
import shutil
import sys
import warnings
import zipfile
from pathlib import Path

import torch
from tqdm import tqdm

from faces.errors import InputError
from faces.files import atomic_write
from faces.shard import ShardedHead

FORMAT = "faces-checkpoint-1"
MAX_BYTES = 8 * 10**9   # a million identities with momentum are half of it; checked before any memory is taken
# Settings that may differ between a run and its continuation, since they don't change what is computed.
FREE = frozenset({"casia", "landmarks", "list", "cache", "output", "resume", "checkpoint_every", "device", "workers",
                  "lfw", "lfw_landmarks", "shard_head", "keep_last"})
# Options that older checkpoints don't name, and what these runs did.
LATER = {"jitter": 0, "accumulate": 1, "compile": False}


class Checkpoints:
    """The checkpoint of a training run, checkpoint.pt in its folder: all that continues it exactly, and the model.

    With --keep-last N the N - 1 before it stay beside it under their steps' numbers, checkpoint-0001000.pt.

    Order, mirroring, learning rate and margin are functions of the seed and the step, so the step stands for them.

    Args:
        run: faces.run.Run.
        args: the command line's options.
        faces: faces.cache.AlignedFaces.
        net, head: modules, wrapped for several processes or not; the file is the same.
        optimizer: of both.
    """

    def __init__(self, run, args, faces, net, head, optimizer):
        self.run, self.path = run, run.output / "checkpoint.pt"
        self.settings = {name: value if isinstance(value, (int, float, type(None))) else str(value)
                         for name, value in vars(args).items()}
        self.faces, self.net, self.head, self.optimizer = faces, net, head, optimizer
        self.older, self.saved = args.keep_last - 1, None

    def resume(self, wanted):
        """Restore the run if `wanted`; return the step to start from.

        Raises:
            InputError: nothing to resume, something already there that would be overwritten, or other data or settings.
        """
        if not wanted:
            if self.path.exists():
                raise InputError(f"{self.path} holds a run already; go on with it by --resume or choose another "
                                 "--output.")
            return 0
        sharded = isinstance(self.head, ShardedHead)
        state = load(self.path, mmap=sharded)  # a process reads its own slice of the head only
        self._check_same(state)
        _unwrap(self.net).load_state_dict(state["weights"])
        head, optimizer = state["head"], state["optimizer"]
        if sharded:
            head, optimizer = self.head.own_state(head, optimizer, self.optimizer)
        _unwrap(self.head).load_state_dict(head)
        self.optimizer.load_state_dict(optimizer)
        self.saved = state["step"]
        print(f"resumed {self.path} at step {self.saved:,}")
        return self.saved

    def save(self, step, last=False):
        """Write the checkpoint after `step` steps; every process calls it, the first one writes.

        Where the disk is full, the checkpoint before stays and training goes on to the next attempt.

        Raises:
            InputError: it can't be written and is the `last` one.
        """
        head, optimizer = self.head.whole_state(self.optimizer) if isinstance(self.head, ShardedHead) else (
            _unwrap(self.head).state_dict(), self.optimizer.state_dict())
        if not self.run.first:
            return
        try:
            self._keep_older()
            save(self.path, {
                "method": type(_unwrap(self.head)).__name__, "net": self.settings["net"], "step": step,
                "weights": _unwrap(self.net).state_dict(), "head": head,
                "optimizer": optimizer, "classes": self.faces.classes,
                "faces": self.faces.fingerprint, "settings": self.settings,
                "versions": {"python": platform.python_version(), "torch": str(torch.__version__)}})
        except InputError as error:
            kept = "there is none before it" if self.saved is None else f"that of step {self.saved:,} is kept"
            if last:
                raise InputError(f"{error} Of the checkpoints, {kept}.") from None
            tqdm.write(f"step {step:,}: {error} Training goes on; {kept}.", file=sys.stderr)
            return
        self.saved = step
        self._prune()

    def _numbered(self, step):
        return self.path.with_name(f"checkpoint-{step:07d}.pt")

    def _keep_older(self):
        """Give the checkpoint that is about to be replaced a second name."""
        if not self.older or self.saved is None or self._numbered(self.saved).exists():
            return
        try:
            os.link(self.path, self._numbered(self.saved))
        except OSError:  # a file system without hard links
            with atomic_write(self._numbered(self.saved)) as file, open(self.path, "rb") as source:
                shutil.copyfileobj(source, file)

    def _prune(self):
        """Delete all numbered checkpoints but the newest; those beyond this step are of another past of this run."""
        steps = sorted(int(path.stem[11:]) for path in self.path.parent.glob("checkpoint-*.pt")
                       if path.stem[11:].isdecimal())
        for step in [step for step in steps if step < self.saved][:-self.older or None]:
            self._numbered(step).unlink(missing_ok=True)

    def _check_same(self, state):
        if state["faces"] != self.faces.fingerprint:
            raise InputError(f"{self.path} was trained on another set of faces (list, labels or unusable images "
                             "differ); resume with the same one.")
        settings = {**LATER, **state["settings"]}
        other = [name for name in self.settings if name not in FREE and settings.get(name) != self.settings[name]]
        if other:
            before = ", ".join(f"--{name.replace('_', '-')} {settings.get(name)}" for name in other)
            raise InputError(f"{self.path} was trained with {before}; resume with the same settings.")


def _unwrap(module):
    return getattr(module, "module", module)  # DistributedDataParallel puts the module one level down


def save(path, state):
    """Write a checkpoint atomically.

    Args:
        state: dict of tensors, numbers, strings and containers of them.

    Raises:
        InputError: the disk is full or not writable; the last good checkpoint stays.
    """
    try:
        with atomic_write(path) as file:
            torch.save({"format": FORMAT, **state}, file)
    except RuntimeError:  # torch's zip writer speaks of positions in the file where the disk is full
        raise InputError(f"can't write {path}, most likely since the disk is full; free some space.") from None


def load(path, mmap=False):
    """Read a checkpoint onto the CPU; mapped, it takes memory only where it is looked at.

    Raises:
        InputError: no such file, or not a checkpoint that this project wrote.
    """
    path = Path(path)
    state = load_tensors(path, mmap)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise InputError(f"{path} is not a training checkpoint of this project; give the checkpoint.pt of a run.")
    return state


def load_tensors(path, mmap=False):
    """Read any torch file on the CPU with the restricted unpickler, which builds tensors and containers only.

    Raises:
        InputError: no such file, no torch file, one over MAX_BYTES, or one that would run code.
    """
    path = Path(path)
    try:
        if _unpacked_bytes(path) > MAX_BYTES:
            raise InputError(f"{path} is over {MAX_BYTES // 10**9} GB, which no checkpoint is; give a checkpoint file.")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch remarks on unusual pickle protocols
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"can't read {path}: {error.strerror or error}; give a checkpoint file.") from None
    except Exception:  # the unpickler and the zip reader raise many kinds; all mean that the file is not to be used
        raise InputError(f"{path} is not a checkpoint that can be loaded safely (damaged, no torch file, or one that "
                         "would run code); give a file of tensors.") from None


def _unpacked_bytes(path):
    size = path.stat().st_size
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            size = max(size, sum(entry.file_size for entry in archive.infolist()))
    return size
