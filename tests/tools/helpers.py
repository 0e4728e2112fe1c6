"""What the tests of several tools share: a model, photos, and a way to run a tool in this process."""
import cv2
import numpy as np
import skimage.data
import torch
from conftest import perturb, write_image

from cosFace.net import NETS
from faces.training import checkpoint


def write_model(path, seed=0):
    """Write a checkpoint of an untrained network with perturbed batch normalization, biases and PReLU slopes."""
    torch.manual_seed(seed)
    net = NETS["faceNet"]()
    perturb(net)
    with torch.no_grad():
        net.train()(torch.randn(4, 3, 112, 96))
    checkpoint.save(path, {"method": "CosFace", "net": "faceNet", "weights": net.state_dict()})
    return path


def write_photos(root):
    """Write a portrait, a brighter mirrored copy, a picture of two faces, and one without a face; return the folder."""
    face = skimage.data.astronaut()[:200, 100:360]
    write_image(root / "face.png", face)
    write_image(root / "brighter.png", cv2.convertScaleAbs(face[:, ::-1], alpha=1, beta=25))
    write_image(root / "two.png", np.hstack((face, cv2.copyMakeBorder(cv2.resize(face, (195, 150)), 0, 50, 0, 0, 0))))
    write_image(root / "coffee.png", skimage.data.coffee()[:260, :260])
    return root


def call(tool, *args):
    """Run a tool's main() in this process; return its exit status, 0 if main() returns None."""
    try:
        return tool.main(list(map(str, args))) or 0
    except SystemExit as exit:
        return exit.code
