"""A network made fast for training on a CPU in float32: Winograd's convolutions, and PReLU's gradient in one pass.

Both are exact but for rounding. `benchmarks/training_step.py` says what they gain.
"""
import torch
from torch import nn
from torch.autograd.function import once_differentiable

from faces import kernels
from faces.winograd import WinogradConv2d, pays


class FastPReLU(nn.PReLU):
    """nn.PReLU with another way to compute its gradients. Needs faces.kernels."""

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


def for_training(net, device=torch.device("cpu"), dtype=torch.float32):
    """Change, in place, how a network computes; its parameters, their names and what it computes stay.

    Nothing is changed for another device or type than these, nor where faces.kernels is not available.

    Args:
        net: module.
        device: torch.device that it trains on.
        dtype: what it is to compute in.
    """
    if device.type != "cpu" or dtype != torch.float32 or not kernels.available():
        return net
    for layer in net.modules():
        if type(layer) is nn.Conv2d and pays(layer):
            layer.__class__ = WinogradConv2d
        elif type(layer) is nn.PReLU and kernels.fits(layer.num_parameters):
            layer.__class__ = FastPReLU
    return net
