"""casia_train.py of CosFace with a network that takes milliseconds per step, for tests that run it under torchrun.

Each process writes its process ID into the folder that the environment variable PIDS names, in a file named by its
rank.
"""
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from torch import nn

from cosFace import casia_train


class TinyNet(nn.Sequential):
    """Network with the kinds of layers that faceNet has."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 8, 3, 4), nn.BatchNorm2d(8), nn.PReLU(8), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
                         nn.Linear(128, 512), nn.BatchNorm1d(512))


def main(argv=None):
    """Train TinyNet in place of faceNet; return the exit status."""
    casia_train.NETS["faceNet"] = TinyNet
    if "PIDS" in os.environ:
        (Path(os.environ["PIDS"]) / os.environ["RANK"]).write_text(str(os.getpid()))
    return casia_train.main(argv)


if __name__ == "__main__":
    sys.exit(main())
