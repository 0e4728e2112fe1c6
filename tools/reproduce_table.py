"""The results table of tools/reproduce.py, in Markdown."""
import json
import shlex

from faces.training import checkpoint

METHODS = {"cosFace": "CosFace", "sphereFace": "SphereFace"}
FAR = 1e-3


def render(stages, journal):
    """Return the text of results.md, with the methods that have been evaluated so far.

    Args:
        stages: list of tools.sessions.Stage.
        journal: tools.sessions.Journal.
    """
    done = [stage for stage in stages if stage.kind == "evaluation" and journal.is_done(stage)]
    results = [json.loads(stage.product.read_text(encoding="utf-8")) for stage in done]
    counts, settings = results[0]["counts"], results[0]["settings"]
    return "\n".join([
        "# Results", "", "| method | network | accuracy | 95 % interval | TAR@FAR=1e-3 | rank 1 | training images |",
        "| --- | --- | --- | --- | --- | --- | --- |", *map(_row, done, results), "",
        "The accuracy is the mean over the folds, with its standard deviation (ddof = 0) and a bootstrap interval over",
        "identities.", "",
        f"- training set: {journal.content['casia']}",
        f"- test set: {settings['lfw']}, {counts['pairs']:,} pairs of {counts['images']:,} images, landmarks: "
        f"{settings['landmarks']}", *_machines(stages, done, journal), "",
        "| stage | time | sessions |", "| --- | --- | --- |",
        *[_time_row(stage, journal.sessions(stage)) for stage in stages if journal.sessions(stage)], "",
        "Times are wall-clock times of the commands, summed over their sessions. They include start-up and, in the",
        "first training, the alignment of the faces.", "",
        "## Commands", "", *[f"    {shlex.join(stage.words)}" for stage in stages], ""])


def _row(stage, result):
    recipe, state = _settings(stage)["recipe"], checkpoint.load(stage.product.parents[1] / "checkpoint.pt")
    low, high = result["interval_95"]
    tar = next(point for point in result["tar"] if point["far"] == FAR)
    cells = (METHODS[stage.of], result["settings"]["net"], f"{result['accuracy']:.4f} (std {result['std']:.4f})",
             f"{low:.4f} to {high:.4f}",
             f"{tar['tar']:.4f}" + (f" (only {tar['impostors']} impostor pairs)" if not tar["resolved"] else ""),
             f"{result['identification']['rank_1']:.4f}" if result["identification"] else "-",
             f"{state['step'] * recipe['batch_size']:,} ({state['step'] / recipe['steps_per_epoch']:.1f} epochs, "
             f"{state['classes']:,} people)")
    return f"| {' | '.join(cells)} |"


def _machines(stages, done, journal):
    """Return lines on the devices, processors and versions of the trainings; all of them, if they changed."""
    sessions = [session for stage in stages if stage.kind == "training" for session in journal.sessions(stage)]
    runs = [session["run"] for session in sessions if "run" in session] or [_settings(stage) for stage in done]
    versions = [f"Python {run['versions']['python']}, torch {run['versions']['torch']}, OpenCV "
                f"{run['versions']['opencv']}" for run in runs]
    return [f"- trained on: {_distinct([run['device'] + ', ' + run['precision'] for run in runs])}",
            f"- processor: {_distinct([session['cpu'] for session in sessions])}",
            f"- versions: {_distinct(versions)}",
            f"- git revision: {_distinct([run['git'] or 'unknown' for run in runs])}"]


def _settings(stage):
    return json.loads((stage.product.parents[1] / "settings.json").read_text(encoding="utf-8"))


def _distinct(texts):
    return "; ".join(dict.fromkeys(texts))


def _time_row(stage, sessions):
    seconds = [session["seconds"] for session in sessions if session["seconds"] is not None]
    killed = len(sessions) - len(seconds)
    note = f" ({killed} killed, whose time is unknown and not included)" if killed else ""
    return f"| {stage.name} | {duration(sum(seconds))} | {len(sessions)}{note} |"


def duration(seconds):
    """Return a time as text, such as "3 h 25 min" or "40 s"."""
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes} min" if minutes < 120 else \
        f"{minutes // 60} h {minutes % 60:02d} min"
