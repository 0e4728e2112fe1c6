"""The journal of tools/reproduce.py: which commands have run, for how long, and which of them still have to."""
import contextlib
import time
from pathlib import Path
from typing import NamedTuple

from cosFace.net import NETS
from faces.device import count_cpus, processor
from faces.files import InputError, read_json, version, write_json
from faces.training.content import is_count
from faces.verification.weights import load_net
from tools import commands


class Stage(NamedTuple):
    """A command of the reproduction.

    kind: "landmarks", "training" or "evaluation".
    of: what it is about, such as "LFW" or "cosFace".
    words: the command, see tools.commands.
    product: the file that it writes last.
    """
    kind: str
    of: str
    words: list
    product: Path

    @property
    def name(self):
        return f"{self.kind}, {self.of}"


class Journal:
    """What has run, in sessions.json: the training set, the training options, and the sessions of all stages.

    A session is one run of a command: stage, command, started, seconds (None if this program was killed before the
    command ended), status, cpu and, for training, the settings.json of the run.

    Raises:
        InputError: the folder holds another reproduction, or its journal is damaged.
    """

    def __init__(self, folder, casia, options):
        self.path, key = folder / "sessions.json", {"casia": str(casia.resolve()), "options": options}
        advice = "delete it, which only forgets how long stages took"
        self.content = read_json(self.path, advice) or {**key, "sessions": []}
        if not _is_journal(self.content):
            raise InputError(f"{self.path} is damaged; {advice}.")
        started_with, self.all_sessions = {name: self.content[name] for name in key}, self.content["sessions"]
        if started_with != key:
            raise InputError(f"{folder} was started with --casia {started_with['casia']} and the training options "
                             f"{started_with['options']}; repeat these to continue it, or choose another --output.")

    def sessions(self, stage):
        """Return the sessions of a stage."""
        return [session for session in self.all_sessions if session["stage"] == stage.name]

    def is_done(self, stage):
        """Return whether a stage has nothing left to do; training decides that by itself, from its checkpoint."""
        last = self.sessions(stage)[-1:]
        if stage.kind == "training" or not last or last[0]["status"] != 0 or last[0]["command"] != stage.words:
            return False
        if stage.kind == "landmarks":
            return stage.product.exists()
        try:
            weights = load_net(stage.product.parents[1], NETS)[1]
            results = read_json(stage.product, "it is made again")
            return results["settings"]["weights"]["fingerprint"] == weights["fingerprint"]
        except (InputError, KeyError, TypeError):    # the run has perhaps been deleted, to train again
            return False

    def run(self, stage):
        """Run a stage, record its session unless it was a training without a step, and return its exit status."""
        if stage.kind != "training" and any(session["status"] == 0 or session["command"] != stage.words
                                            for session in self.sessions(stage)):    # it starts anew
            self.all_sessions[:] = [session for session in self.all_sessions if session["stage"] != stage.name]
        session = {"stage": stage.name, "command": stage.words, "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
                   "seconds": None, "status": None, "cpu": f"{count_cpus()} cores of {processor()}"}
        self.all_sessions.append(session)
        write_json(self.path, self.content)
        start, before = time.monotonic(), version(stage.product)
        session["status"] = commands.run(stage.words)
        session["seconds"] = round(time.monotonic() - start, 1)
        if stage.kind == "training":
            with contextlib.suppress(InputError):    # of a run that failed early; the table needs it, and complains
                session["run"] = read_settings(stage.product.parent)
        if stage.kind == "training" and session["status"] == 0 and version(stage.product) == before:
            self.all_sessions.remove(session)
        write_json(self.path, self.content)
        return session["status"]


def read_settings(run):
    """Return what settings.json in the folder of a training run holds, as a dict.

    Raises:
        InputError: it is missing or damaged.
    """
    path, advice = run / "settings.json", f"restore it from a copy, or delete the folder {run} to train again"
    settings = read_json(path, advice)
    recipe = settings.get("recipe") if settings else None
    if not (_is_run(settings) and isinstance(recipe, dict)
            and all(is_count(recipe.get(name)) and recipe[name] for name in ("batch_size", "steps_per_epoch"))):
        raise InputError(f"{path} is missing or damaged; {advice}.")
    return settings


def is_number(value):
    """Return whether a value from a JSON file is a number that can be printed; NaN is one."""
    return type(value) in (int, float) and not abs(value) >= 2**63


def _is_journal(content):
    return (isinstance(content.get("casia"), str) and _are_texts(content.get("options"))
            and isinstance(content.get("sessions"), list) and all(map(_is_session, content["sessions"])))


def _is_session(value):
    def is_time(seconds):
        return seconds is None or is_number(seconds) and seconds >= 0
    return (isinstance(value, dict) and isinstance(value.get("stage"), str) and _are_texts(value.get("command"))
            and is_time(value.get("seconds", "missing")) and type(value.get("status", "missing")) in (int, type(None))
            and isinstance(value.get("cpu"), str) and ("run" not in value or _is_run(value["run"])))


def _is_run(value):
    """Return whether a value holds what the table says about the machine of a training."""
    versions = value.get("versions") if isinstance(value, dict) else None
    return (isinstance(versions, dict) and "git" in value and isinstance(value["git"], (str, type(None)))
            and _are_texts([value.get("device"), value.get("precision"),
                            *map(versions.get, ("python", "torch", "opencv"))]))


def _are_texts(values):
    return isinstance(values, list) and all(isinstance(value, str) for value in values)
