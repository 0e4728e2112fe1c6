"""Load the weights of the 20-layer CNN: checkpoints of this project, and public ones as they are.

Public checkpoints are bare state dicts with the layer names conv1_1 .. conv4_3, relu1_1 .., fc5 and, in the variant
with batch normalization, conv1_1bn .. fc5_bn. Three habits of theirs are met here: they read images with OpenCV, so
that the channels are BGR; their residual convolutions may have biases; they keep the training head, fc6, which is left
out.
"""
import torch
from torch import nn

from faces.files import InputError
from faces.training.checkpoint import FORMAT, load_tensors

CHANNELS = ("rgb", "bgr")


def load_weights(net, path, channels=None):
    """Fill a network with the weights of a file; the network takes RGB afterwards.

    Args:
        net: faceNet() or sphere20a().
        path: a checkpoint of this project, or a public state dict, bare or under "state_dict" or "model", with or
            without the prefix "module.".
        channels: order of the channels the weights were trained with, "rgb" or "bgr"; None takes "rgb" for a checkpoint
            of this project and "bgr" for any other.

    Returns:
        dict of what was loaded: "format", "method" (None where the file doesn't say), "channels".

    Raises:
        InputError: a file that can't be read safely, that is no checkpoint, or whose weights don't fit `net`.
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
    """Add --net and --channels, which say how a model's file is to be read.

    Args:
        parser: argparse.ArgumentParser, or a group of one.
        nets: names of the networks to choose from.
    """
    parser.add_argument("--net", choices=tuple(nets), default="faceNet",
                        help="faceNet has batch normalization; sphere20a is the paper's net without it (default: "
                             "faceNet)")
    parser.add_argument("--channels", choices=CHANNELS,
                        help="order of the channels the model was trained with (default: rgb for checkpoints of this "
                             "project, bgr for any other, as the released ones are)")


def architecture(names):
    """Return which network a state dict with these names belongs to: "faceNet", "sphere20a" or None."""
    if "conv1_1.weight" not in names or "fc5.weight" not in names:
        return None
    return "faceNet" if "conv1_1bn.weight" in names else "sphere20a"


def _state_dict(path, state):
    """Find the state dict in what a file holds, and take the prefix of DataParallel off its names."""
    for key in ("weights", "state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    if not isinstance(state, dict) or not state or not all(isinstance(name, str) and isinstance(value, torch.Tensor)
                                                           for name, value in state.items()):
        raise InputError(f"{path} holds no weights; give a checkpoint of this project or a network's state dict.")
    return {name.removeprefix("module."): value for name, value in state.items()}


def _without_head(weights):
    return {name: value for name, value in weights.items() if not name.startswith("fc6")}


def _check_fit(path, weights, net):
    expected = net.state_dict()
    wanted, found = architecture(expected), architecture(weights)
    if found is not None and found != wanted:
        raise InputError(f"{path} holds the weights of {found}, not of {wanted}; give --net {found}.")
    missing = [n for n in expected if n not in weights and not n.endswith("num_batches_tracked")]
    surplus = [n for n in weights if n not in expected and _bias_of(net, n) is None]
    if missing or surplus:
        fault = f"{missing[0]} is missing" if missing else f"{surplus[0]} is unknown"
        raise InputError(f"{path} holds the weights of another network than {wanted} ({fault}); "
                         "give a checkpoint of faceNet or sphere20a.")
    for name, value in weights.items():
        shape = expected[name].shape if name in expected else _bias_of(net, name)
        if value.shape != shape:
            raise InputError(f"{path} holds the weights of another network than {wanted} ({name} is "
                             f"{_size(value.shape)}, not {_size(shape)}); give a checkpoint of faceNet or sphere20a.")


def _bias_of(net, name):
    """Return the shape that a bias would have in a convolution built without one, or None for any other name."""
    layer = dict(net.named_modules()).get(name.removesuffix(".bias"))
    if name.endswith(".bias") and isinstance(layer, nn.Conv2d) and layer.bias is None:
        return torch.Size([layer.out_channels])


def _load(path, net, weights):
    device = next(net.parameters()).device
    for name in weights.keys() - net.state_dict().keys():  # biases that the public residual convolutions have
        layer = net.get_submodule(name.removesuffix(".bias"))
        layer.bias = nn.Parameter(torch.zeros(layer.out_channels, device=device))
    try:
        net.load_state_dict({**net.state_dict(), **weights})
    except RuntimeError as error:  # exotic tensors: quantized, sparse, without storage
        raise InputError(f"{path} holds weights that can't be copied: {str(error).splitlines()[-1].strip()}") from None


def _size(shape):
    return "x".join(map(str, shape)) or "a scalar"
