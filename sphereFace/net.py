"""SphereFace (Liu et al., CVPR 2017, arXiv:1704.08063): the 20-layer CNN, the A-Softmax head and SphereFace-R's."""
import math
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from faces.margin import ALL, float32, margin_softmax, projections


STAGES = ((64, 1), (128, 2), (256, 4), (512, 1))  # channels and residual units of each stage; a stage halves the image


class SphereNet(nn.Module):
    """The 20-layer sphere CNN (SphereFace, table 2), with or without batch normalisation.

    Every stage is a 3x3 convolution of stride 2 and then residual units of two 3x3 convolutions. Each convolution is
    followed by PReLU. Layers carry the names of the released checkpoints: conv1_1, relu1_1, ..., conv4_3, fc5.

    Args:
        batch_norm: put batch normalisation after every convolution (conv1_1bn) and after fc5 (fc5_bn).
    """

    def __init__(self, batch_norm):
        super().__init__()
        previous = 3
        for stage, (channels, units) in enumerate(STAGES, 1):
            for layer in range(1, 2 * units + 2):
                conv = nn.Conv2d(previous, channels, 3, stride=2 if layer == 1 else 1, padding=1, bias=layer == 1)
                self.add_module(f"conv{stage}_{layer}", conv)
                self.add_module(f"conv{stage}_{layer}bn", nn.BatchNorm2d(channels) if batch_norm else nn.Identity())
                self.add_module(f"relu{stage}_{layer}", nn.PReLU(channels))
                previous = channels
        self.fc5 = nn.Linear(512 * 7 * 6, 512)
        self.fc5_bn = nn.BatchNorm1d(512) if batch_norm else nn.Identity()
        self._initialise(batch_norm)

    def _initialise(self, batch_norm):
        # Residual units begin as the identity or close to it. Without batch normalisation as in the Caffe releases: a
        # narrow normal in the units, Xavier elsewhere. With it the weights' size does not count: He's everywhere, and
        # a unit's last normalisation starts at zero.
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
            for stage, (_, units) in enumerate(STAGES, 1):
                for unit in range(1, units + 1):
                    nn.init.zeros_(self.get_submodule(f"conv{stage}_{2 * unit + 1}bn").weight)

    def _layer(self, name, x):
        for part in (f"conv{name}", f"conv{name}bn", f"relu{name}"):
            x = self.get_submodule(part)(x)
        return x

    def forward(self, x):
        """Embed aligned faces: float (N, 3, 112, 96), RGB, (x - 127.5) / 128, to float (N, 512), not normalised."""
        for stage, (_, units) in enumerate(STAGES, 1):
            x = self._layer(f"{stage}_1", x)                                # (N, 64, 56, 48) ... (N, 512, 7, 6)
            for unit in range(1, units + 1):
                x = x + self._layer(f"{stage}_{2 * unit + 1}", self._layer(f"{stage}_{2 * unit}", x))
        return self.fc5_bn(self.fc5(x.flatten(1)))                          # (N, 512)


def faceNet():
    """The 20-layer CNN with batch normalisation: trains from scratch on small batches and small sets too."""
    return SphereNet(batch_norm=True)


def sphere20a():
    """The 20-layer CNN as the 2017 paper has it, without batch normalisation."""
    return SphereNet(batch_norm=False)


NETS = {"faceNet": faceNet, "sphere20a": sphere20a}


def psi(cosine, m):
    """psi(t) = (-1)^k cos(m t) - 2k for t in [k pi/m, (k+1) pi/m], k in 0..m-1 (equation 7), monotone in t.

    cos(m t) is the Chebyshev polynomial of cos t, so there is no acos, whose gradient is infinite at t = 0 and pi;
    k counts the interval bounds that t has passed, so that rounding can't lead out of 0..m-1, and is a constant to
    the gradient (psi is smooth across the bounds).

    Args:
        cosine: float tensor of any shape, cos t.
        m: angular margin, a whole number >= 1.
    """
    previous, chebyshev = torch.ones_like(cosine), cosine
    for _ in range(m - 1):
        previous, chebyshev = chebyshev, 2 * cosine * chebyshev - previous
    k = sum(((cosine < math.cos(i * math.pi / m)).to(cosine.dtype) for i in range(1, m)), torch.zeros_like(cosine))
    return (1 - 2 * (k % 2)) * chebyshev - 2 * k


class SphereFace(nn.Module):
    """A-Softmax: logit_j = |x| cos t_j; the target's is |x| (lambda cos t + psi(t)) / (1 + lambda).

    Args:
        classes: number of identities C.
        m: angular margin, 1 to 5; the paper's is 4.
    """

    def __init__(self, classes, m=4):
        super().__init__()
        self.m = m
        self.weight = nn.Parameter(torch.randn(classes, 512) / 512 ** 0.5)

    @staticmethod
    def annealing(step, minimum=5.0):
        """lambda = max(minimum, 1000 / (1 + 0.12 step)) as in the authors' Caffe release; step counts from 0."""
        return max(minimum, 1000.0 / (1.0 + 0.12 * step))

    def forward(self, embedding, label, lam, centres=ALL):
        """Loss of a batch.

        Args:
            embedding: float (N, 512), not normalised.
            label: int64 (N,), 0 <= label < C.
            lam: lambda >= 0, see annealing(); 0 is the pure margin.
            centres: whose centres `weight` holds, where they are spread over processes.

        Returns:
            (mean loss, scalar float32; predicted label by the largest cosine, int64 (N,)).
        """
        def margin(logit, norm):                                   # both (N,), of the targets
            cosine = logit / norm
            return norm * (lam * cosine + psi(cosine, self.m)) / (1 + lam)

        with float32(embedding):
            x = embedding.float()
            norm = (x.square().sum(1) + 1e-12).sqrt()              # (N,); the epsilon keeps a zero embedding finite
            logits = projections(x, self.weight.float())           # (N, C): |x| cos t
            return margin_softmax(logits, label, margin, norm, centres=centres)


class SphereFaceR(nn.Module):
    """SphereFace-R (Liu et al., TPAMI 2022, arXiv:2109.05565), its first margin, with hard feature normalisation:
    logit_j = s cos t_j; the target's is s psi(t), its gradient that of s cos t ("characteristic gradient detachment").

    A constant s in place of |x|, which the net otherwise has to grow, and a gradient that has cos t's sign and size at
    every angle: so the margin holds from the first step, without lambda, and m may be any number.

    Args:
        classes: number of identities C.
        s: scale; 30 in the authors' code (ydwen/opensphere).
        m: angular margin, m >= 1; 1.5 there.
    """

    def __init__(self, classes, s=30.0, m=1.5):
        super().__init__()
        self.s, self.m = s, m
        self.weight = nn.Parameter(torch.randn(classes, 512) / 512 ** 0.5)

    def forward(self, embedding, label, lam=0.0, centres=ALL):
        """Loss of a batch; arguments and results as of SphereFace, (lambda cos t + psi(t)) / (1 + lambda) again."""
        def margin(logit):                                         # (N,), of the targets
            t = (logit.detach() / self.s).clamp(-1, 1).acos()
            k = (t * (self.m / math.pi)).floor()
            psi = (1 - 2 * (k % 2)) * torch.cos(self.m * t) - 2 * k
            return logit + self.s * (psi - t.cos()) / (1 + lam)    # the second summand is a constant to the gradient

        with float32(embedding):
            x = nn.functional.normalize(embedding.float())         # a zero embedding stays zero, its gradient finite
            logits = projections(self.s * x, self.weight.float())  # (N, C): s cos t
            return margin_softmax(logits, label, margin, centres=centres)
