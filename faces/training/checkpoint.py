"""Training checkpoints: one file, written atomically, that loads without unpickling any code.

All tensors in it are on the CPU, so torch.load(path, weights_only=True) opens it on any machine.
"""
import io
import os
import platform
import shutil
import sys
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

from faces.files import InputError, atomic_write, entries_of_zip
from faces.text import count_of, printable
from faces.training.content import CONTENT, OPTIONAL
from faces.training.folder import check_resume
from faces.training.optimizer import copy_to_cpu
from faces.training.run import is_lost_connection, is_out_of_memory, unwrap

FORMAT = "faces-checkpoint-1"
MAX_READS = 4 * 10**6   # instructions of a pickle; a checkpoint has 50 or so per tensor
MAX_BYTES = 8 * 10**9   # of a file that has to be read as a whole; checked before any memory is taken
# Settings in which a run and its continuation may differ, because they do not change what is computed.
MAY_DIFFER = frozenset({"casia", "landmarks", "list", "cache", "output", "resume", "checkpoint_every", "device",
                        "checkpoint_minutes", "workers", "lfw", "lfw_landmarks", "shard_head", "keep_last"})
# Settings in which the processes of one run may differ: not in those that decide when and what they exchange.
MACHINES_MAY_DIFFER = MAY_DIFFER - {"checkpoint_every", "checkpoint_minutes", "shard_head"}
# Settings that may change when a run is resumed, which is stated: the schedule is a function of these and of the step.
SCHEDULE = ("epochs", "lr", "schedule", "warmup")
# How checkpoints of earlier versions are read: options that did not exist yet, with what runs did then, and former
# names.
ADDED = {"jitter": 0, "accumulate": 1, "compile": False, "sync_bn": False, "init": None}
RENAMED = {"sample_centres": "sample_centers"}


def check_processes(run, settings, faces):
    """Raise InputError if this process, perhaps on another machine, has other options or faces than the first.

    Every process calls it before they train together, because options decide what they exchange, and in which order;
    with different ones, they would wait for each other forever.

    Args:
        run: faces.training.run.Run.
        settings: dict of the command line's options.
        faces: faces.data.cache.AlignedFaces.
    """
    own = {**settings, "precision": run.precision}
    first, fingerprint = run.on_main(lambda: (own, faces.fingerprint))
    other = [name for name in first if name not in MACHINES_MAY_DIFFER and first[name] != own[name]]
    if other or fingerprint != faces.fingerprint:
        what = f"--{other[0].replace('_', '-')} {own[other[0]]}" if other else "another set of faces"
        raise InputError(f"process {run.rank} has {what}, unlike the first process; start all of them with the same "
                         "options and data (without a shared disk, --resume takes no options from the checkpoint).")


