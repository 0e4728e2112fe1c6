"""The three networks of MTCNN (Zhang et al., arXiv:1604.02878) with the weights of the authors' release.

The release was trained on images stored column by column, as in MATLAB. Its convolutions are transposed here, so images
have rows and columns as usual. Only the dense layers still expect their inputs in the order (column, row, channel); see
columns_first().
"""
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import nn

from faces.device import memory_format

WEIGHTS = Path(__file__).resolve().parent / "weights" / "mtcnn.safetensors"


class Nets(NamedTuple):
    """The three stages, in evaluation mode."""
    pnet: nn.Module
    rnet: nn.Module
    onet: nn.Module


def columns_first(x):
    """Flatten (N, C, H, W) to (N, W * H * C), the order that the dense layers expect."""
    return x.permute(0, 3, 2, 1).flatten(1)


def face_probability(logits):
    """Return the probability of the second class in a softmax over (no face, face) in dimension 1."""
    return (logits[:, 1] - logits[:, 0]).sigmoid()


def convolution(number, inputs, outputs, size):
    """Return named layers of a network: a convolution without padding, and its PReLU."""
    return [(f"conv{number}", nn.Conv2d(inputs, outputs, size)), (f"prelu{number}", nn.PReLU(outputs))]


def pool(number, size):
    """Return a named layer of a network: max pooling by 2. An incomplete last window counts, as in Caffe."""
    return [(f"pool{number}", nn.MaxPool2d(size, 2, ceil_mode=True))]


class PNet(nn.Module):
    """Proposes faces of 12 pixels at all positions of an image of any size.

    Takes float (N, 3, H, W), (x - 127.5) / 128, H and W even and at least 12. Returns the probability of a face
    (N, h, w), h = H / 2 - 5, and the features that offsets() takes, (N, h, w, 32). The receptive field of cell (i, j)
    is 12 x 12 pixels, starting at row 2i and column 2j.
    """

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(OrderedDict(
            convolution(1, 3, 10, 3) + pool(1, 2) + convolution(2, 10, 16, 3) + convolution(3, 16, 32, 3)))
        self.face = nn.Conv2d(32, 2, 1)
        self.box = nn.Conv2d(32, 4, 1)

    def forward(self, x):
        x = self.body(x).permute(0, 2, 3, 1)                                # (N, h, w, 32)
        # This equals face_probability(), but the weights of the two logits are subtracted, which halves the work.
        weight, bias = self.face.weight.flatten(1), self.face.bias
        return (x @ (weight[1] - weight[0]) + (bias[1] - bias[0])).sigmoid(), x

    def offsets(self, x):
        """Return offsets (n, 4) of the box's sides, as fractions of its size, for the cells (n, 32) with a face."""
        return nn.functional.linear(x, self.box.weight.flatten(1), self.box.bias)


class PooledConvolution(nn.Module):
    """A 3x3 convolution with PReLU and 2x2 max pooling in one layer, for images of even height and width.

    It is a convolution of stride 2 with four times the channels, one for each of the four values that are pooled. This
    takes 1.8 times the multiplications, but 0.4 of the time on a CPU, because the image before pooling, which is by far
    the largest in P-Net, is never stored.
    """

    def __init__(self, convolution, prelu):
        super().__init__()
        outputs, inputs, _, _ = convolution.weight.shape
        weight = torch.zeros(2, 2, outputs, inputs, 4, 4)
        for y in (0, 1):
            for x in (0, 1):
                weight[y, x, :, :, y:y + 3, x:x + 3] = convolution.weight
        self.weight, self.bias = nn.Parameter(weight.flatten(0, 2)), nn.Parameter(convolution.bias.repeat(4))
        self.slope = nn.Parameter(prelu.weight.repeat(4))

    def forward(self, x):
        x = nn.functional.prelu(nn.functional.conv2d(x, self.weight, self.bias, stride=2), self.slope)
        for _ in range(2):
            x = torch.maximum(*x.chunk(2, 1))
        return x


class SeparableMaxPool(nn.Module):
    """3x3 max pooling with stride 2 for even heights and widths; the last window of a row or column has two values.

    The maximum over rows comes first, then the one over columns. On a CPU, this takes a third of the time of
    nn.MaxPool2d(3, 2, ceil_mode=True), whose result is the same.
    """

    def forward(self, x):
        for dim in (2, 3):
            first, second = x.unflatten(dim, (-1, 2)).unbind(dim + 1)
            x = torch.maximum(first, second)
            # The third value of a window is the first of the next window. The last window has none.
            windows = x.narrow(dim, 0, x.shape[dim] - 1)
            torch.maximum(windows, first.narrow(dim, 1, x.shape[dim] - 1), out=windows)
        return x


class RNet(nn.Module):
    """Classifies proposals: float (N, 3, 24, 24) to the probability of a face (N,) and offsets (N, 4) of the sides."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(OrderedDict(
            convolution(1, 3, 28, 3) + pool(1, 3) + convolution(2, 28, 48, 3) + pool(2, 3) + convolution(3, 48, 64, 2)))
        self.dense = nn.Sequential(nn.Linear(64 * 3 * 3, 128), nn.PReLU(128))
        self.face = nn.Linear(128, 2)
        self.box = nn.Linear(128, 4)

    def forward(self, x):
        x = self.dense(columns_first(self.body(x)))
        return face_probability(self.face(x)), self.box(x)


class ONet(nn.Module):
    """Classifies again and finds landmarks.

    Takes float (N, 3, 48, 48). Returns the probability of a face (N,), the offsets (N, 4) of the box's sides, and the
    landmarks (N, 5, 2), x then y as fractions of the box: (0, 0) is its upper left and (1, 1) its lower right corner.
    """

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(OrderedDict(
            convolution(1, 3, 32, 3) + pool(1, 3) + convolution(2, 32, 64, 3) + pool(2, 3)
            + convolution(3, 64, 64, 3) + pool(3, 2) + convolution(4, 64, 128, 2)))
        self.dense = nn.Sequential(nn.Linear(128 * 3 * 3, 256), nn.PReLU(256))
        self.face = nn.Linear(256, 2)
        self.box = nn.Linear(256, 4)
        self.points = nn.Linear(256, 10)  # five x, then five y

    def forward(self, x):
        x = self.dense(columns_first(self.body(x)))
        return face_probability(self.face(x)), self.box(x), self.points(x).unflatten(1, (2, 5)).transpose(1, 2)


def load_nets(device="cpu", path=WEIGHTS):
    """Return Nets with their weights, in evaluation mode and without gradients.

    On a CPU, max pooling in the channels_last memory format is two to three times as fast as in the other.

    Raises:
        RuntimeError: the names or shapes in the file are not those of the networks.
    """
    # glibc maps every large block anew, and the kernel clears it, until a block of 31 MB has been freed. From then on
    # it reuses blocks, which makes the detector 7 % faster.
    torch.empty(31 << 20, dtype=torch.uint8)
    tensors = load_file(path)
    nets = Nets(PNet(), RNet(), ONet())
    for name, net in zip(Nets._fields, nets):
        net.load_state_dict({key.removeprefix(name + "."): value for key, value in tensors.items()
                             if key.startswith(name + ".")}, strict=True)
    body = nets.pnet.body
    nets.pnet.body = nn.Sequential(PooledConvolution(body.conv1, body.prelu1), *body[3:])
    if torch.device(device).type == "cpu":
        nets.rnet.body.pool1, nets.onet.body.pool1 = SeparableMaxPool(), SeparableMaxPool()
    for net in nets:
        net.eval().requires_grad_(False).to(device, memory_format=memory_format(device))
    return nets
