"""Load weights of the 20-layer CNN from checkpoints of this project and from public ones.

The file says which network it is, and the names of its layers say which layout it has; faces/verification/layouts.py
describes both layouts and how state dicts may be nested. The released weights in the first layout were trained on
images read with OpenCV, so they expect BGR channels; their residual convolutions may have biases. Whatever the file's
network expects, the loaded one takes RGB, (x - 127.5) / 128.
"""
import hashlib
import sys
from pathlib import Path
from typing import NamedTuple

import safetensors
import torch
from torch import nn

from faces.files import InputError, entries_of_zip
from faces.text import printable
from faces.training.checkpoint import FORMAT, MAX_BYTES, load_tensors
from faces.training.content import CONTENT
from faces.verification.layouts import LAYOUTS, Found, find_weights

CHANNELS = ("rgb", "bgr")
MODEL_HELP = ("checkpoint.pt of casia_train.py or the folder that holds it, a public checkpoint of the same network, "
              "or safetensors that tools/export.py wrote")
PAGE = "docs/evaluation.md lists the layouts that can be loaded"


class _Ignored:
    """Stands in for an object beside the weights that PyTorch's restricted unpickler would refuse; holds nothing."""

    def __new__(cls, *args):
        return super().__new__(cls)

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


# Training scripts save metrics as numpy scalars, options as a Namespace, and paths. numpy's own functions for restoring
# them are not safe on a hostile file, so none of them is called.
IGNORED = [type(name, (_Ignored,), {"__module__": module}) for module, name in (
    ("numpy.core.multiarray", "scalar"), ("numpy._core.multiarray", "scalar"), ("numpy", "dtype"), ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"), ("argparse", "Namespace"),
    ("pathlib", "PosixPath"), ("pathlib", "WindowsPath"), ("pathlib._local", "PosixPath"),
    ("pathlib._local", "WindowsPath"))]


def load_net(path, nets, name=None, channels=None):
    """Return the network whose weights a file holds, and a description of the file.

    Args:
        path: see load_weights().
        nets: dict from a network's name, "faceNet" or "sphere20a", to its constructor.
        name: name of the network that the file is expected to hold; None accepts either.
        channels: see load_weights().

    Returns:
        (module on the CPU, dict; see load_weights()).

    Raises:
        InputError: see load_weights().
    """
    file = _read(path)
    if name is not None:
        _check_same_net(file, name)
    net = nets[file.net]()
    return net, _load(file, net, channels)


def load_weights(net, path, channels=None):
    """Load the weights in a file into a network; the network then takes RGB, whatever the channel order of the file.

    Args:
        net: faceNet() or sphere20a().
        path: a checkpoint of this project, a folder that holds checkpoint.pt, a safetensors file, or a public state
            dict in one of the layouts and nestings of faces.verification.layouts. Half precision becomes float32.
        channels: channel order that the weights were trained with, "rgb" or "bgr"; None takes the one that the file
            states, and otherwise "rgb" for checkpoints of this project and MuggleWang's layout, "bgr" for all others.

    Returns:
        dict that describes the file, with the keys "format", "method" (None if the file does not name it), "net",
        "layout", "channels", "source" (where in the file the weights are), "ignored" (names that were left out),
        "others" (further weights in the file), "fingerprint" (of the loaded network), and, None for files of other
        origin, "step" and "threshold" (see faces.training.content.THRESHOLD).

    Raises:
        InputError: the file can't be read safely, is not a checkpoint, or contains weights that do not fit `net`.
    """
    return _load(_read(path), net, channels)


def initial_net(make, path=None):
    """Return a network to train: make(), with the weights in a file if `path` is not None; see load_weights()."""
    net = make()
    if path is not None:
        announce(path, load_weights(net, path))
    return net


def net_in(path):
    """Return the name of the network whose weights a file holds; see load_weights()."""
    return _read(path).net


def announce(path, loaded):
    """Print which layout a public file has, on one line of stderr; checkpoints of this project need no announcement.

    Args:
        path: the file.
        loaded: dict that load_net() or load_weights() returned.
    """
    if loaded["format"] == FORMAT:
        return
    line = f"{path}: {loaded['net']} in the layout {loaded['layout']}; channel order {loaded['channels'].upper()}"
    if loaded["source"]:
        line += f"; taken from {loaded['source']}"
    if loaded["others"]:
        line += f" rather than {', '.join(loaded['others'])}"
    if loaded["ignored"]:
        line += f"; left out: {_shorten(loaded['ignored'])}"
    print(printable(line), file=sys.stderr)


