"""The checkpoint of a training run: one file, written in the background, from which the run resumes exactly.

All tensors in it are on the CPU, so torch.load(file, weights_only=True) opens it on any machine.
"""
import contextlib
import os
import platform
import sys
from argparse import ArgumentParser, Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

from faces.device import PRECISION
from faces.files import CHECKPOINT, InputError, atomic_write, load_tensors, locked
from faces.training.distributed import Processes
from faces.training.partial_fc import convert

# Options in which a run and its continuation may differ, because they do not change what is computed.
SETS = ("lfw", "lfw_landmarks")
MAY_DIFFER = {"casia", "landmarks", "list", "cache", "output", "resume", "checkpoint_minutes", "device", *SETS,
              "shard_head", "compile"}
EXCHANGED = {"checkpoint_minutes", "shard_head"}     # of these, what processes exchange depends on
SCHEDULE = ("epochs", "lr", "schedule", "warmup")    # may change when a run is resumed, which is printed


def parse_resumed(parser: ArgumentParser, argv: list[str] | None) -> Namespace:
    """Parse a command line. With --resume, options that it lacks are those of the checkpoint in --output, except for
    MAY_DIFFER; but without --lfw, the sets and their landmarks are the checkpoint's, too."""
    args = parser.parse_args(argv)
    file = args.output / "checkpoint.pt"
    if args.resume != "never" and file.is_file():
        state = _load(file)
        if unknown := state["settings"].keys() - vars(args).keys():
            raise InputError(f"{file} is a run of {state['method']}, which another casia_train.py trains (with "
                             f"--{min(unknown).replace('_', '-')}); use that, or choose another --output.")
        kept = {name: value for name, value in state["settings"].items()    # SETS were text in older checkpoints
                if name not in MAY_DIFFER or (name in SETS and not args.lfw and isinstance(value, list))}
        args = parser.parse_args(argv, Namespace(**kept))    # what it already holds are the defaults
    return args


def settings_of(args: Namespace, dtype: torch.dtype) -> dict:
    """Return the options as a dict that a checkpoint and JSON can hold, with the precision that "auto" stands for.
    Lists hold paths, which become absolute, because a run may be resumed in another folder."""
    plain = {name: value if isinstance(value, (int, float, type(None))) else
             list(map(os.path.abspath, value)) if isinstance(value, list) else str(value)
             for name, value in vars(args).items()}
    return {**plain, "precision": next(name for name in PRECISION if PRECISION[name] == dtype)}


