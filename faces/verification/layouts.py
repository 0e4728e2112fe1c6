"""How checkpoints name the layers of the 20-layer CNN: find the weights in a file's content, and rename them to ours.

Two layouts are known. That of clcarwin/sphereface_pytorch is also ours: conv1_1, relu1_1 ... conv4_3, relu4_3, fc5;
with batch normalization, there are conv1_1bn ... fc5_bn as well. That of MuggleWang/CosFace_pytorch is layer1.0 (a
convolution), layer1.1 (its PReLU), layer1.2.conv1, .prelu1, .conv2 and .prelu2 (a residual unit) ... fc. Both flatten
the last feature map in the same order.
"""
import re
from typing import NamedTuple

import torch


class Layout(NamedTuple):
    """The names of the layers in a checkpoint, and the input that its network was trained with.

    title: for messages.
    first: name of the weight of the first convolution, by which the layout is recognized.
    body: pattern of the names that belong to the network; all others are training heads.
    channels: channel order of the input, "rgb" or "bgr".
    divisor: the input is (x - 127.5) / divisor.
    """
    title: str
    first: str
    body: re.Pattern
    channels: str
    divisor: float


LAYOUTS = (
    Layout("conv1_1 ... fc5, as in clcarwin/sphereface_pytorch", "conv1_1.weight",
           re.compile(r"(conv|relu)\d+_\d+|fc5(_bn)?\b"), "bgr", 128),
    Layout("layer1.0 ... fc, as in MuggleWang/CosFace_pytorch", "layer1.0.weight",
           re.compile(r"layer\d+\.|fc\."), "rgb", 127.5))
# Keys under which people save the weights, in the order in which they are tried. Averaged weights come first: where a
# file has both, its author evaluated those.
KEYS = ("weights", "ema", "ema_state_dict", "state_dict_ema", "model_ema", "ema_model", "params_ema", "state_dict",
        "model_state_dict", "model_state", "model", "net", "network", "backbone", "module", "params", "shadow")
MAX_DEPTH = 4
MAX_NETS = 8    # in one dict; only a hostile file has more
WRAPPERS = {"module", "_orig_mod"}    # added to names by DataParallel, and by torch.compile, around any module


class Found(NamedTuple):
    """The weights of the 20-layer CNN in a file.

    layout: Layout.
    tensors: dict from our name to the tensor.
    original: dict from our name to the name in the file.
    source: where in the file they are, such as "model_ema"; empty if they are not nested.
    ignored: names beside them that do not belong to the network, such as those of training heads.
    others: other places in the file that hold such weights, too.
    """
    layout: Layout
    tensors: dict
    original: dict
    source: str
    ignored: list
    others: list


def find_weights(content):
    """Return the weights in the content of a file as Found, or None if it has none in a known layout.

    Args:
        content: what torch.load() returned: a state dict, or a dict that has one under one of KEYS, at any of MAX_DEPTH
            levels. Names may have any prefix, such as "backbone.".
    """
    found = list(_candidates(content, seen=set()))
    return found[0]._replace(others=[other.source for other in found[1:]]) if found else None


def _candidates(content, seen, source="", depth=0):
    """Yield a Found for each network in the content, the preferred one first; `seen` has the ids of dicts visited."""
    if not isinstance(content, dict) or depth > MAX_DEPTH or id(content) in seen:
        return
    seen.add(id(content))
    tensors = {_unwrapped(name): (name, value) for name, value in content.items()
               if isinstance(name, str) and isinstance(value, torch.Tensor)}
    prefixes = [(_rank(prefix), prefix, layout) for layout in LAYOUTS for name in tensors
                if (prefix := name.removesuffix(layout.first)) != name and prefix[-1:] in ("", ".")]
    for _, prefix, layout in sorted(prefixes, key=lambda item: item[0])[:MAX_NETS]:
        yield _found(tensors, prefix, layout, ".".join(filter(None, (source, prefix.rstrip(".")))))
    for key in KEYS:
        yield from _candidates(content.get(key), seen, f"{source}.{key}".lstrip("."), depth + 1)


def _unwrapped(name):
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _rank(prefix):
    """Return the position in KEYS of the first component of a prefix, to sort by; unknown ones come last."""
    first = prefix.partition(".")[0]
    return -1 if not prefix else KEYS.index(first) if first in KEYS else len(KEYS)


def _found(tensors, prefix, layout, source):
    ours, original, ignored = {}, {}, []
    for name, (file_name, value) in tensors.items():
        inner = name.removeprefix(prefix)
        if name.startswith(prefix) and layout.body.match(inner):
            ours[_our_name(inner)], original[_our_name(inner)] = value, file_name
        else:
            ignored.append(file_name)
    return Found(layout, ours, original, source, ignored, [])


def _our_name(name):
    """Return our name for a name of either layout; one that has no counterpart stays as it is."""
    if match := re.fullmatch(r"layer(\d+)\.0\.(\w+)", name):
        return f"conv{match[1]}_1.{match[2]}"
    if match := re.fullmatch(r"layer(\d+)\.1\.(\w+)", name):
        return f"relu{match[1]}_1.{match[2]}"
    if match := re.fullmatch(r"layer(\d+)\.(\d+)\.(conv|prelu)([12])\.(\w+)", name):
        number = 2 * int(match[2]) - 3 + int(match[4])    # unit layer1.2 holds the second and third convolution
        return f"{match[3].replace('prelu', 'relu')}{match[1]}_{number}.{match[5]}"
    return re.sub(r"^fc\.", "fc5.", name)