class Checkpoints:
    """The checkpoint of a training run, checkpoint.pt in its folder: the model, and all it takes to resume exactly.

    With keep_last N, the N - 1 previous ones stay beside it, named by their steps: checkpoint-0001000.pt. Order,
    mirroring, learning rate and margin are functions of seed and step, so only the step has to be saved.

    A thread writes the file from a copy of the tensors, while training goes on. Only the main process reads and writes
    files, so that machines need no shared disk.

    Args:
        run: faces.training.run.Run.
        output: folder of the run.
        net: module, wrapped in DistributedDataParallel or not; the file is the same.
        head: WholeHead or ShardedHead.
        optimizer: faces.training.optimizer.SGD, of both.
        faces: faces.data.cache.AlignedFaces.
        settings: dict of the command line's options.
        keep_last: number of checkpoints to keep.

    Attributes:
        epoch_sums: after restore(), what was passed to save().
        threshold: dict of the last evaluation during training, see faces.training.content.THRESHOLD; None if there was
            none. Only the main process has it. save() saves it, and restore() restores it.
    """

    def __init__(self, run, output, net, head, optimizer, faces, settings, keep_last=1):
        self.run, self.path = run, Path(output) / "checkpoint.pt"
        self.net, self.head, self.optimizer = net, head, optimizer
        self.faces, self.settings, self.keep_last = faces, {**settings, "precision": run.precision}, keep_last
        self.saved_step, self.saved_at, self.epoch_sums, self.threshold = None, 0.0, {}, None
        self.writer, self.writing = ThreadPoolExecutor(1, "checkpoint"), None

    def restore(self, resume, steps=None):
        """Load the checkpoint, depending on `resume`; return the step to start from.

        Args:
            resume: "always"; "auto", which starts a new run if there is no checkpoint; or "never".
            steps: number of steps of the whole run, which the checkpoint may not exceed; None does not check it.

        Raises:
            InputError: nothing to resume; with "never", a checkpoint that would be overwritten; or other data or
                settings than those of the checkpoint.
        """
        state = None

        def read():
            nonlocal state
            state = self._read(resume)
            if state is not None and steps is not None and state["step"] > steps:
                raise InputError(f"{self.path} is at step {state['step']:,}, beyond the "
                                 f"{count_of(steps, 'step~')} of this schedule; pass more --epochs.")
            if state is None:
                return None
            head, optimizer = self.head.shared(state["head"], state["optimizer"], self.optimizer)
            return {**state, "head": head, "optimizer": optimizer}
        shared = self.run.on_main(read)
        if shared is None:
            return 0
        state = state or shared    # the main process has all of it
        try:
            unwrap(self.net).load_state_dict(state["weights"])
            self.head.load_state(state["head"], state["optimizer"], self.optimizer)
            if state.get("scaler"):
                self.run.scaler.load_state_dict(state["scaler"])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            if is_out_of_memory(error) or is_lost_connection(error):
                raise
            # names or shapes of another network
            raise InputError(f"{self.path} does not fit this network and set, although its settings do; it is damaged: "
                             "restore it from a copy, or start a new run.") from None
        self.saved_step, self.epoch_sums, self.threshold = state["step"], state["epoch"], state["threshold"]
        self.run.print(f"resumed {self.path} at step {self.saved_step:,}")
        return self.saved_step

    def _read(self, resume):
        check_resume(self.path, resume)    # again, because another run may have ended before the folder was locked
        if resume == "never" or not self.path.exists():
            return None
        state = load(self.path)
        self._check_same(state)
        return state

    def is_due(self, step):
        """Return whether it is time for a checkpoint after this many steps, the same in all processes."""
        by_steps = self.settings["checkpoint_every"] and step % self.settings["checkpoint_every"] == 0
        return by_steps or self.run.clock - self.saved_at >= 60 * self.settings["checkpoint_minutes"]

    def save(self, step, last=False, epoch_sums=None):
        """Save the state after `step` steps; every process has to call it, and a thread of the main process writes.

        If the disk is full, the previous checkpoint stays and training continues until the next attempt.

        Args:
            last: whether there will be no further attempt; then, wait until the file is written.
            epoch_sums: dict of floats, what the log has added up since the epoch began, so that a resumed run reports
                the means of whole epochs.

        Raises:
            InputError: the weights are not finite; or it can't be written, and it is the last.
        """
        self._wait()
        self.run.barrier()    # while the previous checkpoint is written, nobody waits on a GPU
        head, optimizer = self.head.state(self.optimizer)
        self.saved_at = self.run.clock
        if not self.run.is_main_process:
            return
        self.writing = self.writer.submit(self._write, step, last, {
            "method": type(self.head.module).__name__, "net": self.settings["net"], "step": step,
            "epoch": dict(epoch_sums or {}), "threshold": self.threshold,
            "weights": {name: copy_to_cpu(tensor) for name, tensor in unwrap(self.net).state_dict().items()},
            "head": head, "optimizer": optimizer, "scaler": self.run.scaler.state_dict(),
            "classes": self.faces.classes, "faces": self.faces.fingerprint, "settings": self.settings,
            "versions": {"python": platform.python_version(), "torch": str(torch.__version__)}})
        if last:
            self._wait()

    def _wait(self):
        """Wait for the checkpoint that is being written, and raise what it raised."""
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()

    def _write(self, step, last, state):
        kept = "no earlier checkpoint exists" if self.saved_step is None else \
            f"the checkpoint of step {self.saved_step:,} is kept"
        tensors = [*state["weights"].values(), *state["head"].values()]
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
            raise InputError(f"the weights are not finite after step {step:,}; lower --lr, add --warmup, or try "
                             f"--precision float32; {kept}.")
        try:
            self._keep_previous()
            save(self.path, state)
        except InputError as error:
            if last:
                raise InputError(f"{error} The last steps are lost; {kept}.") from None
            tqdm.write(f"step {step:,}: {error} Training continues; {kept}.", file=sys.stderr)
            return
        self.saved_step = step
        self._prune()

    def _numbered(self, step):
        return self.path.with_name(f"checkpoint-{step:07d}.pt")

    def _keep_previous(self):
        """Give the checkpoint that is about to be replaced a second name."""
        if self.keep_last == 1 or self.saved_step is None or self._numbered(self.saved_step).exists():
            return
        try:
            os.link(self.path, self._numbered(self.saved_step))
        except OSError:  # a file system without hard links
            with atomic_write(self._numbered(self.saved_step)) as file, open(self.path, "rb") as source:
                shutil.copyfileobj(source, file)

    def _prune(self):
        """Delete the numbered checkpoints before the newest keep_last - 1. Later ones, from before a resume, stay."""
        names = [path.stem.removeprefix("checkpoint-") for path in self.path.parent.glob("checkpoint-*.pt")]
        steps = sorted(int(name) for name in names if name.isdecimal())
        older = self.keep_last - 1
        for step in [step for step in steps if step < self.saved_step][:-older or None]:
            self._numbered(step).unlink(missing_ok=True)

    def _check_same(self, state):
        if state["faces"] != self.faces.fingerprint:
            raise InputError(f"{self.path} was trained on another set of faces (another list, other labels or other "
                             "unusable images); resume with the same set, or start a new run from its network with "
                             "--init.")
        settings = settings_in(state)
        if settings["precision"] == "auto":    # as earlier versions saved it
            settings["precision"] = self.settings["precision"]
        other = [name for name in self.settings if name not in MAY_DIFFER and settings.get(name) != self.settings[name]]
        changed = [name for name in other if name in SCHEDULE]
        other = [name for name in other if name not in SCHEDULE]
        if other:
            before = ", ".join(f"--{name.replace('_', '-')} {printable(str(settings[name]))}"
                               if settings.get(name) is not None else
                               f"no --{name.replace('_', '-')}" for name in other)
            raise InputError(f"{self.path} was trained with {before}; resume with the same settings.")
        for name in changed:
            print(f"--{name} is {self.settings[name]} from step {state['step']:,} on; it was "
                  f"{printable(str(settings.get(name)))}")