class Checkpoints(contextlib.AbstractContextManager):
    """The file checkpoint.pt in the folder of a run, `output`; a context in which no other run trains into that folder.

    `resume` is "always"; "auto", which starts a new run if there is no checkpoint; or "never". `minutes` is the time
    between checkpoints. Only rank 0 reads and writes files, so that machines need no shared disk.
    """

    def __init__(self, run: Processes, output: Path, resume: str, minutes: float):
        self.run, self.path, self.resume, self.minutes = run, output / "checkpoint.pt", resume, minutes
        self.saved_at, self.saved_step = 0.0, None
        self.lock, self.writer = contextlib.ExitStack(), ThreadPoolExecutor(1, "checkpoint")
        self.writing = self.writer.submit(int)    # its last task; this one does nothing
        run.on_main(self._reserve)

    def _reserve(self):
        if self.resume == "never" and self.path.exists():
            raise InputError(f"{self.path} already holds a run; continue it with --resume or choose another --output.")
        if self.resume == "always" and not self.path.exists():
            raise InputError(f"there is no {self.path} to resume; check --output, or leave out --resume to start a run "
                             "(--resume auto does either).")
        folder = self.path.parent
        self.lock.enter_context(locked(folder / ".lock", f"training into {folder}", wait=False))
        for partial in folder.glob(".*.partial"):    # of a run that was killed
            partial.unlink(missing_ok=True)

    def __exit__(self, *_):
        self.writer.shutdown()    # after the last task
        self.lock.close()

    def load(self, method: str, settings: dict, faces: str, steps: int, sharded: bool) -> dict:
        """Return the checkpoint, with tensors on the CPU, or {} for a new run. Raise InputError if it does not fit the
        loss `method`, the `settings` of settings_of(), the fingerprint of the `faces` and the number of `steps`, or if
        processes differ in what they must agree on. With `sharded` centers, only rank 0 receives them."""
        alike = {name: value for name, value in settings.items() if name not in MAY_DIFFER - EXCHANGED}
        self.run.check_same(**alike, faces=faces)
        state = {}

        def read():
            if self.resume != "never" and self.path.exists():
                state.update(convert(_load(self.path), sharded))
                self._check(state, settings, method, faces, steps)
            return {**state, "head": {"step": state["step"]}} if state and sharded else state
        shared = self.run.on_main(read)
        self.saved_step = shared.get("step")
        if shared:
            self.run.print(f"resumed {self.path} at step {self.saved_step:,}")
        return state or shared    # rank 0 has all of it

    def _check(self, state, settings, method, faces, steps):
        if state["method"] != method:
            raise InputError(f"{self.path} is a run of {state['method']}, not of {method}; choose another --output.")
        if state["faces"] != faces:
            raise InputError(f"{self.path} was trained on another set of faces (another list, other labels or other "
                             "unusable images); resume with the same set, or start a new run from its network with "
                             "--init.")
        old = state["settings"]
        other = [name for name in settings if name not in MAY_DIFFER and old.get(name) != settings[name]]
        if unlike := [f"without --{name.replace('_', '-')}" if old.get(name) is None else
                      f"with --{name.replace('_', '-')} {old[name]}" for name in other if name not in SCHEDULE]:
            raise InputError(f"{self.path} was trained {', '.join(unlike)}; resume with the same settings.")
        if state["step"] > steps:
            raise InputError(f"{self.path} is at step {state['step']:,}, beyond the {steps:,} steps of this schedule; "
                             "pass more --epochs.")
        for name in other:
            print(f"--{name} is {settings[name]} from step {state['step']:,} on; it was {old.get(name)}")

    def is_due(self) -> bool:
        """Return whether it is time for a checkpoint, at the same step in all processes."""
        return self.run.clock - self.saved_at >= 60 * self.minutes

    def save(self, state: dict, last: bool = False):
        """Save rank 0's state, a dict of plain data and tensors; a thread writes a copy while training goes on.

        If the disk is full, the previous checkpoint stays, and training continues until the next attempt. The `last`
        one is waited for, and raises InputError if it can't be written; so do weights that are not finite.
        """
        self.writing.result()
        self.saved_at = self.run.clock
        if self.run.rank == 0:
            versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
            state = _on_cpu({"format": CHECKPOINT, **state, "versions": versions})
            self.writing = self.writer.submit(self._write, state, last)
            if last:
                self.writing.result()
        self.run.barrier()

    def _write(self, state, last):
        kept = "no earlier checkpoint exists" if self.saved_step is None else \
            f"the checkpoint of step {self.saved_step:,} is kept"
        if not all(torch.isfinite(t).all() for t in (*state["weights"].values(), state["head"]["weight"])):
            raise InputError(f"the weights are not finite after step {state['step']:,}; lower --lr, add --warmup, or "
                             f"try --precision float32; {kept}.")
        try:
            with atomic_write(self.path) as file:
                torch.save(state, file)
        except (InputError, RuntimeError) as error:    # torch's zip writer raises the latter if the disk is full
            reason = error if isinstance(error, InputError) else f"can't write {self.path}: is the disk full?"
            if last:
                raise InputError(f"{reason} The last steps are lost; {kept}.") from None
            tqdm.write(f"step {state['step']:,}: {reason} Training continues; {kept}.", file=sys.stderr)
        else:
            self.saved_step = state["step"]


def load_optimizer(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, state: dict):
    """Load momentum and scale from a checkpoint, but not settings such as `fused`, which depend on the device."""
    optimizer.load_state_dict({**state["optimizer"], "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter, values in optimizer.state.items():    # a fused kernel needs the parameter's memory format
        values["momentum_buffer"] = torch.empty_like(parameter).copy_(values["momentum_buffer"])
    scaler.load_state_dict(state["scaler"])


def _load(file):
    state = load_tensors(file)
    if not isinstance(state, dict) or state.get("format") != CHECKPOINT:
        raise InputError(f"{file} is not a training checkpoint of this project; move it away, or choose another "
                         "--output.")
    return state


def _on_cpu(value):
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    return [_on_cpu(item) for item in value] if isinstance(value, (list, tuple)) else value