def add_options(parser, nets):
    """Add the options --net and --channels, which specify how to load a model's weights.

    Args:
        parser: argparse.ArgumentParser, or one of its argument groups.
        nets: names of the networks to choose from.
    """
    parser.add_argument("--net", choices=tuple(nets),
                        help="network that the model must have; not needed, because the file says which it has")
    add_channels_option(parser)


def add_channels_option(parser):
    """Add the option --channels alone, for a command with a --net of its own."""
    parser.add_argument("--channels", choices=CHANNELS,
                        help="channel order that the model was trained with (default: what the file states; otherwise "
                             "rgb for checkpoints of this project and MuggleWang's layout, bgr for all others)")


def architecture(names):
    """Return which network has weights with these names: "faceNet", "sphere20a", or None if neither does."""
    if "conv1_1.weight" not in names or "fc5.weight" not in names:
        return None
    return "faceNet" if "conv1_1bn.weight" in names else "sphere20a"


def fingerprint(net):
    """Return the SHA-256 of a network's weights and their names, in hexadecimal; equal for equal embeddings."""
    digest = hashlib.sha256()
    for name, value in sorted(net.state_dict().items()):
        if not name.endswith("num_batches_tracked"):    # has no effect on embeddings, and public files lack it
            digest.update(f"{name} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def model_file(path):
    """Return the file for a --model: the path itself, or checkpoint.pt in a folder.

    Raises:
        InputError: the folder has none, or the file has a format that can't be loaded back.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / "checkpoint.pt").is_file():
            raise InputError(f"the folder {path} holds no checkpoint.pt; pass the folder of a run, or a file.")
        return path / "checkpoint.pt"
    if path.suffix.lower() == ".onnx" or _is_torchscript(path):
        raise InputError(f"{path} is an export for other programs; pass the checkpoint it was made from, or export "
                         "safetensors.")
    return path


def _is_torchscript(path):
    try:
        return any(entry.filename.endswith("/constants.pkl") for entry in entries_of_zip(path))
    except Exception:
        return False


class _File(NamedTuple):
    """A file of weights: path, format, Found, name of the network, and as far as it states them, method, channel order,
    step, and threshold.
    """
    path: Path
    format: str
    found: Found
    net: str
    method: str | None
    channels: str | None
    step: int | None
    threshold: dict | None


def _read(path):
    path = model_file(path)
    if _is_safetensors(path):
        format, (content, stated) = "safetensors", _read_safetensors(path)
    else:
        with torch.serialization.safe_globals(IGNORED):
            content = load_tensors(path)
        format, stated = "state dict", {}
        if isinstance(content, dict) and content.get("format") == FORMAT:
            format, content = FORMAT, _check_progress(path, content)
            stated, content = {**content, "colour_order": "RGB"}, {"weights": content.get("weights")}
    found = find_weights(content)
    if found is None:
        raise InputError(f"{path} {_what_is_wrong(content)}; {PAGE}.")
    net = architecture(found.tensors)
    if net is None:
        raise InputError(f"the weights in {path} do not fit faceNet or sphere20a ({_in_file(found, 'fc5.weight')} is "
                         f"missing); {PAGE}.")
    method, channels = stated.get("method"), stated.get("colour_order")
    if channels is not None and channels.lower() not in CHANNELS:
        raise InputError(f"the header of {path} states the channel order {channels!r}, which is neither RGB nor BGR; "
                         "export it again.")
    method = _printable(method) if isinstance(method, str) and method != "unknown" else None
    return _File(path, format, found, net, method, channels and channels.lower(), stated.get("step"),
                 stated.get("threshold"))


def _check_progress(path, content):
    """Return the content of a checkpoint if its step and its threshold, which it may lack, are valid."""
    for name in ("step", "threshold"):
        if content.get(name) is not None and not CONTENT[name](content[name]):
            raise InputError(f"{path} is damaged (its entry {name!r} is not what casia_train.py writes); restore it "
                             "from a copy.")
    return content


def _what_is_wrong(content):
    if isinstance(content, dict):
        for part in (content, *(value for value in content.values() if isinstance(value, dict))):
            for name, value in part.items():
                if isinstance(value, torch.Tensor):
                    return f"contains no weights of the 20-layer CNN (its first tensor is {_printable(str(name))})"
    return "contains no weights"


def _is_safetensors(path):
    try:
        with open(path, "rb") as file:
            start = file.read(9)
        return start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size
    except OSError:
        return False    # load_tensors() says why


def _read_safetensors(path):
    """Return the tensors of a safetensors file, and what its header states, as dicts."""
    if path.stat().st_size > MAX_BYTES:
        raise InputError(f"{path} is larger than any checkpoint ({MAX_BYTES // 10**9} GB); pass a checkpoint file.")
    try:
        with safetensors.safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except Exception as error:    # safetensors and torch raise several kinds, which all mean that the file is unusable
        raise InputError(f"{path} is not a safetensors file that can be read ({str(error).splitlines()[0]}); export or "
                         "download it again.") from None


def _load(file, net, channels):
    found = file.found
    _check_fit(file, net)
    channels = channels or file.channels or found.layout.channels
    _copy_weights(file, net, channels)
    return {"format": file.format, "method": file.method, "net": file.net,
            "layout": found.layout.title, "channels": channels, "source": found.source, "ignored": found.ignored,
            "others": found.others, "fingerprint": fingerprint(net), "step": file.step, "threshold": file.threshold}


def _check_same_net(file, net_name):
    if file.net != net_name:
        raise InputError(f"{file.path} contains the weights of {file.net}, not of {net_name}; pass --net {file.net} or "
                         "leave out --net.")


def _check_fit(file, net):
    """Raise InputError unless the names and shapes of the weights match the network."""
    expected, found = net.state_dict(), file.found
    net_name = architecture(expected)
    _check_same_net(file, net_name)
    missing = [name for name in expected if name not in found.tensors and not name.endswith("num_batches_tracked")]
    unknown = [name for name in found.tensors if name not in expected and _extra_bias_shape(net, name) is None]
    if missing or unknown:
        problem = f"{_in_file(found, (missing or unknown)[0])} is {'missing' if missing else 'unknown'}"
        raise InputError(f"the weights in {file.path} do not fit {net_name} ({problem}); {PAGE}.")
    for name, value in found.tensors.items():
        shape = expected[name].shape if name in expected else _extra_bias_shape(net, name)
        if value.is_nested:    # it has no shape
            raise InputError(f"the weights in {file.path} are nested tensors; pass a checkpoint of ordinary tensors.")
        if value.shape != shape:
            raise InputError(f"the weights in {file.path} do not fit {net_name} ({_in_file(found, name)} is "
                             f"{_format_shape(value.shape)}, not {_format_shape(shape)}); {PAGE}.")
        if not value.is_floating_point() and not name.endswith("num_batches_tracked"):
            raise InputError(f"the weights in {file.path} are {value.dtype}; pass a checkpoint of ordinary tensors.")


def _in_file(found, name):
    """Return a weight's name as the file has it; our name for a weight that the file lacks."""
    if found.layout is LAYOUTS[0]:
        return _printable(name)
    return _printable(found.original[name]) if name in found.original else f"the counterpart of our {name}"


def _printable(name):
    return ascii(name[:80])[1:-1]


def _extra_bias_shape(net, name):
    """Return the shape for the bias of a convolution that has no bias in `net`, or None for any other name."""
    layer = dict(net.named_modules()).get(name.removesuffix(".bias"))
    if name.endswith(".bias") and isinstance(layer, nn.Conv2d) and layer.bias is None:
        return torch.Size([layer.out_channels])


def _copy_weights(file, net, channels):
    """Copy the weights into the network, with the file's channel order and normalization folded into conv1_1."""
    weights, device = dict(file.found.tensors), next(net.parameters()).device
    # In public checkpoints, residual convolutions may have biases that the network does not have yet.
    for name in weights.keys() - net.state_dict().keys():
        layer = net.get_submodule(name.removesuffix(".bias"))
        layer.bias = nn.Parameter(torch.zeros(layer.out_channels, device=device))
    try:
        first = weights["conv1_1.weight"]
        if channels == "bgr":
            first = first.flip(1)
        # Both inputs are zero at x = 127.5 and in the padding, so scaling the weight is exact.
        weights["conv1_1.weight"] = (first.double() * (128 / file.found.layout.divisor)).float()
        net.load_state_dict({**net.state_dict(), **weights})
    except (RuntimeError, NotImplementedError) as error:  # quantized or sparse tensors, or tensors without storage
        reason = str(error).splitlines()[-1].strip()
        raise InputError(f"{file.path} contains weights that can't be loaded ({reason}); pass a checkpoint of ordinary "
                         "tensors.") from None


def _shorten(names, count=3):
    return ", ".join(map(_printable, names[:count])) + (f" and {len(names) - count} more" if len(names) > count else "")


def _format_shape(shape):
    return "x".join(map(str, shape)) or "a scalar"
