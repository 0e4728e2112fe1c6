"""Load weights of the 20-layer CNN from checkpoints of this project and from public ones.

Public checkpoints are bare state dicts with the layer names conv1_1 .. conv4_3, relu1_1 .., fc5 and, in the variant
with batch normalization, conv1_1bn .. fc5_bn. Their networks read images with OpenCV, so their channels are BGR; their
residual convolutions may have biases; and they contain the training head, fc6, which is dropped.
"""
import torch
from torch import nn

from faces.files import InputError
from faces.training.checkpoint import FORMAT, load_tensors

CHANNELS = ("rgb", "bgr")


def load_weights(net, path, channels=None):
    """Load the weights of a file into a network; afterwards, the network takes RGB.

    Args:
        net: faceNet() or sphere20a().
        path: a checkpoint of this project, or a public state dict, bare or under the key "state_dict" or "model", with
            or without the prefix "module.".
        channels: channel order that the weights were trained with, "rgb" or "bgr"; None assumes "rgb" for checkpoints
            of this project and "bgr" for all others.

    Returns:
        dict that describes the file: "format", "method" (None if the file does not say), "channels".

    Raises:
        InputError: the file can't be read safely, is not a checkpoint, or has weights that do not fit `net`.
    """
    state = load_tensors(path)
    ours = isinstance(state, dict) and state.get("format") == FORMAT
    weights = _without_head(_state_dict(path, state))
    _check_fit(path, weights, net)
    if channels is None:
        channels = "rgb" if ours else "bgr"
    if channels == "bgr":
        weights["conv1_1.weight"] = weights["conv1_1.weight"].flip(1)
    _load(path, net, weights)
    return {"format": FORMAT if ours else "state dict", "method": state.get("method") if ours else None,
            "channels": channels}


def add_options(parser, nets):
    """Add the options --net and --channels, which say how to read a model's file.

    Args:
        parser: argparse.ArgumentParser, or a group of one.
        nets: names of the networks to choose from.
    """
    parser.add_argument("--net", choices=tuple(nets), default="faceNet",
                        help="faceNet has batch normalization; sphere20a is the paper's network without it "
                             "(default: faceNet)")
    parser.add_argument("--channels", choices=CHANNELS,
                        help="channel order that the model was trained with (default: rgb for checkpoints of this "
                             "project, bgr for any other, as the released ones)")


def architecture(names):
    """Return the network that a state dict with these names belongs to: "faceNet", "sphere20a" or None."""
    if "conv1_1.weight" not in names or "fc5.weight" not in names:
        return None
    return "faceNet" if "conv1_1bn.weight" in names else "sphere20a"


def _state_dict(path, state):
    """Find the state dict in the content of a file, and remove the prefix of DataParallel from its names."""
    for key in ("weights", "state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    if not isinstance(state, dict) or not state or not all(isinstance(name, str) and isinstance(value, torch.Tensor)
                                                           for name, value in state.items()):
        raise InputError(f"{path} contains no weights; pass a checkpoint of this project or a network's state dict.")
    return {name.removeprefix("module."): value for name, value in state.items()}


def _without_head(weights):
    return {name: value for name, value in weights.items() if not name.startswith("fc6")}


def _check_fit(path, weights, net):
    expected = net.state_dict()
    wanted, found = architecture(expected), architecture(weights)
    if found is not None and found != wanted:
        raise InputError(f"{path} contains the weights of {found}, not of {wanted}; pass --net {found}.")
    missing = [n for n in expected if n not in weights and not n.endswith("num_batches_tracked")]
    surplus = [n for n in weights if n not in expected and _bias_of(net, n) is None]
    if missing or surplus:
        fault = f"{missing[0]} is missing" if missing else f"{surplus[0]} is unknown"
        raise InputError(f"{path} contains the weights of another network than {wanted} ({fault}); "
                         "pass a checkpoint of faceNet or sphere20a.")
    for name, value in weights.items():
        shape = expected[name].shape if name in expected else _bias_of(net, name)
        if value.shape != shape:
            raise InputError(f"{path} contains the weights of another network than {wanted} ({name} is "
                             f"{_size(value.shape)}, not {_size(shape)}); pass a checkpoint of faceNet or sphere20a.")


def _bias_of(net, name):
    """Return the shape of the bias of a convolution that has none in `net`, or None for any other name."""
    layer = dict(net.named_modules()).get(name.removesuffix(".bias"))
    if name.endswith(".bias") and isinstance(layer, nn.Conv2d) and layer.bias is None:
        return torch.Size([layer.out_channels])


def _load(path, net, weights):
    device = next(net.parameters()).device
    for name in weights.keys() - net.state_dict().keys():  # biases of public residual convolutions
        layer = net.get_submodule(name.removesuffix(".bias"))
        layer.bias = nn.Parameter(torch.zeros(layer.out_channels, device=device))
    try:
        net.load_state_dict({**net.state_dict(), **weights})
    except RuntimeError as error:  # quantized or sparse tensors, or tensors without storage
        raise InputError(f"{path} contains weights that can't be used ({str(error).splitlines()[-1].strip()}); pass "
                         "a checkpoint of ordinary tensors.") from None


def _size(shape):
    return "x".join(map(str, shape)) or "a scalar"
