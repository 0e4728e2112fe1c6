"""Exchange the layers of a network for faster ones on a CPU in float32; results differ by rounding only.

Convolutions of stride 1 use Winograd's algorithm. They take most of the time, and oneDNN already runs them at the speed
of matrix products, so the only way to be faster is to multiply less. In training, the gradients of PReLU are computed
in a single pass; in inference, PReLU is a part of the convolution.
"""
import torch
from torch import nn
from torch.autograd.function import once_differentiable

from faces.cpu import kernels
from faces.cpu.winograd import FusedWinogradConv2d, WinogradConv2d, can_use_winograd

MIN_IMAGES = 64   # with fewer images, transforming the weights takes longer than the Winograd convolutions save


def for_training(net, device="cpu", dtype=torch.float32):
    """Make a network train faster, in place, and return it; its parameters and their names stay the same. Nothing
    changes on other devices, in other dtypes, or where faces.cpu.kernels is not available."""
    if torch.device(device).type != "cpu" or dtype != torch.float32 or not kernels.available():
        return net
    for layer in net.modules():
        if type(layer) is nn.Conv2d and can_use_winograd(layer):
            layer.__class__ = WinogradConv2d
        elif type(layer) is nn.PReLU and kernels.supports_channels(layer.num_parameters):
            layer.__class__ = FastPReLU
    return net


def for_inference(net, images=MIN_IMAGES):
    """Make a network in eval mode faster, in place, and return it. Its layers are named as in net.py; a PReLU relu1_2
    is fused into its convolution conv1_2. To embed fewer than MIN_IMAGES `images`, nothing is replaced."""
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


class FastPReLU(nn.PReLU):
    """nn.PReLU whose gradients are computed by faces.cpu.kernels, which must be available."""

    def forward(self, x):
        return _PReLU.apply(x, self.weight)


class _PReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, slope):
        ctx.save_for_backward(x, slope)
        return nn.functional.prelu(x, slope)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return kernels.prelu_gradients(grad, *ctx.saved_tensors)
