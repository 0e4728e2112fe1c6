"""What a training checkpoint holds: a check for each entry, because files may come from strangers."""
import torch


def _is_text(value):
    return isinstance(value, str) and value.isprintable()


def is_count(value):
    return type(value) is int and 0 <= value < 2**63


def _is_tensor(value):
    """Return whether a value is an ordinary tensor on the CPU, no larger than the memory that it refers to."""
    return (isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_nested
            and not value.is_quantized and value.device.type == "cpu"
            and value.numel() * value.element_size() <= value.untyped_storage().nbytes())


def _are_tensors(value):
    return isinstance(value, dict) and all(_is_text(name) and _is_tensor(tensor) for name, tensor in value.items())


def _is_head(value):
    return _are_tensors(value) and value.keys() == {"weight"} and value["weight"].ndim == 2


def _is_optimizer(value):
    return (isinstance(value, dict) and isinstance(value.get("param_groups"), list)
            and isinstance(value.get("state"), dict)
            and all(is_count(index) and isinstance(entry, dict) and _is_tensor(entry.get("momentum_buffer"))
                    for index, entry in value["state"].items()))


def _are_settings(value):
    return isinstance(value, dict) and "precision" in value and all(
        _is_text(name) and isinstance(setting, (str, int, float, type(None)))    # paths may have any letters
        for name, setting in value.items())


def _are_sums(value):
    return isinstance(value, dict) and all(type(sum_) is float for sum_ in value.values())


def is_threshold(value):
    """Return whether a value is None, or a threshold as training stores it; see THRESHOLD."""
    return value is None or (
        isinstance(value, dict) and value.keys() == THRESHOLD.keys()
        and all(is_right(value[name]) for name, is_right in THRESHOLD.items())
        and value["impostor"] > 0 and value["accepted"] <= value["impostor"]
        and value["genuine"] > 0 and value["rejected"] <= value["genuine"])


# The threshold of the last evaluation during training: what faces.verification.threshold.Threshold holds, and the step.
THRESHOLD = {"value": lambda value: type(value) is float and abs(value) < 1.01, "accepted": is_count,
             "impostor": is_count, "rejected": is_count, "genuine": is_count, "source": _is_text, "step": is_count}
# The entries of a checkpoint that are used, except for the scaler's numbers, whose load_state_dict() checks them.
CONTENT = {"method": _is_text, "net": _is_text, "step": is_count, "weights": _are_tensors, "head": _is_head,
           "optimizer": _is_optimizer, "classes": is_count, "faces": _is_text, "settings": _are_settings,
           "epoch": _are_sums, "threshold": is_threshold}
# Entries that earlier versions did not save.
OPTIONAL = {"epoch": {}, "threshold": None}
