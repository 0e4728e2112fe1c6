"""A model's own threshold, which tools/compare.py reads.

lfw_eval.py writes it into a small file beside the model, MODEL.threshold.json. It holds the fingerprint of the network,
so that it is never used for another. Without that file, a checkpoint has the threshold of the last evaluation during
its training, if it was trained with --lfw.
"""
from pathlib import Path
from typing import NamedTuple

import numpy as np

from faces.files import InputError, read_json, write_json
from faces.text import printable
from faces.training.content import is_threshold
from faces.verification.metrics import best_threshold
from faces.verification.weights import model_file

FORMAT = "faces-threshold-1"
AGAIN = "delete it, or run `lfw_eval.py --save-threshold` again"    # for messages


class Threshold(NamedTuple):
    """A threshold, and the errors it makes on the set on which it was chosen.

    value: accept a pair if its similarity is greater, -1 to 1.
    accepted, impostor: number of impostor pairs that are accepted, and of all impostor pairs.
    rejected, genuine: number of genuine pairs that are rejected, and of all genuine pairs.
    source: the set, in words.
    """
    value: float
    accepted: int
    impostor: int
    rejected: int
    genuine: int
    source: str


def choose_threshold(similarity, same, source, value=None):
    """Return the Threshold with the highest accuracy on some pairs, or the one with a given value.

    Args:
        similarity: float (P,), cosine similarities of concatenated embeddings, without subtracting a mean.
        same: bool (P,), True for a genuine pair.
        source: where the pairs are from, in words.
        value: None for the best threshold.
    """
    value = float(best_threshold(similarity, same) if value is None else value)
    accepted = np.asarray(similarity) > value
    return Threshold(value, int((accepted & ~same).sum()), int((~same).sum()), int((~accepted & same).sum()),
                     int(same.sum()), printable(source))


def threshold_path(model):
    """Return where the threshold of a model belongs: beside the file, which is checkpoint.pt for a folder."""
    file = model_file(model)
    return file.with_name(f"{file.name}.threshold.json")


def save_threshold(model, fingerprint, threshold):
    """Write a model's Threshold beside it, atomically; `fingerprint` is that of the loaded network."""
    write_json(threshold_path(model), {"format": FORMAT, "fingerprint": fingerprint, **threshold._asdict()})


def load_threshold(model, loaded):
    """Return the Threshold that was saved beside a model, or else the one in its checkpoint, or else None.

    Args:
        model: path of the model.
        loaded: dict that faces.verification.weights.load_net() returned for it.

    Raises:
        InputError: the file can't be read, is malformed, or belongs to other weights.
    """
    path = Path(threshold_path(model))
    content = read_json(path, AGAIN)
    if content is None:
        return _threshold_in(loaded)
    stated = {name: content.get(name) for name in Threshold._fields}
    if content.get("format") != FORMAT or not is_threshold({**stated, "step": 0}):
        raise InputError(f"{path} is not a threshold that lfw_eval.py saved; {AGAIN}.")
    if content.get("fingerprint") != loaded["fingerprint"]:
        raise InputError(f"{path} belongs to other weights than those that {model} has now; {AGAIN}.")
    return Threshold(**stated)


def _threshold_in(loaded):
    """Return the Threshold that training stored in a checkpoint, whose source says at which step, or None."""
    if loaded["threshold"] is None:
        return None
    threshold = Threshold(*(loaded["threshold"][name] for name in Threshold._fields))
    step = loaded["threshold"]["step"]
    later = "" if loaded["step"] == step else f" (the weights are those of step {loaded['step']:,})"
    source = f"{threshold.source}, evaluated during training at step {step:,}{later}"
    return threshold._replace(source=source)
