"""The folder of a training run: checked and reserved before the data are read, which may take hours."""
import contextlib

from faces.files import InputError, check_writable, locked


@contextlib.contextmanager
def reserved(run, output, resume):
    """Context in which no other run trains into a folder. Entering it removes what a killed run left half-written.

    Only the main process looks at the folder.

    Args:
        run: faces.training.run.Run.
        output: the folder, a Path; it is created.
        resume: "always", "auto" or "never"; see faces.training.checkpoint.Checkpoints.restore().

    Raises:
        InputError: another process is training into the folder, it can't be written, or it does not hold what `resume`
            expects.
    """
    with contextlib.ExitStack() as lock:
        run.on_main(_reserve, lock, output, resume)
        yield


def _reserve(lock, output, resume):
    check_resume(output / "checkpoint.pt", resume)
    check_writable(output)
    if (output / "epochs.jsonl").is_symlink():
        raise InputError(f"{output / 'epochs.jsonl'} is a link; remove it.")
    lock.enter_context(locked(output / ".lock", f"training into {output}", wait=False,
                              advice="choose another --output, on a writable local disk"))
    for name in ("checkpoint*.pt", "settings.json", "epochs.jsonl", "training.png"):
        for path in output.glob(f".{name}.*.partial"):
            path.unlink(missing_ok=True)


def check_resume(checkpoint, resume):
    """Raise InputError if there is a checkpoint and `resume` is "never", or if there is none and it is "always"."""
    if resume == "never" and checkpoint.exists():
        raise InputError(f"{checkpoint} already holds a run; continue it with --resume or choose another --output.")
    if resume == "always" and not checkpoint.exists():
        raise InputError(f"there is no {checkpoint} to resume; check --output, or leave out --resume to start a run "
                         "(--resume auto does either).")
