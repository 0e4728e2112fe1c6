"""The three networks of MTCNN (Zhang et al., arXiv:1604.02878) with the weights of the authors' release.

The release was trained on images stored column by column, as in MATLAB. Its convolutions are transposed here, so images
have rows and columns as usual. Only the dense layers still expect their inputs in the order (column, row, channel).
"""
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from faces.device import memory_format

WEIGHTS = Path(__file__).resolve().parent / "weights" / "mtcnn.safetensors"


def layers(*sizes: tuple) -> nn.Sequential:
    """Return convolutions with PReLU and max pooling by 2, given (inputs, outputs, size, size of pool or 0) of each."""
    body = OrderedDict()
    for i, (inputs, outputs, size, pool) in enumerate(sizes, 1):
        body[f"conv{i}"], body[f"prelu{i}"] = nn.Conv2d(inputs, outputs, size), nn.PReLU(outputs)
        if pool:
            body[f"pool{i}"] = nn.MaxPool2d(pool, 2, ceil_mode=True)    # an incomplete last window counts, as in Caffe
    return nn.Sequential(body)


class PNet(nn.Module):
    """Proposes faces of 12 pixels at all positions of images, (N, 3, H, W), H and W even and at least 12. Returns the
    probability of a face (N, h, w), h = H / 2 - 5, and the features for offsets(), (N, h, w, 32). The receptive field
    of cell (i, j) is 12 x 12 pixels, starting at row 2i and column 2j."""

    def __init__(self):
        super().__init__()
        self.body = layers((3, 10, 3, 2), (10, 16, 3, 0), (16, 32, 3, 0))
        self.face, self.box = nn.Conv2d(32, 2, 1), nn.Conv2d(32, 4, 1)

    def forward(self, x):
        x = self.body(x).permute(0, 2, 3, 1)                                # (N, h, w, 32)
        # As a softmax of two logits, but their weights are subtracted instead of the logits, which halves the work.
        weight, bias = self.face.weight.flatten(1), self.face.bias
        return (x @ (weight[1] - weight[0]) + (bias[1] - bias[0])).sigmoid(), x

    def offsets(self, x):
        """Return offsets (n, 4) of the box's sides, as fractions of its size, for the cells (n, 32) with a face."""
        return nn.functional.linear(x, self.box.weight.flatten(1), self.box.bias)


class PooledConvolution(nn.Module):
    """A 3x3 convolution with PReLU and 2x2 max pooling in one layer, for images of even height and width: it has stride
    2 and four times the channels, one for each of the values that are pooled. On a CPU, this takes 0.4 of the time,
    because the image before pooling, by far the largest in P-Net, is never stored."""

    @torch.no_grad()
    def __init__(self, convolution: nn.Conv2d, prelu: nn.PReLU):
        super().__init__()
        outputs, inputs, _, _ = convolution.weight.shape
        weight = convolution.weight.new_zeros(2, 2, outputs, inputs, 4, 4)
        for y, x in ((0, 0), (0, 1), (1, 0), (1, 1)):
            weight[y, x, :, :, y:y + 3, x:x + 3] = convolution.weight
        self.weight, self.bias = nn.Parameter(weight.flatten(0, 2)), nn.Parameter(convolution.bias.repeat(4))
        self.slope = nn.Parameter(prelu.weight.repeat(4))

    def forward(self, x):
        x = nn.functional.prelu(nn.functional.conv2d(x, self.weight, self.bias, stride=2), self.slope)
        for _ in range(2):
            x = torch.maximum(*x.chunk(2, 1))
        return x


class SeparableMaxPool(nn.Module):
    """nn.MaxPool2d(3, 2, ceil_mode=True) for even heights and widths, in a third of its time on a CPU."""

    def forward(self, x):
        for dim in (2, 3):    # the maximum over rows, then over columns
            first, second = x.unflatten(dim, (-1, 2)).unbind(dim + 1)
            x = torch.maximum(first, second)
            # The third value of a window is the first of the next window. The last window has none.
            windows = x.narrow(dim, 0, x.shape[dim] - 1)
            torch.maximum(windows, first.narrow(dim, 1, x.shape[dim] - 1), out=windows)
        return x


class Classifier(nn.Module):
    """R-Net or O-Net: takes proposals, (N, 3, 24, 24) or (N, 3, 48, 48); returns the probability of a face (N,), the
    offsets (N, 4) of the box's sides and, from O-Net, the landmarks (N, 5, 2), x then y as fractions of the box from
    its upper left corner."""

    def __init__(self, body: nn.Sequential, inputs: int, width: int, landmarks: bool = False):
        super().__init__()
        self.body, self.dense = body, nn.Sequential(nn.Linear(inputs, width), nn.PReLU(width))
        self.face, self.box = nn.Linear(width, 2), nn.Linear(width, 4)
        self.points = nn.Linear(width, 10) if landmarks else None    # five x, then five y

    def forward(self, x):
        x = self.dense(self.body(x).permute(0, 3, 2, 1).flatten(1))    # (N, W * H * C) into the dense layer
        logits = self.face(x)
        outputs = (logits[:, 1] - logits[:, 0]).sigmoid(), self.box(x)
        return outputs if self.points is None else (*outputs, self.points(x).unflatten(1, (2, 5)).transpose(1, 2))


def load_nets(device: torch.device | str = "cpu") -> nn.ModuleDict:
    """Return pnet, rnet and onet in evaluation mode: float32 whatever torch's defaults are, no random number drawn."""
    # glibc maps large blocks of memory anew until one of 31 MB has been freed; reusing them saves 7 % of the time.
    torch.empty(31 << 20, dtype=torch.uint8, device="cpu")
    with torch.device("meta"):
        nets = nn.ModuleDict({
            "pnet": PNet(),
            "rnet": Classifier(layers((3, 28, 3, 3), (28, 48, 3, 3), (48, 64, 2, 0)), 64 * 3 * 3, 128),
            "onet": Classifier(layers((3, 32, 3, 3), (32, 64, 3, 3), (64, 64, 3, 2), (64, 128, 2, 0)), 128 * 3 * 3, 256,
                               landmarks=True)})
    nets.load_state_dict({name: tensor.clone() for name, tensor in load_file(WEIGHTS).items()}, assign=True)
    body = nets.pnet.body
    nets.pnet.body = nn.Sequential(PooledConvolution(body.conv1, body.prelu1), *body[3:])
    if torch.device(device).type == "cpu":
        nets.rnet.body.pool1, nets.onet.body.pool1 = SeparableMaxPool(), SeparableMaxPool()
    return nets.eval().requires_grad_(False).to(device, memory_format=memory_format(device))
