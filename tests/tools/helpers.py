"""A plugin of pytest with what the tests of several tools share: a model, photos, and a way to run a tool."""
import cv2
import numpy as np
import pytest
import skimage.data
from conftest import call as call_main
from conftest import write_image, write_model


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "checkpoint.pt")


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Return a folder of a portrait, a brighter flipped copy, a picture of two faces, and one without a face."""
    root, face = tmp_path_factory.mktemp("photos"), skimage.data.astronaut()[:200, 100:360]
    write_image(root / "face.png", face)
    write_image(root / "brighter.png", cv2.convertScaleAbs(face[:, ::-1], alpha=1, beta=25))
    write_image(root / "two.png", np.hstack((face, cv2.copyMakeBorder(cv2.resize(face, (195, 150)), 0, 50, 0, 0, 0))))
    write_image(root / "coffee.png", skimage.data.coffee()[:260, :260])
    return root


@pytest.fixture
def call(capsys):
    """Return a function that runs main() of a tool in this process: (exit status, stdout, stderr)."""
    def run(tool, *args):
        return call_main(capsys, tool.main, list(map(str, args)))
    return run
