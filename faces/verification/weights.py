"""Load weights of the 20-layer CNN from checkpoints of this project and from public ones.

The names of its layers say which network a file holds, and in which layout. The layout of clcarwin/sphereface_pytorch
is also ours: conv1_1, relu1_1 ... conv4_3, relu4_3, fc5; with batch normalization, there are conv1_1bn ... fc5_bn, too.
In the layout of MuggleWang/CosFace_pytorch, layer1.0 is a convolution, layer1.1 its PReLU, layer1.2 a residual unit
(conv1, prelu1, conv2, prelu2), and fc the last layer. Both flatten the last feature map in the same order. Whatever the
file's network expects, the loaded one takes RGB, (x - 127.5) / 128.
"""
import hashlib
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import safetensors
import torch
from torch import nn

from faces.files import CHECKPOINT, InputError, load_tensors, path, reading, shorten

CHANNELS = ("rgb", "bgr")
MODEL_HELP = "checkpoint.pt of casia_train.py or its folder, a public checkpoint of the same network, or safetensors"
PAGE = "docs/evaluation.md lists the layouts that can be loaded"


class Layout(NamedTuple):
    """How a checkpoint names the layers, and the input that its network was trained with."""
    title: str
    first: str         # name of the weight of the first convolution, by which the layout is recognized
    body: str          # pattern of the names that belong to the network; all others are training heads
    channels: str      # "rgb" or "bgr"
    divisor: float     # the input is (x - 127.5) / divisor


LAYOUTS = (Layout("conv1_1 ... fc5, as in clcarwin/sphereface_pytorch", "conv1_1.weight",
                  r"(conv|relu)\d+_\d+|fc5(_bn)?\b", "bgr", 128),    # they read images with OpenCV
           Layout("layer1.0 ... fc, as in MuggleWang/CosFace_pytorch", "layer1.0.weight",
                  r"layer\d+\.|fc\.", "rgb", 127.5))
# Keys under which people save the weights, in the order in which they are tried. Averaged weights come first: where a
# file has both, its author evaluated those.
KEYS = ("weights", "ema", "ema_state_dict", "state_dict_ema", "model_ema", "ema_model", "params_ema", "state_dict",
        "model_state_dict", "model_state", "model", "net", "network", "backbone", "module", "params", "shadow")
MAX_DEPTH = 4
WRAPPERS = {"module", "_orig_mod"}    # added to names by DataParallel, and by torch.compile, around any module


class Found(NamedTuple):
    """The weights of the 20-layer CNN in a file."""
    layout: Layout
    tensors: dict      # from our name to (name in the file, tensor)
    source: str        # where in the file they are, such as "model_ema"; empty if they are not nested
    ignored: list      # names beside them that do not belong to the network, such as training heads


def _ignored(module, name):
    """Return a class that stands in for one that PyTorch's restricted unpickler would refuse; it holds nothing."""
    return type(name, (), {"__module__": module, "__new__": lambda cls, *_: object.__new__(cls),
                           "__init__": lambda self, *_: None, "__setstate__": lambda self, state: None})


# Training scripts save metrics as numpy scalars, options as a Namespace, and paths. numpy's own functions for restoring
# them are not safe on a hostile file, so none of them is called.
IGNORED = [_ignored(*name.rsplit(".", 1)) for name in """numpy.core.multiarray.scalar numpy._core.multiarray.scalar
    numpy.dtype numpy.ndarray numpy.core.multiarray._reconstruct numpy._core.multiarray._reconstruct argparse.Namespace
    pathlib.PosixPath pathlib.WindowsPath pathlib._local.PosixPath pathlib._local.WindowsPath""".split()]


def load_net(file, nets: dict[str, Callable], name: str | None = None,
             channels: str | None = None) -> tuple[nn.Module, dict]:
    """Return the network whose weights a file holds, on the CPU, and a description of the file.

    Args:
        file: see load_weights().
        nets: dict from a network's name, "faceNet" or "sphere20a", to its constructor.
        name: name of the network that the file is expected to hold; None accepts either.
        channels: see load_weights().

    Raises:
        InputError: see load_weights().
    """
    file, content, found = _read(file)
    found_name = _net_in(file, found, name)
    with torch.device("cpu"):    # whatever the defaults of the process are
        net = nets[found_name]().float()
    return net, _load(file, content, found, net, channels)


def initial_net(make: Callable[[], nn.Module], file=None) -> nn.Module:
    """Return a network to train: make(), with the weights in a file if one is given; see load_weights()."""
    net = make()
    if file is not None:
        announce(file, load_weights(net, file))
    return net


