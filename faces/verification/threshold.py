"""A model's own threshold, which tools/compare.py reads.

lfw_eval.py writes it into a small file beside the model, MODEL.threshold.json. It holds the fingerprint of the network,
so that it is never used for another. Without that file, a checkpoint has the threshold of the last evaluation during
its training, if it was trained with --lfw.
"""
from pathlib import Path
from typing import NamedTuple

import numpy as np

from faces.files import InputError, read_json, write_json
from faces.verification.metrics import best_threshold
from faces.verification.weights import model_file


class Threshold(NamedTuple):
    """A threshold, and the errors it makes on the set on which it was chosen."""
    value: float     # accept a pair if its similarity is greater, -1 to 1
    accepted: int    # number of impostor pairs that are accepted
    impostor: int    # number of all impostor pairs
    rejected: int    # number of genuine pairs that are rejected
    genuine: int     # number of all genuine pairs
    source: str      # the set, in words


def choose_threshold(similarity: np.ndarray, same: np.ndarray, source: str, value: float | None = None) -> Threshold:
    """Return the Threshold with the highest accuracy on P pairs from a set called `source`, or with a given value; the
    cosines, float (P,), are of concatenated embeddings, without subtracting a mean, and `same`, bool (P,), marks
    genuine pairs."""
    value = float(best_threshold(similarity, same) if value is None else value)
    accepted = np.asarray(similarity) > value
    return Threshold(value, int((accepted & ~same).sum()), int((~same).sum()), int((~accepted & same).sum()),
                     int(same.sum()), source)


def threshold_path(model) -> Path:
    """Return where the threshold of a model belongs: beside the file, which is checkpoint.pt for a folder."""
    file = model_file(model)
    return file.with_name(f"{file.name}.threshold.json")


def save_threshold(model, fingerprint: str, threshold: Threshold):
    """Write a model's Threshold beside it, atomically, with the fingerprint of the loaded network."""
    write_json(threshold_path(model), {"fingerprint": fingerprint, **threshold._asdict()})


def load_threshold(model, loaded: dict) -> Threshold | None:
    """Return the Threshold that was saved beside a model, or else the one in its checkpoint, or else None.

    `loaded` is what load_net() returned for the model. Raises InputError if the file belongs to other weights.
    """
    stored = read_json(threshold_path(model)) or dict(loaded["threshold"] or {})
    if stored.get("fingerprint", loaded["fingerprint"]) != loaded["fingerprint"]:
        raise InputError(f"{threshold_path(model)} belongs to other weights than {model} has now; run `lfw_eval.py "
                         "--save-threshold` again.")
    if "step" in stored:    # from the checkpoint
        later = "" if loaded["step"] == stored["step"] else f" (the weights are those of step {loaded['step']:,})"
        stored["source"] += f", evaluated during training at step {stored['step']:,}{later}"
    return Threshold(*map(stored.get, Threshold._fields)) if "value" in stored else None
