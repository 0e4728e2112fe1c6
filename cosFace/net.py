"""CosFace (Wang et al., CVPR 2018, arXiv:1801.09414): the sphere CNN and the large margin cosine loss."""
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


class CosFace(nn.Module):
    """Large margin cosine loss (equation 4): logit_j = s cos t_j; the target's logit is s (cos t - m).

    Args:
        classes: number of identities C.
        s: scale; the paper's is 64.
        m: cosine margin, 0 <= m < 1; the paper's is 0.35.
    """

    def __init__(self, classes: int, s: float = 64.0, m: float = 0.35):
        super().__init__()
        self.s, self.m = s, m
        self.weight = nn.Parameter(torch.randn(classes, 512) / 512 ** 0.5)

    def target(self, cosine: torch.Tensor, ramp: float = 1.0) -> torch.Tensor:
        """Return what takes the place of the target's cosine; `ramp` grows from 0 to 1 while the margin grows."""
        return cosine - ramp * self.m

    def forward(self, embedding: torch.Tensor, label: torch.Tensor, ramp: float = 1.0):
        """Return the loss of a batch and the labels it predicts.

        Args:
            embedding: float (N, 512), not normalized.
            label: int64 (N,), 0 <= label < C.
            ramp: fraction of the margin to apply, 0 to 1, for training in which the margin grows.

        Returns:
            (mean loss, scalar float32; label of the largest cosine, int64 (N,)).
        """
        with torch.autocast(embedding.device.type, enabled=False):             # cosines need float32
            cosine = F.linear(F.normalize(embedding.float()), F.normalize(self.weight))      # (N, C)
            target = self.target(cosine.gather(1, label[:, None]), ramp)                     # (N, 1)
            logits = self.s * cosine.scatter(1, label[:, None], target)                      # (N, C)
            return F.cross_entropy(logits, label), cosine.argmax(1)
