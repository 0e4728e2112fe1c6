"""The results table of tools/reproduce.py, in Markdown."""
from faces.files import InputError, read_json
from faces.text import printable
from faces.training import checkpoint
from faces.training.content import is_count
from tools.commands import printed
from tools.sessions import is_number, read_settings

METHODS = {"cosFace": "CosFace", "sphereFace": "SphereFace"}
FAR = 1e-3


def render(stages, finished, journal):
    """Return the text of results.md, with the methods that have been evaluated so far.

    Args:
        stages: list of tools.sessions.Stage.
        finished: those whose evaluation is known to be done; the journal may know of others.
        journal: tools.sessions.Journal.

    Raises:
        InputError: a file of a method that has been evaluated is missing or damaged.
    """
    done = [stage for stage in stages if stage.kind == "evaluation" and (stage in finished or journal.is_done(stage))]
    results = [_read_results(stage.product) for stage in done]
    counts, settings = results[0]["counts"], results[0]["settings"]
    lines = [
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
        "## Commands", "", *[f"    {printed(stage.words)}" for stage in stages]]
    return "".join(f"{printable(line)}\n" for line in lines)    # much of it comes from files


def _row(stage, result):
    run = stage.product.parents[1]
    recipe, state = read_settings(run)["recipe"], checkpoint.load(run / "checkpoint.pt")
    low, high = result["interval_95"]
    tar = next(point for point in result["tar"] if point["far"] == FAR)
    cells = (METHODS[stage.of], result["settings"]["net"], f"{result['accuracy']:.4f} (std {result['std']:.4f})",
             f"{low:.4f} to {high:.4f}",
             f"{tar['tar']:.4f}" + (f" (only {tar['impostors']} impostor pairs)" if not tar["resolved"] else ""),
             f"{result['identification']['rank_1']:.4f}" if result["identification"] else "-",
             f"{state['step'] * recipe['batch_size']:,} ({state['step'] / recipe['steps_per_epoch']:.1f} epochs, "
             f"{state['classes']:,} people)")
    return _table_row(*cells)


def _table_row(*cells):
    escaped = [cell.replace("|", r"\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def _machines(stages, done, journal):
    """Return lines on the devices, processors and versions of the trainings; all of them, if they changed."""
    sessions = [session for stage in stages if stage.kind == "training" for session in journal.sessions(stage)]
    runs = [session["run"] for session in sessions if "run" in session] or [
        read_settings(stage.product.parents[1]) for stage in done]
    versions = [f"Python {run['versions']['python']}, torch {run['versions']['torch']}, OpenCV "
                f"{run['versions']['opencv']}" for run in runs]
    return [f"- trained on: {_distinct([run['device'] + ', ' + run['precision'] for run in runs])}",
            f"- processor: {_distinct([session['cpu'] for session in sessions])}",
            f"- versions: {_distinct(versions)}",
            f"- git revision: {_distinct([run['git'] or 'unknown' for run in runs])}"]


def _read_results(path):
    advice = "delete it, and the evaluation is repeated"
    results = read_json(path, advice)
    if results is None or not _are_results(results):
        raise InputError(f"{path} is missing or damaged; {advice}.")
    return results


def _are_results(value):
    """Return whether results.json holds what the table takes from it."""
    def has(names, is_right, holder=value):
        return isinstance(holder, dict) and all(is_right(holder.get(name)) for name in names)

    def is_text(text):
        return isinstance(text, str)
    points, interval, identification = value.get("tar"), value.get("interval_95"), value.get("identification")
    return (has(("accuracy", "std"), is_number) and isinstance(interval, list) and len(interval) == 2
            and all(map(is_number, interval)) and isinstance(points, list)
            and all(has(("far", "tar"), is_number, point) and has(["impostors"], is_count, point)
                    and type(point.get("resolved")) is bool for point in points)
            and any(point["far"] == FAR for point in points)
            and (identification is None or has(["rank_1"], is_number, identification))
            and has(("pairs", "images"), is_count, value.get("counts"))
            and has(("lfw", "net", "landmarks"), is_text, value.get("settings")))


def _distinct(texts):
    return "; ".join(dict.fromkeys(texts))


def _time_row(stage, sessions):
    seconds = [session["seconds"] for session in sessions if session["seconds"] is not None]
    killed = len(sessions) - len(seconds)
    note = f" ({killed} killed, whose time is unknown and not included)" if killed else ""
    return _table_row(stage.name, duration(sum(seconds)), f"{len(sessions)}{note}")


def duration(seconds):
    """Return a time as text, such as "3 h 25 min" or "40 s"."""
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes} min" if minutes < 120 else \
        f"{minutes // 60} h {minutes % 60:02d} min"