def load_weights(net: nn.Module, file, channels: str | None = None) -> dict:
    """Load the weights in a file into a network; the network then takes RGB, whatever the channel order of the file.

    Args:
        net: faceNet() or sphere20a().
        file: a checkpoint of this project, a folder that holds checkpoint.pt, a safetensors file, or a public state
            dict in one of LAYOUTS, nested under KEYS or not. Half precision becomes float32.
        channels: channel order that the weights were trained with, "rgb" or "bgr"; None takes the one that the file
            states, and otherwise "rgb" for checkpoints of this project and MuggleWang's layout, "bgr" for all others.

    Returns:
        dict that describes the file, with the keys "format", "method" (None if the file does not name it), "net",
        "layout", "channels", "source" (where in the file the weights are), "ignored" (names that were left out),
        "others" (further weights in the file), "fingerprint" (of the loaded network), and, None for files of other
        origin, "step" and "threshold" (of the last evaluation during training).

    Raises:
        InputError: the file can't be read safely, is not a checkpoint, or contains weights that do not fit `net`.
    """
    file, content, found = _read(file)
    _net_in(file, found, architecture(net.state_dict()))
    return _load(file, content, found, net, channels)


def net_in(file) -> str:
    """Return the name of the network whose weights a file holds; see load_weights()."""
    file, _, found = _read(file)
    return _net_in(file, found)


def announce(file, loaded: dict):
    """Print which layout a public file has, on one line of stderr; checkpoints of this project need no announcement."""
    if loaded["format"] == CHECKPOINT:
        return
    line = f"{file}: {loaded['net']} in the layout {loaded['layout']}; channel order {loaded['channels'].upper()}"
    if loaded["source"]:
        line += f"; taken from {loaded['source']}"
    if loaded["others"]:
        line += f" rather than {', '.join(loaded['others'])}"
    if loaded["ignored"]:
        line += f"; left out: {shorten(loaded['ignored'])}"
    print(line, file=sys.stderr)


def add_options(parser, nets, **net_options):
    """Add the options --net, a choice of `nets` with further `net_options`, and --channels to a parser or a group."""
    parser.add_argument("--net", choices=tuple(nets), **net_options,
                        help="network that the model must have (default: what the file says)")
    parser.add_argument("--channels", choices=CHANNELS,
                        help="channel order that the model was trained with (default: what the file states; otherwise "
                             "rgb for checkpoints of this project and MuggleWang's layout, bgr for all others)")


def architecture(names) -> str | None:
    """Return which network has weights with these names: "faceNet", "sphere20a", or None if neither does."""
    if "conv1_1.weight" not in names or "fc5.weight" not in names:
        return None
    return "faceNet" if "conv1_1bn.weight" in names else "sphere20a"


