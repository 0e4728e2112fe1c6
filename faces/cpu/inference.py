"""Faster inference on a CPU in float32: Winograd convolutions with fused PReLU.

Convolutions take most of the time, and oneDNN already runs them at the speed of matrix products, so the only way to be
faster is to multiply less.
"""
from torch import nn

from faces.cpu import kernels
from faces.cpu.winograd import FusedWinogradConv2d, can_use_winograd

MIN_IMAGES = 64   # with fewer images, transforming the weights takes longer than the Winograd convolutions save


def for_inference(net, images=MIN_IMAGES):
    """Replace, in place, the convolutions of a float32 network in eval mode that Winograd's algorithm makes faster on a
    CPU, and return the network. Its layers are named as in net.py; a PReLU relu1_2 is fused into its convolution
    conv1_2. To embed fewer than MIN_IMAGES `images`, nothing is replaced."""
    if images < MIN_IMAGES or not kernels.available():
        return net
    for name, layer in list(net.named_children()):
        if can_use_winograd(layer):
            prelu_name = name.replace("conv", "relu")
            prelu = getattr(net, prelu_name, None)
            if isinstance(prelu, nn.PReLU):
                setattr(net, prelu_name, nn.Identity())
            else:
                prelu = None
            setattr(net, name, FusedWinogradConv2d(layer, prelu))
    return net
