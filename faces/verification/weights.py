"""Load weights of the sphere CNN from checkpoints of this project and from public ones.

The names of its layers say which network a file holds, and in which layout. Ours is that of clcarwin/sphereface_pytorch
and the Caffe releases: conv1_1, relu1_1 ... conv4_3, relu4_3, fc5, and with batch normalization conv1_1bn ... fc5_bn;
deeper networks have conv1_4 and so on. In MuggleWang/CosFace_pytorch, layer1.0 is a convolution, layer1.1 its PReLU,
layer1.2 a residual unit (conv1, prelu1, conv2, prelu2), and fc the last layer. Both flatten the last feature map in the
same order. Whatever the file's network expects, the loaded one takes RGB, (x - 127.5) / 128.
"""
import hashlib
import math
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import safetensors
import torch
from torch import nn

from faces.files import CHECKPOINT, InputError, count_of, load_tensors, path, read_json, reading, shorten
from faces.verification.caffe import read_caffemodel

CHANNELS = ("rgb", "bgr")
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


# Residual units in each stage of the networks without batch normalization. The authors' Sphereface-64.prototxt and
# MuggleWang's network of 64 layers have 7 units in the second stage; OpenSphere's sfnet64 and sphere64a here have 8.
UNITS = {(1, 2, 4, 1): "sphere20a", (2, 4, 8, 2): "sphere36a", (3, 8, 16, 3): "sphere64a", (3, 7, 16, 3): "sphere64a"}


class Found(NamedTuple):
    """The weights of the sphere CNN in a file."""
    layout: Layout
    tensors: dict      # from our name to (name in the file, tensor)
    source: str        # where in the file they are, such as "model_ema"; empty if they are not nested


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
    """Return the network whose weights a file holds, on the CPU, and a dict about the file, see _load().

    Args:
        file: a checkpoint of this project, a safetensors file, the folder of either, a .caffemodel, or a public state
            dict in one of LAYOUTS, nested under KEYS or not. Half precision becomes float32.
        nets: dict from a network's name to its constructor.
        name: the network that the file should hold; None accepts any. If it holds another, that is an InputError.
        channels: "rgb" or "bgr", with which the weights were trained; None takes what the file states, or else "rgb"
            for checkpoints of this project and MuggleWang's layout, "bgr" for all others. The network takes RGB.
    """
    content = _read(file, name)
    with torch.device("cpu"):    # whatever the defaults of the process are
        net = nets[content[-1]]().float()
    return net, _load(net, content, channels)


def initial_net(make: Callable[[], nn.Module], file=None) -> nn.Module:
    """Return a network to train: make(), with the weights in a file if one is given; see load_net(). They may be those
    of a network with fewer layers: each residual unit that it lacks starts as the identity. The file then reseeds
    PyTorch, since the seed of its own run would draw the class centers again that it was trained against."""
    net = make()
    if file is not None:
        loaded = _load(net, _read(file, architecture(net.state_dict()), deeper=True), train=True)
        announce(file, loaded)
        torch.manual_seed(torch.initial_seed() ^ int(loaded["fingerprint"][:15], 16))
    return net


def net_in(file) -> str:
    """Return the name of the network whose weights a file holds; see load_net()."""
    return _read(file)[-1]


def announce(file, loaded: dict):
    """Print what was loaded, on one line of stderr; checkpoints of this project need no announcement."""
    if loaded["format"] != CHECKPOINT or loaded["added"]:
        rather = f" rather than {', '.join(loaded['others'])}" if loaded["others"] else ""
        print(f"{file}: {loaded['net']} in the layout {loaded['layout']}; channel order {loaded['channels'].upper()}"
              + (f"; taken from {loaded['source']}{rather}" if loaded["source"] else rather)
              + (f"; left out: {shorten(loaded['ignored'])}" if loaded["ignored"] else "")
              + (f"; added: {count_of(loaded['added'], 'residual unit~')}, the identity" if loaded["added"] else ""),
              file=sys.stderr)


def add_model_options(parser, nets, **options):
    """Add --model with further `options`, --net, a choice of `nets`, and --channels to a parser or a group."""
    parser.add_argument("--model", type=path, required=True, metavar="FILE|DIR", **options,
                        help="checkpoint.pt of casia_train.py, safetensors, the folder of either, a public checkpoint, "
                             "or a .caffemodel")
    parser.add_argument("--net", choices=tuple(nets),
                        help="network that the model must have (default: what the file says)")
    parser.add_argument("--channels", choices=CHANNELS,
                        help="channel order that the model was trained with (default: what the file states; otherwise "
                             "rgb for checkpoints of this project and MuggleWang's layout, bgr for all others)")


