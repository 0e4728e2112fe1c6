"""SphereFace (Liu et al., CVPR 2017, arXiv:1704.08063): the sphere CNN, SphereFace's and SphereFace-R's loss."""
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

CHANNELS = (64, 128, 256, 512)    # of each stage; a stage halves the image
UNITS = {20: (1, 2, 4, 1), 36: (2, 4, 8, 2), 64: (3, 8, 16, 3)}    # residual units of each stage, by depth


class SphereNet(nn.Module):
    """The sphere CNN (SphereFace, table 2), with or without batch normalization.

    Each stage is a 3x3 convolution of stride 2, followed by residual units of two 3x3 convolutions. Every convolution
    is followed by PReLU. Layers have the names of the released checkpoints: conv1_1, relu1_1, conv1_2, ..., fc5.

    Args:
        batch_norm: put batch normalization after every convolution (conv1_1bn) and after fc5 (fc5_bn).
        depth: number of convolutions, 20, 36 or 64.
    """

    def __init__(self, batch_norm: bool, depth: int = 20):
        super().__init__()
        self.units, previous = UNITS[depth], 3
        for stage, (channels, units) in enumerate(zip(CHANNELS, self.units), 1):
            for layer in range(1, 2 * units + 2):
                conv = nn.Conv2d(previous, channels, 3, stride=2 if layer == 1 else 1, padding=1, bias=layer == 1)
                if batch_norm and layer == 1:
                    conv.bias.requires_grad_(False)    # it cancels out, but public files have it
                self.add_module(f"conv{stage}_{layer}", conv)
                self.add_module(f"conv{stage}_{layer}bn", nn.BatchNorm2d(channels) if batch_norm else nn.Identity())
                self.add_module(f"relu{stage}_{layer}", nn.PReLU(channels))
                previous = channels
        self.fc5 = nn.Linear(512 * 7 * 6, 512)
        self.fc5_bn = nn.BatchNorm1d(512) if batch_norm else nn.Identity()
        self._initialize(batch_norm)

    def _initialize(self, batch_norm):
        # Without batch normalization, as in the Caffe releases: a narrow normal distribution in the residual units,
        # Xavier elsewhere. With it, the scale of the weights does not matter: He initialization everywhere, and the
        # last normalization of each unit starts at zero. Either way, residual units start close to the identity.
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and batch_norm:
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, nn.Conv2d) and module.bias is None:
                nn.init.normal_(module.weight, std=0.01)
            elif isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(module.weight)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        if batch_norm:
            for stage, units in enumerate(self.units, 1):
                for unit in range(1, units + 1):
                    nn.init.zeros_(self.get_submodule(f"conv{stage}_{2 * unit + 1}bn").weight)

    def _layer(self, name, x):
        for part in (f"conv{name}", f"conv{name}bn", f"relu{name}"):
            x = self.get_submodule(part)(x)
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Embed aligned faces: float (N, 3, 112, 96), RGB, (x - 127.5) / 128, to float (N, 512), not normalized."""
        for stage, units in enumerate(self.units, 1):
            x = self._layer(f"{stage}_1", x)                                # (N, 64, 56, 48) ... (N, 512, 7, 6)
            for unit in range(1, units + 1):
                x = x + self._layer(f"{stage}_{2 * unit + 1}", self._layer(f"{stage}_{2 * unit}", x))
        return self.fc5_bn(self.fc5(x.flatten(1)))                          # (N, 512)


faceNet = partial(SphereNet, batch_norm=True)         # trains from scratch even with small batches and sets
sphere20a = partial(SphereNet, batch_norm=False)      # the paper's networks, by the number of convolutions
sphere36a = partial(SphereNet, batch_norm=False, depth=36)
sphere64a = partial(SphereNet, batch_norm=False, depth=64)
NETS = {"faceNet": faceNet, "sphere20a": sphere20a, "sphere36a": sphere36a, "sphere64a": sphere64a}


def psi(cosine: torch.Tensor, m: int) -> torch.Tensor:
    """Return psi(t) = (-1)^k cos(m t) - 2k for t in [k pi/m, (k+1) pi/m], k in 0..m-1 (equation 7); it falls with t.

    cos(m t) is computed as the Chebyshev polynomial of cos t, because the gradient of acos is infinite at t = 0 and pi.
    k counts the interval bounds below t, so rounding can't take it out of 0..m-1. It is a constant for the gradient,
    which is exact because psi is smooth across the bounds.

    Args:
        cosine: float tensor of any shape, cos t.
        m: angular margin, an integer >= 1.
    """
    previous, chebyshev = torch.ones_like(cosine), cosine
    for _ in range(m - 1):
        previous, chebyshev = chebyshev, 2 * cosine * chebyshev - previous
    k = sum(((cosine < math.cos(i * math.pi / m)).to(cosine.dtype) for i in range(1, m)), torch.zeros_like(cosine))
    return (1 - 2 * (k % 2)) * chebyshev - 2 * k


class SphereFace(nn.Module):
    """A-Softmax: logit_j = |x| cos t_j; the target's logit is |x| (lambda cos t + psi(t)) / (1 + lambda).

    Args:
        classes: number of identities C.
        m: angular margin, 1 to 5; the paper's is 4.
    """

    s = None    # |x| takes the place of a scale

    def __init__(self, classes: int, m: int = 4):
        super().__init__()
        self.m = m
        self.weight = nn.Parameter(torch.randn(classes, 512) / 512 ** 0.5)

    @staticmethod
    def annealing(step: int, minimum: float = 5.0) -> float:
        """Return lambda = max(minimum, 1000 / (1 + 0.12 step)), as the authors' Caffe release; step counts from 0."""
        return max(minimum, 1000.0 / (1.0 + 0.12 * step))

    def target(self, cosine: torch.Tensor, lam: float) -> torch.Tensor:
        """Return what takes the place of the target's cosine."""
        return (lam * cosine + psi(cosine, self.m)) / (1 + lam)

    def forward(self, embedding: torch.Tensor, label: torch.Tensor, lam: float):
        """Return the loss of a batch and the labels it predicts.

        Args:
            embedding: float (N, 512), not normalized.
            label: int64 (N,), 0 <= label < C.
            lam: lambda >= 0, see annealing(); 0 is the pure margin.

        Returns:
            (mean loss, scalar float32; label of the largest cosine, int64 (N,)).
        """
        with torch.autocast(embedding.device.type, enabled=False):             # cosines need float32
            x = embedding.float()
            norm = (x.square().sum(1, keepdim=True) + 1e-12).sqrt()            # (N, 1), also for a zero embedding
            cosine = F.linear(x / norm, F.normalize(self.weight))              # (N, C)
            target = self.target(cosine.gather(1, label[:, None]), lam)        # (N, 1)
            logits = norm * cosine.scatter(1, label[:, None], target)          # (N, C)
            return F.cross_entropy(logits, label), cosine.argmax(1)


