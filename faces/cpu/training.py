"""A network made fast for training on a CPU in float32.

Convolutions of stride 1 are Winograd's, the gradient by the kernel of the others is a product of matrices, and PReLU's
gradients are computed in one pass. All of it is exact but for rounding; `benchmarks/training_step.py` says what it
gains.
"""
import torch
from torch import nn
from torch.autograd.function import once_differentiable

from faces.cpu import kernels
from faces.cpu.winograd import WinogradConv2d, can_use_winograd

MIN_CHANNELS = 32   # channels, from which StridedConv2d gains anything
IMAGES = 8  # of which the pixels below a kernel are laid out at a time


class FastPReLU(nn.PReLU):
    """nn.PReLU with another way to compute its gradients. Needs faces.cpu.kernels."""

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


class StridedConv2d(nn.Conv2d):
    """nn.Conv2d whose gradient by the kernel is a product of matrices; oneDNN takes 1.5 times as long for it."""

    def forward(self, x):
        return _StridedConvolution.apply(x, self.weight, self.bias, self.stride, self.padding)


class _StridedConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding):
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return nn.functional.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        by_x, by_weight, by_bias = ctx.needs_input_grad[:3]
        return (nn.grad.conv2d_input(x.shape, weight, grad, ctx.stride, ctx.padding) if by_x else None,
                _gradient_by_kernel(grad, x, weight.shape, ctx.stride, ctx.padding) if by_weight else None,
                grad.sum((0, 2, 3)) if by_bias else None, None, None)


def _gradient_by_kernel(grad, x, shape, stride, padding):
    """Sum over all places of the outputs' gradients times the pixels below the kernel, some images at a time."""
    count, channels, height, width = shape
    total = grad.new_zeros(count, height * width * channels)
    for part, grad_part in zip(x.split(IMAGES), grad.split(IMAGES)):
        padded = nn.functional.pad(part, (padding[1], padding[1], padding[0], padding[0])).permute(0, 2, 3, 1)
        below = padded.unfold(1, height, stride[0]).unfold(2, width, stride[1]).permute(0, 1, 2, 4, 5, 3)
        total.addmm_(grad_part.permute(0, 2, 3, 1).reshape(-1, count).T, below.reshape(-1, total.shape[1]))
    return total.view(count, height, width, channels).permute(0, 3, 1, 2)


def for_training(net, device="cpu", dtype=torch.float32):
    """Change, in place, how a network computes; its parameters, their names and what it computes stay.

    Nothing is changed for another device or type than these, nor where faces.cpu.kernels is not available.

    Args:
        net: module.
        device: torch.device that it trains on.
        dtype: what it is to compute in.
    """
    if torch.device(device).type != "cpu" or dtype != torch.float32 or not kernels.available():
        return net
    for layer in net.modules():
        if type(layer) is nn.Conv2d and can_use_winograd(layer):
            layer.__class__ = WinogradConv2d
        elif type(layer) is nn.Conv2d and _is_strided(layer):
            layer.__class__ = StridedConv2d
        elif type(layer) is nn.PReLU and kernels.supports_channels(layer.num_parameters):
            layer.__class__ = FastPReLU
    return net


def _is_strided(layer):
    """Whether StridedConv2d computes what this convolution does, and faster."""
    return (layer.stride != (1, 1) and layer.in_channels >= MIN_CHANNELS and not isinstance(layer.padding, str)
            and (layer.dilation, layer.groups, layer.padding_mode) == ((1, 1), 1, "zeros"))