def fingerprint(net: nn.Module) -> str:
    """Return the SHA-256 of a network's weights and their names, in hexadecimal; equal for equal embeddings."""
    digest = hashlib.sha256()
    for name, value in sorted(net.state_dict().items()):
        if not name.endswith("num_batches_tracked"):    # has no effect on embeddings, and public files lack it
            digest.update(f"{name} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def model_file(model) -> Path:
    """Return the file for a --model: the path itself, or checkpoint.pt in a folder; raise InputError if the folder has
    none, or the file is an export that can't be loaded back."""
    file = path(model)
    if file.is_dir():
        if not (file / "checkpoint.pt").is_file():
            raise InputError(f"the folder {file} holds no checkpoint.pt; pass the folder of a run, or a file.")
        return file / "checkpoint.pt"
    with reading(file, "file of weights"):
        is_torchscript = zipfile.is_zipfile(file) and any(
            name.endswith("/constants.pkl") for name in zipfile.ZipFile(file).namelist())
    if file.suffix.lower() == ".onnx" or is_torchscript:
        raise InputError(f"{file} is an export for other programs; pass the checkpoint it was made from, or export "
                         "safetensors.")
    return file


def find_weights(content, source: str = "", depth: int = 0) -> list[Found]:
    """Return the weights in what torch.load() returned, the preferred ones first; empty if none has a known layout.

    They are a state dict, or under one of KEYS at any of MAX_DEPTH levels. Names may have any prefix, such as
    "backbone.". `source` and `depth` say where `content` is in the file.
    """
    if not isinstance(content, dict) or depth > MAX_DEPTH:
        return []
    tensors = {".".join(part for part in name.split(".") if part not in WRAPPERS): (name, value)
               for name, value in content.items() if isinstance(name, str) and isinstance(value, torch.Tensor)}
    prefixes = [(prefix, layout) for layout in LAYOUTS for name in tensors
                if (prefix := name.removesuffix(layout.first)) != name and prefix[-1:] in ("", ".")]
    order = ["", *KEYS]
    prefixes.sort(key=lambda item: order.index(key) if (key := item[0].partition(".")[0]) in order else len(order))
    found = []
    for prefix, layout in prefixes[:8]:    # only a hostile file has more
        own = {name: value for name, value in tensors.items()
               if name.startswith(prefix) and re.match(layout.body, name.removeprefix(prefix))}
        found.append(Found(layout, {_our_name(name.removeprefix(prefix)): value for name, value in own.items()},
                           ".".join(filter(None, (source, prefix.rstrip(".")))),
                           [value[0] for name, value in tensors.items() if name not in own]))
    for key in KEYS:
        found += find_weights(content.get(key), f"{source}.{key}".lstrip("."), depth + 1)
    return found


def _our_name(name):
    """Return our name for a name of either layout; one that has no counterpart stays as it is."""
    if match := re.fullmatch(r"layer(\d+)\.([01])\.(\w+)", name):
        return f"{'relu' if match[2] == '1' else 'conv'}{match[1]}_1.{match[3]}"
    if match := re.fullmatch(r"layer(\d+)\.(\d+)\.(conv|prelu)([12])\.(\w+)", name):
        number = 2 * int(match[2]) - 3 + int(match[4])    # unit layer1.2 holds the second and third convolution
        return f"{match[3].replace('prelu', 'relu')}{match[1]}_{number}.{match[5]}"
    return re.sub(r"^fc\.", "fc5.", name)


def _read(model):
    """Return the file of a model; a dict with its "format" and what it states; and its weights, a list of Found."""
    file = model_file(model)
    with reading(file, "safetensors file", "export or download it again"):
        with open(file, "rb") as data:
            start = data.read(9)
        if start[8:] == b"{" and int.from_bytes(start[:8], "little") < file.stat().st_size:
            with safetensors.safe_open(file, "pt") as data:
                content = {name: data.get_tensor(name) for name in data.keys()}
                stated = {**(data.metadata() or {}), "format": "safetensors"}
                return file, stated, _found(file, content)
    with torch.serialization.safe_globals(IGNORED):
        content = load_tensors(file)
    if isinstance(content, dict) and content.get("format") == CHECKPOINT:
        return file, {**content, "colour_order": "RGB"}, _found(file, {"weights": content["weights"]})
    return file, {"format": "state dict"}, _found(file, content)


def _found(file, content):
    found = find_weights(content)
    if not found:
        parts = [content, *content.values()] if isinstance(content, dict) else []
        first = next((name for part in parts if isinstance(part, dict) for name, value in part.items()
                      if isinstance(value, torch.Tensor)), None)
        what = f"no weights of the 20-layer CNN (its first tensor is {first})" if first else "no weights"
        raise InputError(f"{file} contains {what}; {PAGE}.")
    return found


def _net_in(file, found, expected=None):
    """Return the name of the network in a file; raise InputError if it is none or not `expected`."""
    name = architecture(found[0].tensors)
    if name is None:
        raise InputError(f"the weights in {file} do not fit faceNet or sphere20a (the last layer is missing); {PAGE}.")
    if name != (expected or name):
        raise InputError(f"{file} contains the weights of {name}, not of {expected}; pass --net {name} or leave out "
                         "--net.")
    return name


def _load(file, stated, found, net, channels):
    """Load the first of the weights in a file into a network; return the description of load_weights()."""
    (layout, tensors, source, ignored), *others = found
    stated_channels = str(stated.get("colour_order")).lower()
    channels = channels or (stated_channels if stated_channels in CHANNELS else layout.channels)
    expected, modules = net.state_dict(), dict(net.named_modules())
    # In public files, residual convolutions may have biases that the network does not have yet.
    biases = {name: nn.Parameter(layer.weight.new_zeros(layer.out_channels)) for name in tensors
              if name not in expected and name.endswith(".bias")
              and isinstance(layer := modules.get(name.removesuffix(".bias")), nn.Conv2d)}
    expected |= biases
    with reading(file, "checkpoint of ordinary tensors", "pass another checkpoint"):
        for name in [*expected, *tensors]:
            file_name, value = tensors.get(name, (name, None))
            problem = "missing" if value is None else "unknown" if name not in expected else None
            if not problem and _kind(value) != _kind(expected[name]):
                problem = f"{_kind(value)}, not {_kind(expected[name])}"
            if problem and not name.endswith("num_batches_tracked"):
                raise InputError(f"the weights in {file} do not fit {architecture(tensors)} ({file_name} is "
                                 f"{problem}); {PAGE}.")
        weights = {name: value for name, (_, value) in tensors.items()}
        first = weights["conv1_1.weight"].flip(1) if channels == "bgr" else weights["conv1_1.weight"]
        # Both inputs are zero at x = 127.5 and in the padding, so scaling the weight is exact.
        weights["conv1_1.weight"] = (first.double() * (128 / layout.divisor)).float()
        for name, bias in biases.items():
            modules[name.removesuffix(".bias")].bias = bias
        net.load_state_dict({**expected, **weights})
    method = stated.get("method")
    return {"format": stated["format"], "method": None if method == "unknown" else method,
            "net": architecture(tensors), "layout": layout.title, "channels": channels, "source": source,
            "ignored": ignored, "others": [other.source for other in others], "fingerprint": fingerprint(net),
            "step": stated.get("step"), "threshold": stated.get("threshold")}


def _kind(tensor):
    shape = "x".join(map(str, tensor.shape)) or "a scalar"
    return shape if tensor.is_floating_point() else f"{shape} of {tensor.dtype}"
