"""3x3 convolutions by Winograd's minimal filtering, F(4x4, 3x3) (Lavin and Gray, arXiv:1509.09308), on a CPU.

A tile d of 6x6 pixels gives 4x4 outputs A'[(G g G') * (B'd B)]A, with 36 products a pair of channels instead of 144;
summed over the channels they are 36 matrix products, which MKL computes as fast as oneDNN convolves. The gradient by
the image is such a convolution again, that by the kernel G'[V' (A e A')]G with 36 products as well.
"""
import functools

import numpy as np
import torch
from torch import nn
from torch.autograd.function import once_differentiable

from faces.cpu import kernels

OUT, IN = 4, 6  # pixels along the side of a tile
POINTS = (0, 0.5 ** 0.5, -0.5 ** 0.5, 2 ** 0.5, -2 ** 0.5)  # and infinity, as in kernels.c; 0, +-1, +-2 round worse
MIN_CHANNELS = 128          # channels from which it pays without the kernels, whose transforms cost next to nothing


def can_use_winograd(layer):
    """Whether a layer is a convolution that these compute, and faster than PyTorch does on a CPU in float32."""
    if not isinstance(layer, nn.Conv2d) or (
            layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode) != (
            (3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros"):
        return False
    if kernels.available():
        return kernels.supports_channels(layer.in_channels) and kernels.supports_channels(layer.out_channels)
    return layer.in_channels >= MIN_CHANNELS and kernels.enabled()


class Winograd(nn.Module):
    """A 3x3 convolution of stride 1 and padding 1, for inference; rounds in float32 about as the direct sum does.

    Args:
        conv: nn.Conv2d, whose weights are taken as they are now.
        prelu: nn.PReLU that follows and is to be computed with it, or None.
    """

    def __init__(self, conv, prelu=None):
        super().__init__()
        channels = conv.out_channels
        self.register_buffer("weight", kernel_products(conv.weight.detach().double()).float().permute(1, 2, 0))
        self.register_buffer("bias", torch.zeros(channels) if conv.bias is None else conv.bias.detach().clone())
        self.register_buffer("slope", torch.ones(channels) if prelu is None else
                             prelu.weight.detach().expand(channels).contiguous())

    def forward(self, x):
        """Convolve float (N, C, H, W) to (N, K, H, W); fastest if channels are last in memory, as the result's are."""
        return _convolve(x, self.weight, self.bias, self.slope)


class WinogradConv2d(nn.Conv2d):
    """The same for training: nn.Conv2d with another way to compute it and its gradients. Needs faces.cpu.kernels."""

    def forward(self, x):
        y = _Convolution.apply(x, self.weight)
        return y if self.bias is None else y + self.bias[:, None, None]


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)    # x and not its transform, which is twice as large and soon made again
        return _convolve_plainly(x, kernel_products(weight).permute(1, 2, 0))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _convolve_plainly(grad, kernel_products(weight.flip(2, 3)).permute(1, 0, 2))  # by (36, K, C)
        to_kernel, products = _matrices(torch.float32)[1], grad.new_zeros(IN ** 2, len(weight), x.shape[1])
        for part, grad_part in zip(_parts(x), _parts(grad, x.shape)):
            products.baddbmm_(kernels.gradients_to_products(grad_part).transpose(1, 2),
                              kernels.pixels_to_products(part))                                   # (36, K, C)
        grad_weight = (torch.kron(to_kernel, to_kernel).T @ products.flatten(1)).view(3, 3, len(weight), x.shape[1])
        return grad_x, grad_weight.permute(2, 3, 0, 1).contiguous(memory_format=torch.channels_last)


def kernel_products(weight):
    """G g G' of each pair of channels: float (K, C, 3, 3) to (K, 36, C), for which channels_last needs no copy."""
    to_kernel = _matrices(weight.dtype)[1]
    return torch.kron(to_kernel, to_kernel) @ weight.permute(0, 2, 3, 1).flatten(1, 2)


def _convolve_plainly(x, weight):
    return _convolve(x, weight, weight.new_zeros(weight.shape[2]), weight.new_ones(weight.shape[2]))


def _convolve(x, weight, bias, slope):
    """PReLU of the convolution of float (N, C, H, W) with products (36, C, K) of its kernel; bias and slope (K,)."""
    if not (kernels.available() and kernels.supports_channels(x.shape[1]) and kernels.supports_channels(len(bias))):
        return _convolve_without_kernels(x, weight, bias, slope)
    y = x.new_empty(len(x), *x.shape[2:], len(bias))
    for part, images in zip(_parts(x), _parts(y, x.shape)):
        kernels.to_outputs(torch.bmm(kernels.pixels_to_products(part), weight), bias, slope, images)
    return y.permute(0, 3, 1, 2)


def _parts(tensor, shape=None):
    """Split a batch into parts that stay in a processor's cache; shape: of what their products are.

    A part has as many tiles as channels, or one image: products no larger than the kernels' beside which they are used.
    """
    _, channels, height, width = shape or tensor.shape
    return tensor.split(max(1, channels // (-(-height // OUT) * -(-width // OUT))))


def _convolve_without_kernels(x, weight, bias, slope):
    count, channels, height, width = x.shape
    down, across = -(-height // OUT), -(-width // OUT)
    to_products, to_outputs = (torch.kron(m, m).expand(count * down * across, -1, -1) for m in
                               _matrices(torch.float32)[::2])
    x = nn.functional.pad(x, (1, across * OUT + 1 - width, 1, down * OUT + 1 - height)).permute(0, 2, 3, 1)
    x = x.unfold(1, IN, OUT).unfold(2, IN, OUT).permute(0, 1, 2, 4, 5, 3)                   # (N, down, across, 6, 6, C)
    x = torch.bmm(to_products, x.reshape(len(to_products), IN ** 2, channels))
    x = torch.bmm(x.transpose(0, 1), weight).transpose(0, 1)                                  # (T, 36, K)
    x = torch.baddbmm(bias, to_outputs, x).view(count, down, across, OUT, OUT, -1).transpose(2, 3)
    x = x.reshape(count, down * OUT, across * OUT, -1)[:, :height, :width].permute(0, 3, 1, 2)
    return nn.functional.prelu(x, slope)


@functools.cache
def _matrices(dtype):
    """B', G and A' of F(4x4, 3x3)."""
    return tuple(torch.from_numpy(matrix).to(dtype).contiguous() for matrix in winograd_matrices(POINTS))


def winograd_matrices(points):
    """Return B', G and A', with which A'((G g) * (B'd)) is d correlated with g.

    By Toom and Cook: polynomials are multiplied by their values at n points, of which the last is infinity.

    Args:
        points: n - 1 different numbers.

    Returns:
        float64 (n, n), (n, 3) and (n - 2, n), for n values of d and 3 of g.
    """
    points = np.asarray(points, np.float64)
    others = [np.delete(points, i) for i in range(len(points))]
    infinity = np.eye(len(points) + 1)[-1:]                                           # (1, n)
    lagrange = np.array([np.poly(roots)[::-1] for roots in others])                   # (n - 1, n - 1), constants first
    to_products = np.block([[lagrange, np.zeros((len(points), 1))], [np.poly(points)[::-1]]])
    scale = np.array([np.prod(point - roots) for point, roots in zip(points, others)])
    to_kernel = np.vander(points, 3, increasing=True) / scale[:, None]
    to_outputs = np.vander(points, len(points) - 1, increasing=True).T
    return to_products, np.vstack([to_kernel, infinity[:, -3:]]), np.hstack([to_outputs, infinity[:, 2:].T])
