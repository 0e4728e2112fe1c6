"""A copy of a network for inference, which gives the same embeddings sooner.

Batch normalisation is folded into the layer before it, and on a CPU the 3x3 convolutions go by Winograd's method, PReLU
with them. Convolutions take most of a CPU's time, and oneDNN's run at the speed of matrix products already, so what is
left to gain is to multiply less.
"""
import copy

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from faces.winograd import Winograd, pays

MANY = 64   # images from which they pay for transforming the weights


def for_inference(net, device, dtype=torch.float32, images=MANY):
    """Return a copy of a network on a device, in eval mode, that embeds faster; the network itself is left as it is.

    Args:
        net: module, (N, 3, 112, 96) to (N, D), layers named as net.py names them (of others nothing is folded).
        device: torch.device.
        dtype: what it is to compute in.
        images: how many it is to embed, about.
    """
    fast = copy.deepcopy(net).eval()
    fold_batch_norm(fast)
    # cuDNN has Winograd of its own, bfloat16 has units of its own.
    if torch.device(device).type == "cpu" and dtype == torch.float32 and images >= MANY:
        for name, layer in list(fast.named_children()):
            if pays(layer):
                after = name.replace("conv", "relu")
                prelu = getattr(fast, after, None)
                if isinstance(prelu, nn.PReLU):
                    setattr(fast, after, nn.Identity())
                else:
                    prelu = None
                setattr(fast, name, Winograd(layer, prelu))
    return fast.to(device, memory_format=torch.channels_last)


def fold_batch_norm(net):
    """Fold, in place, each batch normalisation NAMEbn or NAME_bn of a network in eval mode into its layer NAME."""
    for name, norm in list(net.named_children()):
        before = name.removesuffix("bn").removesuffix("_")
        layer = getattr(net, before, None)
        if isinstance(norm, nn.BatchNorm2d) and isinstance(layer, nn.Conv2d):
            setattr(net, before, fuse_conv_bn_eval(layer, norm))
        elif isinstance(norm, nn.BatchNorm1d) and isinstance(layer, nn.Linear):
            setattr(net, before, fuse_linear_bn_eval(layer, norm))
        else:
            continue
        setattr(net, name, nn.Identity())
