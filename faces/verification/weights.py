"""Load weights of the 20-layer CNN from checkpoints of this project and from public ones.

Public checkpoints are bare state dicts. Their layers are named conv1_1 .. conv4_3, relu1_1 .. relu4_3 and fc5; the
variant with batch normalization adds conv1_1bn .. fc5_bn. They were trained on images read with OpenCV, so they expect
BGR channels. Their residual convolutions may have biases, and they contain the training head, fc6, which is dropped.
"""
import torch
from torch import nn

from faces.files import InputError
from faces.training.checkpoint import FORMAT, load_tensors

CHANNELS = ("rgb", "bgr")


def load_weights(net, path, channels=None):
    """Load the weights in a file into a network; the network then takes RGB, whatever the channel order of the file.

    Args:
        net: faceNet() or sphere20a().
        path: a checkpoint of this project, or a public state dict: bare or under the key "state_dict" or "model", and
            with or without the prefix "module." that DataParallel adds to its names.
        channels: channel order that the weights were trained with, "rgb" or "bgr"; None assumes "rgb" for checkpoints
            of this project and "bgr" for all others.

    Returns:
        dict that describes the file, with the keys "format", "method" (None if the file does not name it) and
        "channels".

    Raises:
        InputError: the file can't be read safely, is not a checkpoint, or contains weights that do not fit `net`.
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
    """Add the options --net and --channels, which specify how to load a model's weights.

    Args:
        parser: argparse.ArgumentParser, or one of its argument groups.
        nets: names of the networks to choose from.
    """
    parser.add_argument("--net", choices=tuple(nets), default="faceNet",
                        help="faceNet has batch normalization; sphere20a is the paper's network without it "
                             "(default: faceNet)")
    add_channels_option(parser)


def add_channels_option(parser):
    """Add the option --channels alone, for a command with a --net of its own."""
    parser.add_argument("--channels", choices=CHANNELS,
                        help="channel order that the model was trained with (default: rgb for checkpoints of this "
                             "project, bgr for all others, such as the released weights)")


def architecture(names):
    """Return which network has weights with these names: "faceNet", "sphere20a", or None if neither does."""
    if "conv1_1.weight" not in names or "fc5.weight" not in names:
        return None
    return "faceNet" if "conv1_1bn.weight" in names else "sphere20a"


def _state_dict(path, state):
    """Return the state dict in a file's content, without the prefix that DataParallel adds to its names."""
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
    """Raise InputError unless the names and shapes of the weights match the network."""
    expected = net.state_dict()
    net_name, file_net_name = architecture(expected), architecture(weights)
    if file_net_name is not None and file_net_name != net_name:
        raise InputError(f"{path} contains the weights of {file_net_name}, not of {net_name}; pass --net "
                         f"{file_net_name}.")
    missing = [name for name in expected if name not in weights and not name.endswith("num_batches_tracked")]
    unknown = [name for name in weights if name not in expected and _extra_bias_shape(net, name) is None]
    if missing or unknown:
        problem = f"{missing[0]} is missing" if missing else f"{unknown[0]} is unknown"
        raise InputError(f"the weights in {path} do not fit {net_name} ({problem}); pass a checkpoint of faceNet or "
                         "sphere20a.")
    for name, value in weights.items():
        shape = expected[name].shape if name in expected else _extra_bias_shape(net, name)
        if value.shape != shape:
            raise InputError(f"the weights in {path} do not fit {net_name} ({name} is {_format_shape(value.shape)}, "
                             f"not {_format_shape(shape)}); pass a checkpoint of faceNet or sphere20a.")


def _extra_bias_shape(net, name):
    """Return the shape for the bias of a convolution that has no bias in `net`, or None for any other name."""
    layer = dict(net.named_modules()).get(name.removesuffix(".bias"))
    if name.endswith(".bias") and isinstance(layer, nn.Conv2d) and layer.bias is None:
        return torch.Size([layer.out_channels])


def _load(path, net, weights):
    device = next(net.parameters()).device
    # In public checkpoints, residual convolutions may have biases that the network does not have yet.
    for name in weights.keys() - net.state_dict().keys():
        layer = net.get_submodule(name.removesuffix(".bias"))
        layer.bias = nn.Parameter(torch.zeros(layer.out_channels, device=device))
    try:
        net.load_state_dict({**net.state_dict(), **weights})
    except RuntimeError as error:  # PyTorch can't copy from quantized or sparse tensors, or tensors without storage
        raise InputError(f"{path} contains weights that can't be loaded ({str(error).splitlines()[-1].strip()}); pass "
                         "a checkpoint of ordinary tensors.") from None


def _format_shape(shape):
    return "x".join(map(str, shape)) or "a scalar"