def architecture(names) -> str | None:
    """Return which network has weights with these names: "faceNet", the one of UNITS with the most similar number of
    units, or None if the last layer is missing."""
    if "conv1_1.weight" not in names or "fc5.weight" not in names:
        return None
    found = _units(names)
    return "faceNet" if "conv1_1bn.weight" in names else UNITS[min(UNITS, key=lambda units: math.dist(units, found))]


def _units(names):
    """Return the number of residual units in each stage of a network whose weights have these names."""
    layers = [re.match(r"conv([1-4])_(\d{1,3})\b", name) for name in names]
    return tuple(max((int(m[2]) for m in layers if m and m[1] == stage), default=0) // 2 for stage in "1234")


def fingerprint(net: nn.Module) -> str:
    """Return the SHA-256 of a network's weights and their names, in hexadecimal; equal for equal embeddings."""
    digest = hashlib.sha256()
    for name, value in sorted(net.state_dict().items()):
        if not name.endswith("num_batches_tracked"):    # has no effect on embeddings, and public files lack it
            digest.update(f"{name} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def model_file(model) -> Path:
    """Return the file for a --model: the path itself, or checkpoint.pt or else model.safetensors in a folder; raise
    InputError if the folder has neither."""
    file = path(model)
    if file.is_dir():
        for name in ("checkpoint.pt", "model.safetensors"):
            if (file / name).is_file():
                return file / name
        raise InputError(f"the folder {file} holds no checkpoint.pt and no model.safetensors; pass another, or a file.")
    return file


def model_titles(models: list) -> list[str]:
    """Return a title for each --model: the name of the run's folder, or of the file."""
    files = [model_file(model).absolute() for model in models]
    return [file.parent.name if file.name.startswith(("checkpoint", "model.")) else file.stem for file in files]


def find_weights(content) -> tuple[list[Found], list[str]]:
    """Return the weights in what torch.load() returned, the preferred ones first, and the names of all other tensors.
    Weights in a known layout are a state dict, or under one of KEYS at any of MAX_DEPTH levels. Their names may have
    any prefix, such as "backbone."."""
    tensors = dict(_tensors(content))
    prefixes = [(name.removesuffix(layout.first), layout) for layout in LAYOUTS for name in tensors
                if f".{name}".endswith(f".{layout.first}")]
    prefixes.sort(key=lambda item: [KEYS.index(part) if part in KEYS else len(KEYS)
                                    for part in item[0].split(".")[:-1]])
    found, others = [], dict(tensors)
    for prefix, layout in prefixes[:8]:    # only a hostile file has more
        own = {name: name.removeprefix(prefix) for name in tensors if name.startswith(prefix)}
        own = {name: inner for name, inner in own.items() if re.match(layout.body, inner)}
        found.append(Found(layout, {_our_name(inner): (name, tensors[name]) for name, inner in own.items()},
                           prefix.rstrip(".")))
        others = {name: None for name in others if name not in own}
    return found, list(others)


def _tensors(content, prefix="", depth=0):
    """Yield (name, tensor) of a state dict, and of the dicts under KEYS in it, without the names of WRAPPERS."""
    for name, value in content.items() if isinstance(content, dict) else ():
        if isinstance(name, str) and isinstance(value, torch.Tensor):
            yield prefix + ".".join(part for part in name.split(".") if part not in WRAPPERS), value
        elif isinstance(name, str) and name in KEYS and depth < MAX_DEPTH:
            yield from _tensors(value, f"{prefix}{name}.", depth + 1)


def _our_name(name):
    """Return our name for a name of either layout; one that has no counterpart stays as it is."""
    if match := re.fullmatch(r"layer(\d+)\.([01])\.(\w+)", name):
        return f"{'relu' if match[2] == '1' else 'conv'}{match[1]}_1.{match[3]}"
    if match := re.fullmatch(r"layer(\d+)\.(\d+)\.(conv|prelu)([12])\.(\w+)", name):
        number = 2 * int(match[2]) - 3 + int(match[4])    # unit layer1.2 holds the second and third convolution
        return f"{match[3].replace('prelu', 'relu')}{match[1]}_{number}.{match[5]}"
    return re.sub(r"^fc\.", "fc5.", name)


def _read(model, expected=None, deeper=False):
    """Return the path of a file of weights, what it says about itself, with its "format", a list of Found, the names of
    other tensors, such as training heads, and the name of its network. That must be `expected`, or, with `deeper`, may
    be the same with fewer layers."""
    file = model_file(model)
    with reading(file, "file of weights", "export or download it again"), torch.serialization.safe_globals(IGNORED):
        names = zipfile.ZipFile(file).namelist() if zipfile.is_zipfile(file) else []
        if file.suffix.lower() == ".onnx" or any(name.endswith("/constants.pkl") for name in names):    # TorchScript
            raise InputError(f"{file} is an export for other programs; pass the checkpoint that it was made from.")
        with open(file, "rb") as data:
            is_safetensors = data.read(9)[8:] == b"{"
        if file.suffix.lower() == ".caffemodel":
            content, stated = read_caffemodel(file), {"format": "caffemodel"}
        elif is_safetensors:
            with safetensors.safe_open(file, "pt") as data:
                content = {name: data.get_tensor(name) for name in data.keys()}
                config = read_json(file.with_name("config.json")) if file.name == "model.safetensors" else {}
                stated = {**config, **(data.metadata() or {}), "format": "safetensors"}
        else:
            content, stated = load_tensors(file), {"format": "state dict"}
            if isinstance(content, dict) and content.get("format") == CHECKPOINT:
                content, stated = {"weights": content.get("weights")}, {**content, "colour_order": "RGB"}
    found, ignored = find_weights(content)
    if not found:
        what = f"no weights of the sphere CNN (its first tensor is {ignored[0]})" if ignored else "no weights"
        raise InputError(f"{file} contains {what}; {PAGE}.")
    name = architecture(found[0].tensors)
    if name is None:
        raise InputError(f"the last layer of the network in {file} is missing; {PAGE}.")
    shallower = deeper and name.startswith("sphere") and name < expected    # sphere20a, sphere36a, sphere64a
    if name != (expected or name) and not shallower:
        raise InputError(f"{file} contains the weights of {name}, not of {expected}; pass --net {name} or leave out "
                         "--net.")
    return file, stated, found, ignored, name


def _load(net, content, channels=None, train=False):
    """Load the first of the weights in a file into a network, and describe the file: "format", "method", "net",
    "layout", "channels"; "source", where the weights were, "others", where more were, and "ignored", names left out;
    "added", how many residual units the file lacks; "fingerprint" of the network; "step" and "threshold" of the last
    evaluation in training. None is unknown."""
    file, stated, ((layout, tensors, source), *others), ignored, name = content
    stated_channels = str(stated.get("colour_order")).lower()
    channels = channels or (stated_channels if stated_channels in CHANNELS else layout.channels)
    expected, modules = net.state_dict(), dict(net.named_modules())
    # In public files, residual convolutions may have biases that the network does not have yet.
    biases = {key: nn.Parameter(layer.weight.new_zeros(layer.out_channels)) for key in tensors
              if key not in expected and isinstance(layer := modules.get(key.removesuffix(".bias")), nn.Conv2d)}
    expected |= biases
    added = _added(_units(tensors), expected, train)
    tensors |= added
    with reading(file, "checkpoint of ordinary tensors", "pass another checkpoint"):
        for key in [*expected, *tensors]:
            file_name, value = tensors.get(key, (key, None))
            kind, wanted = _kind(value), _kind(expected.get(key))
            if kind != wanted and not key.endswith("num_batches_tracked"):
                raise InputError(f"the weights in {file} do not fit {name} ({file_name} is {kind}, not {wanted}); "
                                 f"{PAGE}.")
        weights = {key: value for key, (_, value) in tensors.items()}
        first = weights["conv1_1.weight"].flip(1) if channels == "bgr" else weights["conv1_1.weight"]
        # Both inputs are zero at x = 127.5 and in the padding, so scaling the weight is exact.
        weights["conv1_1.weight"] = (first.double() * (128 / layout.divisor)).float()
        for key, bias in biases.items():
            modules[key.removesuffix(".bias")].bias = bias
        net.load_state_dict({**expected, **weights})
    method = stated.get("method")
    return {"format": stated["format"], "method": None if method == "unknown" else method, "net": name,
            "layout": "of this project" if "net" in stated else layout.title, "channels": channels, "source": source,
            "others": [other.source for other in others], "ignored": ignored, "added": len(added) // 4,
            "fingerprint": fingerprint(net), "step": stated.get("step"), "threshold": stated.get("threshold")}


def _added(units, expected, train):
    """Return weights, as in Found.tensors, for the residual units that a file with these `units` lacks. They make each
    unit the identity. To be trained further, its first convolution keeps its initial weights."""
    added = {}
    for name, value in expected.items() if units in UNITS else ():
        kind, stage, layer = re.match(r"(conv|relu|fc)(\d)_?(\d*)", name).groups()
        if layer and int(layer) > 2 * units[int(stage) - 1] + 1:
            zero = kind == "conv" and (int(layer) % 2 or not train)
            added[name] = name, torch.zeros_like(value) if zero else value
    return added


def _kind(tensor):
    if tensor is None:
        return "missing"
    shape = "x".join(map(str, tensor.shape)) or "a scalar"
    return shape if tensor.is_floating_point() else f"{shape} of {tensor.dtype}"
