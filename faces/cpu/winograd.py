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
# Without the C kernels, the transforms are costly and pay off only from this number of input channels.
MIN_CHANNELS = 128


def can_use_winograd(layer):
    """Return whether a layer is a convolution that this module computes faster than PyTorch on a CPU in float32."""
    if not isinstance(layer, nn.Conv2d) or (
            layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode) != (
            (3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros"):
        return False
    if kernels.available():
        return kernels.supports_channels(layer.in_channels) and kernels.supports_channels(layer.out_channels)
    return layer.in_channels >= MIN_CHANNELS and kernels.enabled()


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
        kernel_transform = _matrices(torch.float32)[1]
        total = grad.new_zeros(TILE_IN ** 2, len(weight), x.shape[1])                               # (36, K, C)
        for part, grad_part in zip(_split(x, x.shape), _split(grad, x.shape)):
            total.baddbmm_(kernels.transform_grad_output(grad_part).transpose(1, 2), kernels.transform_input(part))
        grad_weight = torch.kron(kernel_transform, kernel_transform).T @ total.flatten(1)           # (9, K C)
        grad_weight = grad_weight.view(3, 3, len(weight), x.shape[1]).permute(2, 3, 0, 1)
        return grad_x, grad_weight.contiguous(memory_format=torch.channels_last)


def transform_kernels(weight):
    """Return G g G' for each kernel g of a weight: float (K, C, 3, 3) to (K, 36, C); channels_last needs no copy."""
    kernel_transform = _matrices(weight.dtype)[1]
    return torch.kron(kernel_transform, kernel_transform) @ weight.permute(0, 2, 3, 1).flatten(1, 2)


def _convolution(x, weight):
    """Return the convolution without bias and PReLU; see _fused_convolution()."""
    return _fused_convolution(x, weight, weight.new_zeros(weight.shape[2]), weight.new_ones(weight.shape[2]))


def _fused_convolution(x, weight, bias, slope):
    """Return PReLU(convolution + bias), float (N, K, H, W), of x, float (N, C, H, W), with a transformed weight, float
    (36, C, K); bias and slope are float (K,)."""
    if not (kernels.available() and kernels.supports_channels(x.shape[1]) and kernels.supports_channels(len(bias))):
        return _fused_convolution_without_kernels(x, weight, bias, slope)
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


def _fused_convolution_without_kernels(x, weight, bias, slope):
    count, channels, height, width = x.shape
    down, across = -(-height // TILE_OUT), -(-width // TILE_OUT)
    input_transform, output_transform = (torch.kron(m, m).expand(count * down * across, -1, -1) for m in
                                         _matrices(torch.float32)[::2])
    x = nn.functional.pad(x, (1, across * TILE_OUT + 1 - width, 1, down * TILE_OUT + 1 - height)).permute(0, 2, 3, 1)
    x = x.unfold(1, TILE_IN, TILE_OUT).unfold(2, TILE_IN, TILE_OUT).permute(0, 1, 2, 4, 5, 3)
    # x is now (N, down, across, 6, 6, C): overlapping tiles of the input.
    x = torch.bmm(input_transform, x.reshape(len(input_transform), TILE_IN ** 2, channels))     # (T, 36, C)
    x = torch.bmm(x.transpose(0, 1), weight).transpose(0, 1)                                    # (T, 36, K)
    x = torch.baddbmm(bias, output_transform, x).view(count, down, across, TILE_OUT, TILE_OUT, -1).transpose(2, 3)
    x = x.reshape(count, down * TILE_OUT, across * TILE_OUT, -1)[:, :height, :width].permute(0, 3, 1, 2)
    return nn.functional.prelu(x, slope)


@functools.cache
def _matrices(dtype):
    """Return B', G and A' of F(4x4, 3x3) as tensors."""
    return tuple(torch.from_numpy(matrix).to(dtype).contiguous() for matrix in winograd_matrices(POINTS))


def winograd_matrices(points):
    """Return the matrices B', G and A', float64 (n, n), (n, 3) and (n - 2, n), for which A'((G g) * (B'd)) is the
    correlation of n values d with 3 values g.

    This is the construction of Toom and Cook: to multiply two polynomials, multiply their values at n different points,
    the last of which is infinity; `points` are the others.
    """
    points = np.asarray(points, np.float64)
    others = [np.delete(points, i) for i in range(len(points))]
    infinity = np.eye(len(points) + 1)[-1:]                                           # (1, n)
    lagrange = np.array([np.poly(roots)[::-1] for roots in others])                   # (n - 1, n - 1), constants first
    input_transform = np.block([[lagrange, np.zeros((len(points), 1))], [np.poly(points)[::-1]]])
    scale = np.array([np.prod(point - roots) for point, roots in zip(points, others)])
    kernel_transform = np.vander(points, 3, increasing=True) / scale[:, None]
    output_transform = np.vander(points, len(points) - 1, increasing=True).T
    return (input_transform, np.vstack([kernel_transform, infinity[:, -3:]]),
            np.hstack([output_transform, infinity[:, 2:].T]))
