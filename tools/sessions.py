"""The journal of tools/reproduce.py: which commands have run, for how long, and which of them still have to."""
import time
from pathlib import Path
from typing import NamedTuple

from cosFace.net import NETS
from faces.device import count_cpus, processor
from faces.files import InputError, read_json, version, write_json
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
        try:
            started_with = {name: self.content[name] for name in key}
            self.all_sessions = self.content["sessions"]
            for session in self.all_sessions:
                session["stage"], session["command"], session["seconds"], session["status"], session["cpu"]
        except (KeyError, TypeError):
            raise InputError(f"{self.path} is damaged; {advice}.") from None
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
        weights = load_net(stage.product.parents[1], NETS)[1]
        try:
            results = read_json(stage.product, "it is made again")
            return results["settings"]["weights"]["fingerprint"] == weights["fingerprint"]
        except (InputError, KeyError, TypeError):
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
        settings = read_json(stage.product.with_name("settings.json"), "delete it, and run the command again")
        if stage.kind == "training" and settings:
            session["run"] = settings
        if stage.kind == "training" and session["status"] == 0 and version(stage.product) == before:
            self.all_sessions.remove(session)
        write_json(self.path, self.content)
        return session["status"]
