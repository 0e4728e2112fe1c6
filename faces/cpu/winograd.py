"""3x3 convolutions on a CPU by Winograd's minimal filtering, F(4x4, 3x3) (Lavin and Gray, arXiv:1509.09308).

A tile d of 6x6 pixels and a kernel g give 4x4 outputs A'[(G g G') * (B'd B)]A, which takes 36 products for each pair of
an input and an output channel instead of 144. Summed over the input channels, they are 36 matrix products, which MKL
computes as fast as oneDNN convolves. The gradient with respect to the input is again such a convolution. The gradient
with respect to the kernel is G'[(B'd B) * (A e A')]G, with e the 4x4 gradient of the tile's outputs, and also takes 36
products.
"""
import functools

import numpy as np
import torch
from torch import nn
from torch.autograd.function import once_differentiable

from faces.cpu import kernels

TILE_OUT, TILE_IN = 4, 6    # side of a tile in the output and in the input, in pixels
# The interpolation points besides infinity, as in kernels.c; 0, +-1, +-2 would have larger rounding errors.
POINTS = (0, 0.5 ** 0.5, -0.5 ** 0.5, 2 ** 0.5, -2 ** 0.5)


def can_use_winograd(layer):
    """Return whether a layer is a convolution that this module computes faster than PyTorch on a CPU in float32, if
    faces.cpu.kernels is available."""
    return (isinstance(layer, nn.Conv2d) and kernels.supports_channels(layer.in_channels)
            and kernels.supports_channels(layer.out_channels) and (layer.kernel_size, layer.stride, layer.padding) == (
                (3, 3), (1, 1), (1, 1)) and (layer.dilation, layer.groups, layer.padding_mode) == ((1, 1), 1, "zeros"))


class FusedWinogradConv2d(nn.Module):
    """A 3x3 convolution of stride 1 and padding 1 with bias, and the PReLU that follows it, if any, for inference.

    In float32, its rounding errors are about those of a direct convolution. Later changes to the weights of `conv` have
    no effect.
    """

    def __init__(self, conv, prelu=None):
        super().__init__()
        channels = conv.out_channels
        self.register_buffer("weight", transform_kernels(conv.weight.detach().double()).float().permute(1, 2, 0))
        self.register_buffer("bias", self.weight.new_zeros(channels) if conv.bias is None else
                             conv.bias.detach().clone())
        self.register_buffer("slope", self.weight.new_ones(channels) if prelu is None else
                             prelu.weight.detach().expand(channels).contiguous())

    def forward(self, x):
        """Convolve float (N, C, H, W) to (N, K, H, W) in channels_last memory format; fastest if x has it, too."""
        return _fused_convolution(x, self.weight, self.bias, self.slope)


class WinogradConv2d(nn.Conv2d):
    """nn.Conv2d for training, with output and gradients computed by faces.cpu.kernels, which must be available."""

    def forward(self, x):
        y = _WinogradConvolution.apply(x, self.weight)
        return y if self.bias is None else y + self.bias[:, None, None]


class _WinogradConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)    # the transform of x would take twice the memory and is quickly recomputed
        return _convolution(x, transform_kernels(weight).permute(1, 2, 0))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _convolution(grad, transform_kernels(weight.flip(2, 3)).permute(1, 0, 2))      # weight (36, K, C)
        kernel_transform = _kernel_transform(torch.float32)
        total = grad.new_zeros(TILE_IN ** 2, len(weight), x.shape[1])                               # (36, K, C)
        for part, grad_part in zip(_split(x, x.shape), _split(grad, x.shape)):
            total.baddbmm_(kernels.transform_grad_output(grad_part).transpose(1, 2), kernels.transform_input(part))
        grad_weight = torch.kron(kernel_transform, kernel_transform).T @ total.flatten(1)           # (9, K C)
        grad_weight = grad_weight.view(3, 3, len(weight), x.shape[1]).permute(2, 3, 0, 1)
        return grad_x, grad_weight.contiguous(memory_format=torch.channels_last)


def transform_kernels(weight):
    """Return G g G' for each kernel g of a weight: float (K, C, 3, 3) to (K, 36, C); channels_last needs no copy."""
    kernel_transform = _kernel_transform(weight.dtype)
    return torch.kron(kernel_transform, kernel_transform) @ weight.permute(0, 2, 3, 1).flatten(1, 2)


def _convolution(x, weight):
    """Return the convolution without bias and PReLU; see _fused_convolution()."""
    return _fused_convolution(x, weight, weight.new_zeros(weight.shape[2]), weight.new_ones(weight.shape[2]))


def _fused_convolution(x, weight, bias, slope):
    """Return PReLU(convolution + bias), float (N, K, H, W), of x, float (N, C, H, W), with a transformed weight, float
    (36, C, K); bias and slope are float (K,)."""
    y = x.new_empty(len(x), *x.shape[2:], len(bias))
    for part, output in zip(_split(x, x.shape), _split(y, x.shape)):
        kernels.transform_output(torch.bmm(kernels.transform_input(part), weight), bias, slope, output)
    return y.permute(0, 3, 1, 2)


def _split(tensor, shape):
    """Split a batch along its first dimension into parts whose transforms fit into the processor's cache; `shape`,
    (N, C, H, W), is that of the convolution's input.

    A part has at most as many tiles as channels, unless it is a single image. Its transform is then no larger than that
    of the kernels it is multiplied by.
    """
    _, channels, height, width = shape
    return tensor.split(max(1, channels // (-(-height // TILE_OUT) * -(-width // TILE_OUT))))


@functools.cache
def _kernel_transform(dtype):
    """Return G, (6, 3), for which A'((G g) * (B'd)) is the correlation of six values d with three values g; kernels.c
    has B' and A'. This is the construction of Toom and Cook: to multiply two polynomials, multiply their values at
    different points, the last of which is infinity."""
    scale = [np.prod([point - other for other in POINTS if other != point]) for point in POINTS]
    matrix = np.vstack([np.vander(POINTS, 3, increasing=True) / np.array(scale)[:, None], (0, 0, 1)])
    return torch.from_numpy(matrix).to(dtype)
