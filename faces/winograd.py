"""3x3 convolutions by Winograd's minimal filtering, F(4x4, 3x3) (Lavin and Gray, arXiv:1509.09308), on a CPU.

A tile d of 6x6 pixels gives 4x4 outputs A'[(G g G') * (B'd B)]A, with 36 products a pair of channels instead of 144;
summed over the channels they are 36 matrix products, which MKL computes as fast as oneDNN convolves.
"""
import numpy as np
import torch
from torch import nn

OUT, IN = 4, 6  # pixels along the side of a tile
POINTS = (0, 0.5 ** 0.5, -0.5 ** 0.5, 2 ** 0.5, -2 ** 0.5)  # and infinity; the usual 0, +-1, +-2 round worse


class Winograd(nn.Module):
    """A 3x3 convolution of stride 1 and padding 1; rounds in float32 about as the direct sum does.

    Args:
        conv: nn.Conv2d, whose weights are taken as they are now.
    """

    def __init__(self, conv):
        super().__init__()
        to_products, to_kernel, to_outputs = (torch.from_numpy(np.kron(m, m)) for m in winograd_matrices(POINTS))
        out_channels, in_channels = conv.weight.shape[:2]
        weight = to_kernel @ conv.weight.detach().double().transpose(0, 1).reshape(-1, 9).T
        bias = torch.zeros(out_channels) if conv.bias is None else conv.bias.detach()
        self.register_buffer("weight", weight.float().view(IN ** 2, in_channels, out_channels))
        self.register_buffer("bias", bias)
        self.register_buffer("to_products", to_products.float())                      # (36, 36): B'd B of flat tiles
        self.register_buffer("to_outputs", to_outputs.float())                        # (16, 36)

    def forward(self, x):
        """Convolve float (N, C, H, W) to (N, K, H, W); fastest if channels are last in memory, as the result's are."""
        count, channels, height, width = x.shape
        down, across = -(-height // OUT), -(-width // OUT)
        tiles = count * down * across                                                 # T
        x = nn.functional.pad(x, (1, across * OUT + 1 - width, 1, down * OUT + 1 - height)).permute(0, 2, 3, 1)
        x = x.unfold(1, IN, OUT).unfold(2, IN, OUT).permute(0, 1, 2, 4, 5, 3)         # (N, down, across, 6, 6, C)
        x = torch.bmm(self.to_products.expand(tiles, -1, -1), x.reshape(tiles, IN ** 2, channels))
        x = torch.bmm(x.transpose(0, 1), self.weight).transpose(0, 1)                 # (T, 36, K)
        x = torch.baddbmm(self.bias, self.to_outputs.expand(tiles, -1, -1), x)        # (T, 16, K)
        x = x.view(count, down, across, OUT, OUT, -1).transpose(2, 3)
        x = x.reshape(count, down * OUT, across * OUT, -1)[:, :height, :width]
        return x.permute(0, 3, 1, 2)


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
