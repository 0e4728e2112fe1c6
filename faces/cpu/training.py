"""Faster training on a CPU in float32.

Convolutions of stride 1 use Winograd's algorithm, the weight gradient of strided convolutions is a matrix product, and
the gradients of PReLU are computed in a single pass. Results differ from PyTorch's by rounding only, and
benchmarks/training_step.py measures the speedup.
"""
import torch
from torch import nn
from torch.autograd.function import once_differentiable

from faces.cpu import kernels
from faces.cpu.winograd import WinogradConv2d, can_use_winograd

MIN_CHANNELS = 32   # StridedConv2d is not faster with fewer input channels
CHUNK = 8           # only this many images have their patches in memory at a time


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


class StridedConv2d(nn.Conv2d):
    """nn.Conv2d whose weight gradient is a matrix product, because oneDNN takes 1.5 times as long to compute it."""

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
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        return (nn.grad.conv2d_input(x.shape, weight, grad, ctx.stride, ctx.padding) if needs_x else None,
                _weight_gradient(grad, x, weight.shape, ctx.stride, ctx.padding) if needs_weight else None,
                grad.sum((0, 2, 3)) if needs_bias else None, None, None)


def _weight_gradient(grad, x, weight_shape, stride, padding):
    """Return the gradient of a convolution's weight, (K, C, kernel height, kernel width): the gradient of the output,
    float (N, K, H', W'), times patches of the input x, float (N, C, H, W), summed over all positions."""
    out_channels, in_channels, height, width = weight_shape
    total = grad.new_zeros(out_channels, height * width * in_channels)
    for chunk, grad_chunk in zip(x.split(CHUNK), grad.split(CHUNK)):
        padded = nn.functional.pad(chunk, (padding[1], padding[1], padding[0], padding[0])).permute(0, 2, 3, 1)
        patches = padded.unfold(1, height, stride[0]).unfold(2, width, stride[1]).permute(0, 1, 2, 4, 5, 3)
        total.addmm_(grad_chunk.permute(0, 2, 3, 1).reshape(-1, out_channels).T, patches.reshape(-1, total.shape[1]))
    return total.view(out_channels, height, width, in_channels).permute(0, 3, 1, 2)


def for_training(net, device="cpu", dtype=torch.float32):
    """Make a network train faster, in place, and return it; its parameters, their names and its results up to rounding
    stay the same. Nothing changes on other devices, in other dtypes, or where faces.cpu.kernels is not available."""
    if torch.device(device).type != "cpu" or dtype != torch.float32 or not kernels.available():
        return net
    for layer in net.modules():
        if type(layer) is nn.Conv2d and can_use_winograd(layer):
            layer.__class__ = WinogradConv2d
        elif type(layer) is nn.Conv2d and _can_use_strided(layer):
            layer.__class__ = StridedConv2d
        elif type(layer) is nn.PReLU and kernels.supports_channels(layer.num_parameters):
            layer.__class__ = FastPReLU
    return net


def _can_use_strided(layer):
    """Return whether StridedConv2d computes the same as this convolution, and faster."""
    return (layer.stride != (1, 1) and layer.in_channels >= MIN_CHANNELS and not isinstance(layer.padding, str)
            and (layer.dilation, layer.groups, layer.padding_mode) == ((1, 1), 1, "zeros"))