def settings_in(state):
    """Return the settings of a checkpoint under their present names, with those that were added later."""
    return {**ADDED, **{RENAMED.get(name, name): value for name, value in state["settings"].items()}}


def save(path, state):
    """Write a checkpoint atomically.

    Args:
        state: dict of tensors, numbers, strings and containers of them.

    Raises:
        InputError: the disk is full or not writable; the previous file stays.
    """
    try:
        with atomic_write(path) as file:
            torch.save({"format": FORMAT, **state}, file)
    except RuntimeError:  # torch's zip writer raises this, with a message about file positions, if the disk is full
        raise InputError(f"can't write {path}, most likely because the disk is full; free some space.") from None


def load(path):
    """Read a checkpoint of this project onto the CPU; see load_tensors().

    Raises:
        InputError: no such file, or not a checkpoint of this project.
    """
    path = Path(path)
    try:
        state = load_tensors(path)
    except InputError as error:
        raise InputError(f"{error} To resume, put back an earlier checkpoint (--keep-last keeps some); to start anew, "
                         "move this one away.") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise InputError(f"{path} is not a training checkpoint of this project; pass the checkpoint.pt of a run.")
    state = {**OPTIONAL, **state}
    wrong = next((name for name, is_right in CONTENT.items() if name not in state or not is_right(state[name])), None)
    if wrong:
        raise InputError(f"{path} is damaged (its entry {wrong!r} is missing or not what casia_train.py writes); "
                         "restore it from a copy, or start a new run.")
    return state


def load_tensors(path):
    """Read any torch file onto the CPU with torch's restricted unpickler, which builds only tensors and containers.

    A file as torch.save writes it is mapped into memory, so that only the tensors that are used are read.

    Raises:
        InputError: no such file, not a torch file, one that would run code, or over MAX_BYTES and not mappable.
    """
    path = Path(path)
    try:
        size, mappable = _unpacked_bytes(path)
        if size > MAX_BYTES and not mappable:
            raise InputError(f"{path} is larger than {MAX_BYTES // 10**9} GB and has to be read as a whole; pass a "
                             "checkpoint of casia_train.py or a smaller file.")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about unusual pickle protocols
            with _CountedReader(open(path, "rb", buffering=0)) as file:
                return torch.load(path if mappable else file, map_location="cpu", weights_only=True, mmap=mappable)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"can't read {path}: {error.strerror or error}; pass a checkpoint file.") from None
    except Exception:  # the unpickler and the zip reader raise many kinds, which all mean that the file is unusable
        raise InputError(f"{path} is not a checkpoint that can be loaded safely (damaged, not a torch file, or it "
                         "would run code); pass a file of tensors.") from None


class _CountedReader(io.BufferedReader):
    """A file that may be read MAX_READS times: an instruction of one byte of a pickle can take 70 bytes of memory."""

    reads = 0

    def read(self, size=-1):
        self.reads += 1
        if self.reads > MAX_READS:
            raise ValueError("too many instructions")
        return super().read(size)


def _unpacked_bytes(path):
    """Return how many bytes a file unpacks to, and whether it is stored as it is and can be mapped into memory."""
    size = path.stat().st_size
    if not zipfile.is_zipfile(path):
        return size, False
    entries = entries_of_zip(path)
    if any(entry.filename.endswith("data.pkl") and entry.file_size > 2 * MAX_READS for entry in entries):
        raise ValueError("too many instructions")
    unpacked = sum(entry.file_size for entry in entries)
    return max(size, unpacked), unpacked <= size and all(e.compress_type == zipfile.ZIP_STORED for e in entries)