class SphereFaceR(nn.Module):
    """SphereFace-R (Liu et al., TPAMI 2022, arXiv:2109.05565), version 1, with hard feature normalization.

    logit_j = s cos t_j; the target's logit is s psi(t), but its gradient is the gradient of s cos t ("characteristic
    gradient detachment"). The margin can apply from the first step, without lambda, and m need not be an integer.

    Args:
        classes: number of identities C.
        s: scale; 30 in the authors' code (ydwen/opensphere).
        m: angular margin, m >= 1; 1.5 in the same code.
    """

    def __init__(self, classes: int, s: float = 30.0, m: float = 1.5):
        super().__init__()
        self.s, self.m = s, m
        self.weight = nn.Parameter(torch.randn(classes, 512) / 512 ** 0.5)

    def target(self, cosine: torch.Tensor, lam: float = 0.0) -> torch.Tensor:
        """Return what takes the place of the target's cosine; for the gradient, the second term is constant."""
        t = cosine.detach().clamp(-1, 1).acos()
        k = (t * (self.m / math.pi)).floor()
        psi_of_t = (1 - 2 * (k % 2)) * torch.cos(self.m * t) - 2 * k
        return cosine + (psi_of_t - t.cos()) / (1 + lam)

    def forward(self, embedding: torch.Tensor, label: torch.Tensor, lam: float = 0.0):
        """Return the loss of a batch and the labels it predicts; arguments and results are SphereFace's."""
        with torch.autocast(embedding.device.type, enabled=False):             # cosines need float32
            cosine = F.linear(F.normalize(embedding.float()), F.normalize(self.weight))      # (N, C)
            target = self.target(cosine.gather(1, label[:, None]), lam)                      # (N, 1)
            logits = self.s * cosine.scatter(1, label[:, None], target)                      # (N, C)
            return F.cross_entropy(logits, label), cosine.argmax(1)
