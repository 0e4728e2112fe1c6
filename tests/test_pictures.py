"""The pictures of images/draw.py equal the committed ones."""
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from images import draw

COMMITTED = Path(draw.__file__).parent


@pytest.mark.parametrize("name", ["margins", "overview", "verification", "tsne"])
def test_pictures_equal_the_committed_ones(name, tmp_path):
    getattr(draw, name)(tmp_path)
    drawn, committed = Image.open(tmp_path / f"{name}.png"), Image.open(COMMITTED / f"{name}.png")
    # A transparent background would make the black text unreadable on a dark page, so alpha must be 255 everywhere.
    assert drawn.convert("RGBA").getextrema()[3] == (255, 255)
    if drawn.info["Software"] != committed.info["Software"]:
        pytest.skip(f"{name}.png was drawn by {committed.info['Software']}, which places text differently from "
                    f"{matplotlib.__version__}")
    assert drawn.size == committed.size
    # Another machine may round an edge differently, but a changed formula or curve alters at least a hundred pixels.
    differs = np.abs(np.asarray(drawn, int) - np.asarray(committed, int)).max(2) > 64
    assert differs.sum() < 50, f"{differs.sum()} pixels differ; run images/draw.py"
